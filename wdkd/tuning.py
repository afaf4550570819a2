"""Validation accuracy against epsilon: which radius each method, loss and number of images is best served by."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from wdkd import figures, tables
from wdkd.config import to_dict
from wdkd.files import write_file
from wdkd.result import Result
from wdkd.tables import ABSENT, Report

Row = tuple[int | None, str, str, str]
"""Images per class, method, loss, and the other options that differ between rows."""
Radii = Mapping[float, list[Result]]
"""The results of one row by epsilon, ascending."""

NOT_SETTINGS = ("data.n_per_class", "data.data_dir", "method.name", "method.loss", "method.epsilon", "teacher", "seed")
"""Options that are a row, a column or an average already, or that name a place and not a choice."""


def tuning_report(directory: str | os.PathLike = "results") -> Report:
    """Writes tuning/<dataset>/<track>.md and .png for the runs in tuning/<dataset>/<track>/ below `directory`.

    Every JSON file there, at any depth, is one run evaluated on the validation split; the radius chosen for a row has the
    best mean over seeds. A run evaluated on another split is left out, because choosing by it would be tuning on the test
    set. Left out and named too: files that cannot be read. Raises UsageError when nothing is left.
    """
    root = Path(directory) / "tuning"
    paths = tables.matching(root, "*/*/**/*.json")
    groups, warnings = tables.read_files(root, paths, lambda path, result: objection(path.relative_to(root), result))
    shown, paths = [], []
    for (dataset, track), results in groups.items():
        rows = by_row(results)
        lines = warnings.setdefault((dataset, track), [])
        lines += tables.mixed(results) + doubts(rows)
        title = f"{dataset}, {track}: validation accuracy by epsilon, % (seeds)"
        base = root / dataset / track
        paths.append(write_file(f"{base}.md", markdown_report(title, f"{track}.png", rows, lines).encode()))
        paths.append(figures.save(radius_figure(f"{dataset}, track {track}", rows), f"{base}.png"))
        shown.append(tables.rich_table(title, radius_grid(rows)))
    return Report(shown, paths, [line for lines in warnings.values() for line in lines])


def objection(where: Path, result: Result) -> str | None:
    """Why a run at <dataset>/<track>/... may not be tuned by, if it may not."""
    if where.parts[:2] != (result.dataset, result.track):
        return f"it holds a run of {result.dataset}/{result.track}; move it there"
    split = result.evaluation.split
    return None if split == "validation" else f"it was evaluated on {split}; run it again with --data.evaluate-on validation"


def by_row(results: Sequence[Result]) -> dict[Row, Radii]:
    """Results by row and then by epsilon; runs that differ in another option are put in rows of their own."""
    basic: dict[tuple[int | None, str, str], list[Result]] = {}
    for r in results:
        basic.setdefault((r.n_per_class, r.method, "ce" if r.method == "ce" else r.config.method.loss), []).append(r)
    rows: dict[Row, dict[float, list[Result]]] = {}
    for n in tables.size_order(n for n, _, _ in basic):
        for method in tables.method_order(m for _, m, _ in basic):
            for loss in sorted(k[2] for k in basic if k[:2] == (n, method)):
                mine = basic[n, method, loss]
                for r, setting in sorted(zip(mine, settings(mine), strict=True), key=lambda pair: (pair[1], pair[0].epsilon, pair[0].seed)):
                    rows.setdefault((n, method, loss, setting), {}).setdefault(r.epsilon, []).append(r)
    return rows


def settings(results: Sequence[Result]) -> list[str]:
    """For each result, the options in which not all of them agree, as 'name=value, ...'; empty when all do."""
    options = [dict(flat(to_dict(r.config))) for r in results]
    differing = [k for k in options[0] if k not in NOT_SETTINGS and any(o[k] != options[0][k] for o in options)]
    return [", ".join(f"{k}={o[k]}" for k in differing) for o in options]


def flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Nested dictionaries as pairs of dotted name and value."""
    pairs = []
    for name, value in values.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


def chosen(radii: Radii) -> float:
    """The epsilon of the best mean accuracy; the smallest of equally good ones."""
    means = {epsilon: tables.percent(results).mean for epsilon, results in radii.items()}
    return min(means, key=lambda epsilon: (-means[epsilon], epsilon))


def doubts(rows: Mapping[Row, Radii]) -> list[str]:
    """Lines about rows whose choice rests on unequal or repeated seeds, or lies at the end of what was tried."""
    lines = []
    for row, radii in rows.items():
        seeds = {epsilon: [r.seed for r in results] for epsilon, results in radii.items()}
        name = label(row, size=True)
        if any(len(set(s)) < len(s) for s in seeds.values()):
            lines.append(f"{name}: some runs are there twice (same epsilon and seed) and count twice")
        elif len({tuple(s) for s in seeds.values()}) > 1:
            lines.append(f"{name}: not every epsilon was run with the same seeds, so the means are of different subsets")
        if len(radii) > 1 and chosen(radii) == max(radii):
            lines.append(f"{name}: the chosen epsilon {max(radii):g} is the largest that was tried; try larger ones")
    return lines


def label(row: Row, size: bool = False) -> str:
    """A row in words."""
    n, method, loss, setting = row
    images = [tables.run_size(n)] if size else []
    return " ".join(part for part in (*images, method, loss, setting) if part)


def radius_grid(rows: Mapping[Row, Radii]) -> list[list[str]]:
    """The table as text: a row each, a column for each epsilon, and the chosen one."""
    epsilons = sorted({epsilon for radii in rows.values() for epsilon in radii})
    text = [["images per class", "method", "loss", "other options", *(f"{e:g}" for e in epsilons), "chosen epsilon"]]
    for (n, method, loss, setting), radii in rows.items():
        means = [str(tables.percent(radii[e])) if e in radii else ABSENT for e in epsilons]
        text.append([tables.size_name(n), method, loss, setting or "-", *means, f"{chosen(radii):g}"])
    return text


def markdown_report(title: str, image: str, rows: Mapping[Row, Radii], warnings: Sequence[str]) -> str:
    """The whole report on one data set and track, as Markdown; `image` is the file name of its plot."""
    parts = [
        f"# {title}",
        "Made by `launch/report.py --tuning True`. Columns: epsilon, in units of pixels in [0, 1]. Cells: mean ± sample standard deviation "
        "(number of seeds) on the validation images, which no training subset contains.",
        "\n".join(f"- **Warning:** {line}" for line in warnings),
        tables.markdown(radius_grid(rows)),
        f"![validation accuracy against epsilon]({image})",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def radius_figure(title: str, rows: Mapping[Row, Radii]) -> figures.Figure:
    """Accuracy against epsilon, one panel for each number of images per class, one style for each label."""
    styles = {name: index for index, name in enumerate(dict.fromkeys(label(row) for row in rows))}
    panels: dict[str, dict] = {}
    for row, radii in rows.items():
        heading = "all images" if row[0] is None else f"{row[0]} images per class"
        means = [(epsilon, tables.percent(results)) for epsilon, results in radii.items()]
        curve = [(epsilon, s.mean, s.deviation) for epsilon, s in means]
        panels.setdefault(heading, {})[styles[label(row)], label(row)] = (curve, chosen(radii))
    return figures.epsilon_figure(panels, title, "validation")
