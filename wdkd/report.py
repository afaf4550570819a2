"""Result files to tables and plots: <dataset>/<track>.md, .csv and .png beside the results they were made from."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import rich.table

from wdkd import figures, published, tables
from wdkd.errors import UsageError
from wdkd.figures import confusion_figure as confusion_figure
from wdkd.files import write_file
from wdkd.result import Result, results_path
from wdkd.tables import ABSENT, Cells, Groups, Report, Warnings
from wdkd.tuning import tuning_report as tuning_report

NOT_RESULTS = ("benchmarks", "tuning")
"""Directories below the results that hold something else."""


def main_report(directory: str | os.PathLike = "results") -> Report:
    """Writes <dataset>/<track>.md, .csv and .png for every data set and track with results below `directory`.

    Reads <dataset>/<track>/<method>/n<M>/seed<k>.json. A file that cannot be read, or is not the run that its path says,
    is left out and named in a warning. Raises UsageError when nothing is left.
    """
    root = Path(directory)
    groups, warnings = read_results(root)
    paths = []
    for (dataset, track), results in groups.items():
        lines = warnings.setdefault((dataset, track), [])
        lines += tables.mixed(results)
        base = root / dataset / track
        paths += [
            write_file(f"{base}.md", markdown_report(results, lines).encode()),
            write_file(f"{base}.csv", tables.comma_separated(cell_rows(results)).encode()),
            figures.save(accuracy_figure(results), f"{base}.png"),
        ]
    return Report([table_for_terminal(r) for r in groups.values()], paths, [line for lines in warnings.values() for line in lines])


def read_results(root: Path) -> tuple[Groups, Warnings]:
    """The results of runs below a directory, and a warning for each file that had to be left out."""
    paths = [p for p in tables.matching(root, "*/*/*/n*/seed*.json") if p.relative_to(root).parts[0] not in NOT_RESULTS]
    return tables.read_files(root, paths, lambda path, result: None if results_path(root, result) == path else misplaced(root, result))


def misplaced(root: Path, result: Result) -> str:
    """What to say of a result that its path does not describe."""
    return f"it holds the run {results_path(root, result).relative_to(root)}; move it there"


# --- Markdown -----------------------------------------------------------------------------------------------------------


def markdown_report(results: Sequence[Result], warnings: Sequence[str]) -> str:
    """The whole report on one data set and track, as Markdown."""
    cells, first = tables.in_cells(results), results[0]
    ran = tables.method_order(m for m, _ in cells)
    sizes = tables.size_order(n for _, n in cells)
    against = [m for m in ran if m != "kd"]
    split = " and ".join(tables.by_value(results, lambda r: r.evaluation.split))
    parts = [
        f"# {first.dataset}, track {first.track}",
        f"Made by `launch/report.py` from {len(results)} result files; nothing measured is typed by hand.",
        "\n".join(f"- {name}: {value}" for name, value in facts(results).items()),
        "\n".join(f"- **Warning:** {line}" for line in warnings),
        f"## Accuracy on the {split} images, %",
        "Columns: training images per class. Cells: mean ± sample standard deviation (number of seeds).",
        tables.markdown(accuracy_grid(results)),
        "\n".join(f"- {line}" for line in verdicts(cells)),
        published_section(first.dataset),
        "## Paired difference from kd, points",
        "Runs with the same seed and the same subset: mean [95 % t-interval] (number of pairs).",
        tables.markdown(tables.grid(against, sizes, lambda m, n: difference_cell(cells, m, n))),
        "## Agreement with the teacher, %",
        tables.markdown(tables.grid(ran, sizes, lambda m, n: quantity_cell(cells, m, n, "agreement"))),
        "## Expected calibration error, %",
        "15 bins of equal width (Guo et al. 2017).",
        tables.markdown(tables.grid(ran, sizes, lambda m, n: quantity_cell(cells, m, n, "ece"))),
        "## How each method was run",
        tables.markdown(settings_grid(results)),
        f"![accuracy against images per class]({first.track}.png)",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def facts(results: Sequence[Result]) -> dict[str, str]:
    """What holds for the whole table, by name; several values where results are mixed, none where nothing applies."""
    values = {
        "Evaluated on": lambda r: f"{r.evaluation.split} ({r.evaluation.count:,} images)",
        "Teacher": lambda r: r.teacher_hash and f"{teacher_accuracy(r)}, hash {r.teacher_hash}",
        "Student": lambda r: f"{r.model}, {r.parameters:,} parameters, {flops(r)}",
        "Budget": lambda r: f"{r.steps:,} steps of {r.config.train.batch_size} images",
        "Training images in full": lambda r: f"{r.train_size:,}" if r.n_per_class is None else None,
        "Device": lambda r: f"{r.device_count} x {r.device_kind}",
    }
    found = {name: "; ".join(tables.by_value(results, value)) for name, value in values.items()}
    return {name: text for name, text in found.items() if text}


def teacher_accuracy(result: Result) -> str:
    """The teacher's accuracy in words."""
    return "accuracy not known" if result.teacher_accuracy is None else f"accuracy {100 * result.teacher_accuracy:.2f} %"


def flops(result: Result) -> str:
    """The student's cost in words."""
    count = result.forward_flops
    return "FLOPs not counted by the compiler" if count is None else f"{count / 1e6:,.2f} MFLOPs per image (forward)"


def settings_grid(results: Sequence[Result]) -> list[list[str]]:
    """One row per method: loss, epsilon, whether input gradients go through the teacher, augmentation."""
    values = {
        "loss": lambda r: "ce" if r.method == "ce" else r.config.method.loss,
        "epsilon": lambda r: f"{r.epsilon:g}",
        "gradient through the teacher": lambda r: ("yes" if r.through_teacher else "no") if r.epsilon > 0 else "no gradient",
        "augmentation": lambda r: r.config.augment.name,
    }
    rows = []
    for method in tables.method_order(r.method for r in results):
        mine = [r for r in results if r.method == method]
        rows.append([method, *(value_or_values(mine, value) for value in values.values())])
    return [["method", *values], *rows]


