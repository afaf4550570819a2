"""The methods compared on one data set and track: accuracies beside the published ones, differences, sentences, settings, plot."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from wdkd import figures, published, settings, tables
from wdkd.document import Bullets, Cell, Plot, Section, Table, word
from wdkd.result import Result
from wdkd.tables import ABSENT, Cells


def section(results: Sequence[Result], warnings: Sequence[str]) -> Section:
    """The whole comparison; `warnings` are shown near its top."""
    cells, first = tables.in_cells(results), results[0]
    ran = tables.method_order(m for m, _ in cells)
    sizes = tables.size_order(n for _, n in cells)

    def quantity(name: str) -> Table:
        return tables.grid(ran, sizes, lambda m, n: quantity_cell(cells, m, n, name))

    differences = tables.grid([m for m in ran if m != "kd"], sizes, lambda m, n: difference_cell(cells, m, n))
    paired = "Runs with the same seed and the same subset: mean [95 % t-interval] (number of pairs)."
    return Section(
        f"{first.dataset}, track {first.track}",
        [
            f"Made by `launch/report.py` from {len(results)} result files; nothing measured is typed by hand.",
            Bullets([f"{name}: {value}" for name, value in facts(results).items()]),
            Bullets(warnings, warning=True),
            accuracy_section(results),
            Section("Other published results", references(first.dataset)) if first.dataset in published.REFERENCES else "",
            Section("Paired difference from kd, points", [paired, differences]),
            Section("Agreement with the teacher, %", [quantity("agreement")]),
            Section("Expected calibration error, %", ["15 bins of equal width (Guo et al. 2017).", quantity("ece")]),
            Section("How each method was run", [settings_table(results)]),
        ],
    )


def accuracy_section(results: Sequence[Result]) -> Section:
    """The main table with what it means, and its plot."""
    cells, first = tables.in_cells(results), results[0]
    paper = published.ACCURACY.get(first.dataset, {})
    return Section(
        f"Accuracy on the {' and '.join(tables.by_value(results, lambda r: r.evaluation.split))} images, %",
        [
            "Columns: training images per class. Cells: mean ± sample standard deviation (number of seeds). "
            "Bold: the best mean of the methods run here, whatever its interval.",
            accuracy_table(cells, paper),
            published_note(paper),
            Bullets(verdicts(cells)),
            Plot(f"{first.track}.png", "accuracy against images per class", lambda: accuracy_figure(results)),
        ],
    )


def facts(results: Sequence[Result]) -> dict[str, str]:
    """What holds for the whole comparison, by name; several values where results are mixed, none where nothing applies."""
    values = {
        "Evaluated on": lambda r: f"{r.evaluation.split} ({r.evaluation.count:,} images)",
        "Teacher": lambda r: r.teacher_hash and f"{teacher_accuracy(r)}, hash {r.teacher_hash}",
        "Student": lambda r: f"{r.model}, {r.parameters:,} parameters, {flops(r)}",
        "Budget": lambda r: f"{r.steps:,} steps of {r.config.train.batch_size} images",
        "Training images in full": lambda r: f"{r.train_size:,}" if r.n_per_class is None else None,
    }
    found = {name: "; ".join(tables.by_value(results, value)) for name, value in values.items()}
    devices = tables.by_value(results, lambda r: f"{r.device_count} x {r.device_kind}")
    found["Training time"] = "; ".join(f"{hours(runs)} on {device}" for device, runs in devices.items())
    return {name: text for name, text in found.items() if text}


def hours(results: Sequence[Result]) -> str:
    """The time of runs, added up; those at work side by side count each."""
    seconds = [r.wall_seconds for r in results if r.wall_seconds is not None]
    unknown = f", {len(results) - len(seconds)} of them of unknown time" if len(seconds) < len(results) else ""
    return f"{sum(seconds) / 3600:,.2f} hours ({len(results)} runs, resumed ones from their last start{unknown})"


def teacher_accuracy(result: Result) -> str:
    """The teacher's accuracy in words."""
    return "accuracy not known" if result.teacher_accuracy is None else f"accuracy {100 * result.teacher_accuracy:.2f} %"


def flops(result: Result) -> str:
    """The student's cost in words."""
    count = result.forward_flops
    return "FLOPs not counted by the compiler" if count is None else f"{count / 1e6:,.2f} MFLOPs per image (forward)"


# --- The accuracies -----------------------------------------------------------------------------------------------------


