"""Results put in cells: mean and spread, paired differences, what must not be mixed; and tables of them."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.markup
import rich.table
import rich.text
import scipy.special

from wdkd.document import Cell, Table, word
from wdkd.result import Result

METHODS = ("ce", "kd", "fitnet", "ab", "wdkd", "sobolev")
"""Order of the rows; other methods follow alphabetically."""
ABSENT = Cell("not run", None, "absent")

Cells = Mapping[tuple[str, int | None], list[Result]]
"""The results of one data set and track by (method, images per class)."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean of a quantity over seeds, its sample standard deviation (None for one seed) and the number of seeds."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.count})" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f} ({self.count})"


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean paired difference in points and its 95 % t-interval; None for the bounds when there is one pair."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        return (
            f"{self.mean:+.2f} [n/a, 1 seed]"
            if self.low is None
            else f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}] ({self.count})"
        )


def summary(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation (n - 1) of at least one value, in the values' own unit."""
    values = np.asarray(list(values), np.float64)
    return Summary(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values))


def percent(results: Iterable[Result], quantity: str = "accuracy") -> Summary | None:
    """Summary in % of a field of Evaluation that is a fraction; None when no result has it."""
    values = [getattr(r.evaluation, quantity) for r in results]
    present = [100 * v for v in values if v is not None]
    return summary(present) if present else None


def paired_difference(results: Sequence[Result], base: Sequence[Result]) -> Difference | None:
    """Accuracy less that of `base` in points, over the runs of both with the same seed and the same subset.

    mean +- t(0.975, k-1) s / sqrt(k) for k pairs with sample standard deviation s of the differences. None without pairs.
    """
    partner = {(r.seed, r.subset_hash): r.evaluation.accuracy for r in base}
    keys = [(r.seed, r.subset_hash) for r in results]
    found = [100 * (r.evaluation.accuracy - partner[k]) for r, k in zip(results, keys, strict=True) if k in partner]
    if not found:
        return None
    s = summary(found)
    if s.deviation is None:
        return Difference(s.mean, None, None, 1)
    half = float(scipy.special.stdtrit(s.count - 1, 0.975)) * s.deviation / math.sqrt(s.count)
    return Difference(s.mean, s.mean - half, s.mean + half, s.count)


def in_cells(results: Iterable[Result]) -> dict[tuple[str, int | None], list[Result]]:
    """Results by (method, images per class), each cell in the order of seeds."""
    cells: dict[tuple[str, int | None], list[Result]] = {}
    for r in sorted(results, key=lambda r: r.seed):
        cells.setdefault((r.method, r.n_per_class), []).append(r)
    return cells


def method_order(methods: Iterable[str]) -> list[str]:
    """The methods, known ones in the order of METHODS, then the others alphabetically."""
    methods = set(methods)
    return [m for m in METHODS if m in methods] + sorted(methods - set(METHODS))


def size_order(sizes: Iterable[int | None]) -> list[int | None]:
    """Images per class ascending, then None (all of them)."""
    return sorted(set(sizes), key=lambda n: math.inf if n is None else n)


def size_name(n: int | None) -> str:
    """A column's heading."""
    return "full" if n is None else str(n)


def run_size(n: int | None) -> str:
    """A size inside a sentence."""
    return "full" if n is None else f"n{n}"


def grid(rows: Sequence[str], columns: Sequence[int | None], cell: Callable[[str, int | None], Cell]) -> Table:
    """A table with one row per method and one column per number of images per class."""
    return Table(["method", *map(size_name, columns)], [[word(row), *(cell(row, column) for column in columns)] for row in rows])


def rich_table(title: str, table: Table) -> rich.table.Table:
    """A table for the terminal."""
    drawn = rich.table.Table(title=title)
    for name in table.head:
        drawn.add_column(rich.markup.escape(name), overflow="fold")
    styles = {"absent": "dim", "published": "italic dim", "best": "bold"}
    for row in (*table.rows, *table.foot):
        drawn.add_row(*(rich.text.Text(cell.text, styles.get(cell.kind, "")) for cell in row))
    return drawn


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV text with a heading; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# --- What was compared with what ----------------------------------------------------------------------------------------

COMPARED: Mapping[str, Callable[[Result], str | None]] = {
    "student": lambda r: f"{r.model} with {r.parameters:,} parameters",
    "steps": lambda r: f"{r.steps:,} steps of {r.config.train.batch_size} images",
    "teacher hash": lambda r: r.teacher_hash,
    "evaluated split": lambda r: r.evaluation.split,
}
"""What all results of one table must share to be comparable; None where it does not apply."""


def by_value(results: Iterable[Result], value: Callable[[Result], str | None]) -> dict[str, list[Result]]:
    """Results by a value that they have, the most frequent value first; those for which it is None are left out."""
    found: dict[str, list[Result]] = {}
    for r in results:
        if (v := value(r)) is not None:
            found.setdefault(v, []).append(r)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def runs(results: Iterable[Result]) -> str:
    """Names runs briefly: 'kd n50 seeds 0, 1; wdkd full seed 0'."""
    cells = in_cells(results)
    names = []
    for method in method_order(m for m, _ in cells):
        for n in size_order(n for m, n in cells if m == method):
            seeds = ", ".join(str(r.seed) for r in cells[method, n])
            names.append(f"{method} {run_size(n)} seed{'s' if ',' in seeds else ''} {seeds}")
    return "; ".join(names)


def mixed(results: Sequence[Result]) -> list[str]:
    """One line for each thing that should be the same in all results and is not, naming the runs that differ."""
    lines = []
    for name, value in COMPARED.items():
        most, *others = by_value(results, value).items() or [(None, [])]
        if others:
            found = "; ".join(f"{v} in [{runs(rs)}]" for v, rs in others)
            lines.append(f"results that differ in {name} are mixed here: {most[0]} in most, but {found}")
    return lines
