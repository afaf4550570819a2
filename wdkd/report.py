"""Result files to tables, plots and a page: <dataset>/<track>.md, .csv and .png beside them, and index.html with everything."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.table

from wdkd import comparison, page, published, tables
from wdkd.collection import Collection, TrackReport, collect, matching
from wdkd.document import Bullets, Section
from wdkd.errors import UsageError
from wdkd.files import write_file
from wdkd.result import Result, results_path
from wdkd.tuning import tuning_collection

OTHERS = {
    "long": "long schedule",
    "longer": "longer schedule",
    "stronger": "stronger teacher",
    "stronger_longer": "stronger teacher, longer schedule",
}
"""Directories below the results that hold the same again, of runs that are not to be compared with those: what they are called."""
NOT_RESULTS = ("benchmarks", "teachers", "tuning", *OTHERS)
"""Directories below the results that hold something else."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was made: tables for the terminal, the files written, and the lines of warning that are in them too."""

    tables: list[rich.table.Table]
    paths: list[Path]
    warnings: list[str]


def whole_report(directory: str | os.PathLike = "results", tuning: bool = False) -> Report:
    """Writes the reports on results and on tuning, or those on tuning alone, of the main runs and of `OTHERS`; and index.html.

    The page has all of them in either case. Raises UsageError when there is nothing of the kind asked for.
    """
    root = Path(directory)
    places = {"": root} | {f"{words}: ": root / name for name, words in OTHERS.items() if (root / name).is_dir()}
    found = {name: (main_collection(place), tuning_collection(place)) for name, place in places.items()}
    asked = [named for name, pair in found.items() for named in [(name, pair[0]), (f"{name}tuning: ", pair[1])][tuning:]]
    if not any(collection.tracks for _, collection in asked):
        asked[0][1].require()
    made = [written(collection, name) for name, collection in asked]
    path = write_file(root / "index.html", page.html_page(chapters(found)).encode())
    return Report([t for m in made for t in m.tables], [*(p for m in made for p in m.paths), path], [w for m in made for w in m.warnings])


def chapters(found: Mapping[str, tuple[Collection, Collection]]) -> list[Section]:
    """The page's chapters, one a place: each data set and track with its tuning, and what no other section warns of."""
    made = []
    for name, pair in found.items():
        places = sorted({place for collection in pair for place in collection.tracks})
        sections = [collection.tracks[place].section for place in places for collection in pair if place in collection.tracks]
        stray = Bullets([line for collection in pair for line in collection.stray], warning=True)
        made.append(Section(name.removesuffix(": ").capitalize() or "Results", [stray, *sections]))
    return made


def main_report(directory: str | os.PathLike = "results") -> Report:
    """Writes <dataset>/<track>.md, .csv and .png for every data set and track with results below `directory`.

    Reads <dataset>/<track>/<method>/n<M>/seed<k>.json. A file that cannot be read, or is not the run that its path says,
    is left out and named in a warning. Raises UsageError when nothing is left.
    """
    return written(main_collection(Path(directory)).require())


def tuning_report(directory: str | os.PathLike = "results") -> Report:
    """Writes tuning/<dataset>/<track>.md and .png for the runs below. Raises UsageError when there is none."""
    return written(tuning_collection(Path(directory)).require())


def written(collection: Collection, name: str = "") -> Report:
    """Writes the reports of a collection; `name` goes before what is said of them."""
    shown = [report.table for report in collection.tracks.values()]
    for table in shown:
        table.title = f"{name}{table.title}"
    return Report(shown, collection.write(), [f"{name}{line}" for line in collection.warnings])


def main_collection(root: Path) -> Collection:
    """Reports on the results of runs below a directory."""
    paths = [p for p in matching(root, "*/*/*/n*/seed*.json") if p.relative_to(root).parts[0] not in NOT_RESULTS]
    return collect(root, paths, misplaced, track_report)


def misplaced(where: Path, result: Result) -> str | None:
    """What to say of a result that its path below the results does not describe, if it does not."""
    right = results_path("", result)
    return None if right == where else f"it holds the run {right}; move it there"


def track_report(results: Sequence[Result], warnings: list[str]) -> TrackReport:
    """What is said of the results on one data set and track."""
    lines = [*warnings, *tables.mixed(results)]
    return TrackReport(comparison.section(results, lines), table_for_terminal(results), lines, comparison.cell_rows(results))


def table_for_terminal(results: Sequence[Result]) -> rich.table.Table:
    """The accuracy table of one data set and track, for the terminal. Raises UsageError when there is no result."""
    if not results:
        raise UsageError("a table needs at least 1 result and got 0; run launch/distill.py first")
    first, split = results[0], " and ".join(tables.by_value(results, lambda r: r.evaluation.split))
    paper = published.ACCURACY.get(first.dataset, {})
    title = f"{first.dataset}, {first.track}: {split} accuracy, % (seeds)"
    return tables.rich_table(title, comparison.accuracy_table(tables.in_cells(results), paper))