def accuracy_table(cells: Cells, paper: Mapping[str, Mapping[int | None, float]]) -> Table:
    """A row for each method, and below it one with what was published of it; at the foot, which method is best.

    The six methods, and the columns that the paper has, are there even where nothing was run.
    """
    columns = tables.size_order([*(n for _, n in cells), *(n for row in paper.values() for n in row)])
    winners = {n: best(cells, n) for n in columns}
    rows = []
    for method in tables.method_order([*tables.METHODS, *(m for m, _ in cells)]):
        mine = [quantity_cell(cells, method, n, "accuracy") for n in columns]
        kinds = ["best" if method in winners[n] and not alone(cells, n) else cell.kind for n, cell in zip(columns, mine, strict=True)]
        rows.append([word(method), *(dataclasses.replace(cell, kind=kind) for cell, kind in zip(mine, kinds, strict=True))])
        if method in paper:
            rows.append([Cell(f"{method}, published", f"{method}, published", "published"), *(printed(paper[method], n) for n in columns)])
    foot = [[Cell("best here"), *(standing(cells, n, winners[n]) for n in columns)]]
    if "wdkd" in paper:
        foot.append([Cell("minus published wdkd"), *(margin(cells, n, winners[n], paper["wdkd"]) for n in columns)])
    return Table(["method", *map(tables.size_name, columns)], rows, foot)


def printed(row: Mapping[int | None, float], n: int | None) -> Cell:
    """A published accuracy."""
    return Cell(f"{row[n]:.2f}", row[n], "published") if n in row else Cell("-", None, "absent")


def best(cells: Cells, n: int | None) -> list[str]:
    """The methods with the best mean accuracy at a number of images, to the two digits that are shown; several are a tie."""
    means = {m: round(tables.percent(results).mean, 2) for (m, size), results in cells.items() if size == n}
    return tables.method_order(m for m, mean in means.items() if mean == max(means.values()))


def alone(cells: Cells, n: int | None) -> bool:
    """Whether one method only was run at a number of images."""
    return sum(size == n for _, size in cells) == 1


def standing(cells: Cells, n: int | None, winners: Sequence[str]) -> Cell:
    """Which methods are best at a number of images."""
    if not winners:
        return ABSENT
    return Cell(" = ".join(winners) + (" (tie)" if len(winners) > 1 else " (alone)" if alone(cells, n) else ""))


def margin(cells: Cells, n: int | None, winners: Sequence[str], row: Mapping[int | None, float]) -> Cell:
    """The best mean less a published accuracy, in points."""
    if not winners:
        return ABSENT
    return Cell(f"{tables.percent(cells[winners[0], n]).mean - row[n]:+.2f}") if n in row else Cell("-", None, "absent")


def quantity_cell(cells: Cells, method: str, n: int | None, quantity: str) -> Cell:
    """Mean and spread of a fraction in %; says so where nothing was run, or nothing can be measured (no teacher)."""
    if (method, n) not in cells:
        return ABSENT
    found = tables.percent(cells[method, n], quantity)
    return Cell("n/a, no teacher", None, "absent") if found is None else Cell(str(found), found.mean)


def published_note(paper: Mapping) -> str:
    """What the published rows are; empty where there are none."""
    if not paper:
        return ""
    return (
        f"The rows named published are the test accuracies in {published.SOURCE}. Its networks, optimiser and epsilon are not public, so "
        "they are not runs of the networks here, and no difference from them is one of method alone; "
        'wdkd is the paper\'s "ours".'
    )


def references(dataset: str) -> list[Bullets | str]:
    """What others published on this data set."""
    lines = [f"{r.images}: {r.method}: {r.accuracy} %. Source: {r.source}" for r in published.REFERENCES[dataset]]
    return ["With other networks, budgets and augmentation: for the scale only.", Bullets(lines)]


# --- Differences ----------------------------------------------------------------------------------------------------------


def difference_cell(cells: Cells, method: str, n: int | None) -> Cell:
    """Paired difference from kd; says so where one of the two was not run, or no subset is shared."""
    if (method, n) not in cells:
        return ABSENT
    if ("kd", n) not in cells:
        return Cell("n/a, kd not run", None, "absent")
    found = tables.paired_difference(cells[method, n], cells["kd", n])
    return Cell("n/a, no shared subset", None, "absent") if found is None else Cell(str(found), found.mean)


def verdicts(cells: Cells) -> list[str]:
    """One sentence for each cell in which both wdkd (or sobolev) and kd were run: which is ahead, and how surely."""
    lines = []
    for method in ("wdkd", "sobolev"):
        for n in tables.size_order(n for m, n in cells if m == method and ("kd", n) in cells):
            ours, kd = tables.percent(cells[method, n]), tables.percent(cells["kd", n])
            gap = round(ours.mean - kd.mean, 2)
            place = "level with" if gap == 0 else f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}"
            sure = sureness(tables.paired_difference(cells[method, n], cells["kd", n]))
            images = "all images" if n is None else f"{n} images per class"
            lines.append(f"With {images} {method} is {place} kd: {ours} against {kd}; {sure}.")
    return lines


def sureness(difference: tables.Difference | None) -> str:
    """What the paired interval says about the sign of a difference."""
    if difference is None or difference.low is None:
        return "without two shared subsets there is no interval, so the sign is open"
    contains = difference.low <= 0 <= difference.high
    return f"paired {difference}, " + ("which contains 0, so the sign is open" if contains else "which excludes 0")


# --- Settings -------------------------------------------------------------------------------------------------------------