def value_or_values(results: Sequence[Result], value: Callable[[Result], str]) -> str:
    """The value that results share, or each value with the columns that it was used in."""
    found = tables.by_value(results, value)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{v} ({', '.join(map(tables.size_name, tables.size_order(r.n_per_class for r in rs)))})" for v, rs in found.items())


def accuracy_grid(results: Sequence[Result]) -> list[list[str]]:
    """The main table as text. Methods of the paper and columns that it has are there even where nothing was run."""
    cells = tables.in_cells(results)
    paper = published.ACCURACY.get(results[0].dataset, {})
    rows = tables.method_order([*tables.METHODS, *(m for m, _ in cells)])
    columns = tables.size_order([*(n for _, n in cells), *(n for row in paper.values() for n in row)])
    return tables.grid(rows, columns, lambda m, n: quantity_cell(cells, m, n, "accuracy"))


def quantity_cell(cells: Cells, method: str, n: int | None, quantity: str) -> str:
    """Mean and spread of a fraction in %; says so where nothing was run, or nothing can be measured (no teacher)."""
    if (method, n) not in cells:
        return ABSENT
    return str(tables.percent(cells[method, n], quantity) or "n/a, no teacher")


def difference_cell(cells: Cells, method: str, n: int | None) -> str:
    """Paired difference from kd; says so where one of the two was not run, or no subset is shared."""
    if (method, n) not in cells or ("kd", n) not in cells:
        return ABSENT if (method, n) not in cells else "n/a, kd not run"
    return str(tables.paired_difference(cells[method, n], cells["kd", n]) or "n/a, no shared subset")


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


def published_section(dataset: str) -> str:
    """The paper's own cells, in a table apart; empty where it has none."""
    paper = published.ACCURACY.get(dataset)
    if paper is None:
        return ""
    columns = tables.size_order(n for row in paper.values() for n in row)
    table = tables.markdown(tables.grid(tables.method_order(paper), columns, lambda m, n: f"{paper[m][n]:.2f}"))
    return (
        f"## Published accuracy on the test images, %\n\nPublished by Kong et al. 2020 ({published.SOURCE}) with networks, optimiser and "
        f'epsilon that are not public, so these are not runs of the networks above; wdkd is the paper\'s "ours".\n\n{table}'
    )


# --- The same for machines, terminals and eyes --------------------------------------------------------------------------


def cell_rows(results: Sequence[Result]) -> list[Mapping[str, object]]:
    """One row of the CSV file for each cell that was run, in full precision; accuracies in %, differences in points."""
    cells, rows = tables.in_cells(results), []
    for method in tables.method_order(m for m, _ in cells):
        for n in tables.size_order(n for m, n in cells if m == method):
            runs = cells[method, n]
            row = {
                "dataset": runs[0].dataset,
                "track": runs[0].track,
                "method": method,
                "n_per_class": tables.size_name(n),
                "seeds": len(runs),
            }
            row["epsilon"] = value_or_values(runs, lambda r: f"{r.epsilon:g}")
            row["split"] = value_or_values(runs, lambda r: r.evaluation.split)
            for quantity in ("accuracy", "agreement", "ece"):
                s = tables.percent(runs, quantity)
                row |= {f"{quantity}_mean": s and s.mean, f"{quantity}_sd": s and s.deviation}
            d = None if method == "kd" else tables.paired_difference(runs, cells.get(("kd", n), []))
            row |= {"minus_kd": d and d.mean, "minus_kd_low": d and d.low, "minus_kd_high": d and d.high, "pairs": d and d.count}
            rows.append(row)
    return rows


def table_for_terminal(results: Sequence[Result]) -> rich.table.Table:
    """The accuracy table of one data set and track, for the terminal. Raises UsageError when there is no result."""
    if not results:
        raise UsageError("a table needs at least 1 result and got 0; run launch/distill.py first")
    split = " and ".join(tables.by_value(results, lambda r: r.evaluation.split))
    return tables.rich_table(f"{results[0].dataset}, {results[0].track}: {split} accuracy, % (seeds)", accuracy_grid(results))


def accuracy_figure(results: Sequence[Result]) -> figures.Figure:
    """Accuracy against images per class; all images stand at their number per class."""
    cells, first = tables.in_cells(results), results[0]
    paper = published.ACCURACY.get(first.dataset, {}).get("wdkd", {})
    whole = max((r.train_size / len(r.evaluation.class_names) for r in results if r.n_per_class is None), default=None)
    known = [n for n in tables.size_order([*(n for _, n in cells), *paper]) if n is not None or whole is not None]
    place = {n: whole if n is None else n for n in known}
    methods = tables.method_order([*tables.METHODS, *(m for m, _ in cells)])
    curves = {}
    for index, method in enumerate(methods):
        points = [(place[n], tables.percent(cells[method, n])) for n in known if (method, n) in cells]
        if points:
            curves[index, method] = [(x, s.mean, s.deviation) for x, s in points]
    return figures.accuracy_figure(
        curves,
        ticks={x: f"full\n({x:,.0f})" if n is None else f"{n:,}" for n, x in place.items()},
        teachers=sorted({round(100 * r.teacher_accuracy, 2) for r in results if r.teacher_accuracy is not None}),
        published=[(place[n], accuracy) for n, accuracy in paper.items() if n in place],
        title=f"{first.dataset}, track {first.track}",
        split=" and ".join(tables.by_value(results, lambda r: r.evaluation.split)),
    )
