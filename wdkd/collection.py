"""What lies below a directory of results: files read by data set and track, what had to be left out, and reports on each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table

from wdkd import figures
from wdkd.document import Section, markdown, plots
from wdkd.errors import UsageError
from wdkd.files import write_file
from wdkd.result import Result, read_result
from wdkd.tables import comma_separated
from wdkd.wording import shown


@dataclasses.dataclass(frozen=True)
class TrackReport:
    """What is said of one data set and track."""

    section: Section
    table: rich.table.Table
    """Its main table, for the terminal."""
    warnings: Sequence[str]
    """The lines of warning that are in the section."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Of the CSV file; none: there is no such file."""


@dataclasses.dataclass(frozen=True)
class Collection:
    """The reports below a directory, by <dataset>/<track>, and warnings of places in which no result was usable."""

    root: Path
    files: int
    tracks: Mapping[str, TrackReport]
    stray: Sequence[str]

    @property
    def warnings(self) -> list[str]:
        """All lines of warning, each with the place that it is about."""
        lines = [(place, line) for place, report in self.tracks.items() for line in report.warnings]
        return [line if line.startswith(place) else f"{place}: {line}" for place, line in lines] + list(self.stray)

    def require(self) -> "Collection":
        """Itself. Raises UsageError where there is no usable result."""
        if not self.tracks:
            found = f"{self.files} result files, none usable ({self.stray[0]})" if self.files else "no result files"
            where = shown(self.root, 300)
            raise UsageError(f"{where} holds {found}; run launch/distill.py or launch/sweep.py, or give another --results DIR")
        return self

    def write(self) -> list[Path]:
        """Writes each track's Markdown, CSV and plots, where it has them. Returns their paths."""
        paths = []
        for place, report in self.tracks.items():
            base = self.root / place
            paths.append(write_file(f"{base}.md", markdown(report.section).encode()))
            if report.rows:
                paths.append(write_file(f"{base}.csv", comma_separated(report.rows).encode()))
            paths += [figures.save(plot.draw(), base.with_name(plot.file)) for plot in plots(report.section)]
        return paths


def collect(
    root: Path,
    paths: Sequence[Path],
    objection: Callable[[Path, Result], str | None],
    report: Callable[[Sequence[Result], list[str]], TrackReport],
) -> Collection:
    """Reads result files by the first two directories below `root`, and lets `report` say what there is to say of each two.

    `objection` may reject a result, at a path below `root`. What cannot be read, diverged or was rejected is named in a warning.
    Of the results, what no table shows is left out: there may be many.
    """
    groups: dict[str, list[Result]] = {}
    warnings: dict[str, list[str]] = {}
    for path in paths:
        where = path.relative_to(root)
        place = "/".join(where.parts[:2])
        try:
            result = read_result(path)
            reason = _unusable(result) or objection(where, result)
        except UsageError as error:
            reason = str(error).replace(shown(path, 300), shown(where, 300))
        if reason is None:
            groups.setdefault(place, []).append(without_matrix(result))
        else:
            warnings.setdefault(place, []).append(f"{shown(where, 300)} is left out: {reason}")
    tracks = {place: report(results, warnings.pop(place, [])) for place, results in groups.items()}
    return Collection(root, len(paths), tracks, [line for lines in warnings.values() for line in lines])


def _unusable(result: Result) -> str | None:
    """Why a result is in no table, whatever the table, if it is in none."""
    if result.evaluation is None:
        return f"it diverged: {result.reason}"
    if result.evaluation.accuracy is None:
        return f"its images have no labels, so there is no accuracy, but agreement with the teacher of {result.evaluation.agreement:.2%}"
    return None


def without_matrix(result: Result) -> Result:
    """The result without what it has for every class."""
    return dataclasses.replace(result, evaluation=dataclasses.replace(result.evaluation, per_class_accuracy=[], confusion=[]))


def matching(root: Path, pattern: str) -> list[Path]:
    """The paths below a directory that match. Raises UsageError where it cannot be listed."""
    try:
        return sorted(root.glob(pattern))
    except OSError as error:
        raise UsageError(f"{shown(error.filename or root, 300)} cannot be read: {error.strerror}; restore it or its permissions") from error