def settings_table(results: Sequence[Result]) -> Table:
    """One row per method: what its objective is made of, and each other option in which runs of this table differ."""
    columns: dict[str, Callable[[Result], str | None]] = {
        "loss": lambda r: "ce" if r.method == "ce" else r.config.method.loss,
        "epsilon": lambda r: f"{r.epsilon:g}",
        "gradient through the teacher": lambda r: ("yes" if r.through_teacher else "no") if r.epsilon > 0 else "no gradient",
        "augmentation": lambda r: r.config.augment.name,
    }
    shown = {"method.loss", "method.epsilon", "method.through_teacher", "augment.name"}
    always = ["method.temperature", "method.sobolev_weight", "optimizer.name", "optimizer.learning_rate"]
    others = [name for name in settings.differing([settings.options(r) for r in results]) if name not in {*shown, *always}]
    for name in [*always, *others]:
        columns[settings.short(name)] = lambda r, name=name: option(r, name)
    rows = []
    for method in tables.method_order(r.method for r in results):
        mine = [r for r in results if r.method == method]
        rows.append([word(method), *(word(value_or_values(mine, value)) for value in columns.values())])
    return Table(["method", *columns], rows)


def option(result: Result, name: str) -> str | None:
    """An option in words; None where the run's method does not look at it."""
    found = settings.options(result)
    return settings.written(found[name]) if name in found else None


def value_or_values(results: Sequence[Result], value: Callable[[Result], str | None]) -> str:
    """The value that results share, or each value with the columns that it was used in; a dash where they have none."""
    found = tables.by_value(results, value)
    if len(found) <= 1:
        return next(iter(found), "-")
    return "; ".join(f"{v} ({', '.join(map(tables.size_name, tables.size_order(r.n_per_class for r in rs)))})" for v, rs in found.items())


# --- The same for machines and eyes ---------------------------------------------------------------------------------------


def cell_rows(results: Sequence[Result]) -> list[dict[str, object]]:
    """One row of the CSV file for each cell that was run, in full precision; accuracies in %, differences in points."""
    cells = tables.in_cells(results)
    methods, sizes = tables.method_order(m for m, _ in cells), tables.size_order(n for _, n in cells)
    return [cell_row(cells, m, n) for m in methods for n in sizes if (m, n) in cells]


def cell_row(cells: Cells, method: str, n: int | None) -> dict[str, object]:
    """What there is to say of one cell, by the CSV file's columns; None where there is nothing."""
    runs = cells[method, n]
    row = {"dataset": runs[0].dataset, "track": runs[0].track, "method": method, "n_per_class": tables.size_name(n), "seeds": len(runs)}
    row["epsilon"] = value_or_values(runs, lambda r: f"{r.epsilon:g}")
    row["split"] = value_or_values(runs, lambda r: r.evaluation.split)
    for quantity in ("accuracy", "agreement", "ece"):
        s = tables.percent(runs, quantity)
        row |= {f"{quantity}_mean": s and s.mean, f"{quantity}_sd": s and s.deviation}
    d = None if method == "kd" else tables.paired_difference(runs, cells.get(("kd", n), []))
    row |= {"minus_kd": d and d.mean, "minus_kd_low": d and d.low, "minus_kd_high": d and d.high, "pairs": d and d.count}
    row["published"] = published.ACCURACY.get(runs[0].dataset, {}).get(method, {}).get(n)
    return row


def accuracy_figure(results: Sequence[Result]) -> figures.Figure:
    """Accuracy and differences from kd against images per class; all images stand at their number per class."""
    cells, first = tables.in_cells(results), results[0]
    paper = published.ACCURACY.get(first.dataset, {}).get("wdkd", {})
    whole = max((r.train_size / len(r.evaluation.class_names) for r in results if r.n_per_class is None), default=None)
    known = [n for n in tables.size_order([*(n for _, n in cells), *paper]) if n is not None or whole is not None]
    place = {n: whole if n is None else n for n in known}
    curves, differences = {}, {}
    for index, method in enumerate(tables.method_order([*tables.METHODS, *(m for m, _ in cells)])):
        mine = [(place[n], cells[method, n], cells.get(("kd", n), [])) for n in known if (method, n) in cells]
        means = [(x, tables.percent(runs)) for x, runs, _ in mine]
        # Far below the others as a rule, ce would leave them no room.
        gaps = [(x, d) for x, runs, kd in mine if method not in ("ce", "kd") and (d := tables.paired_difference(runs, kd))]
        if mine:
            curves[index, "ce (no teacher)" if method == "ce" else method] = [(x, s.mean, s.deviation) for x, s in means]
        if gaps:
            differences[index, method] = [(x, d.mean, d.low, d.high) for x, d in gaps]
    return figures.accuracy_figure(
        curves,
        differences,
        ticks={x: f"full\n({x:,.0f})" if n is None else f"{n:,}" for n, x in place.items()},
        teachers=sorted({round(100 * r.teacher_accuracy, 2) for r in results if r.teacher_accuracy is not None}),
        published=[(place[n], accuracy) for n, accuracy in paper.items() if n in place],
        title=f"{first.dataset}, track {first.track}",
        split=" and ".join(tables.by_value(results, lambda r: r.evaluation.split)),
    )
