"""What a person sees of a sweep: on a terminal a live table of its runs, elsewhere a line as each ends, and now and then the counts."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from wdkd.grid import Job
from wdkd.pool import Outcome
from wdkd.watch import State, Watched, seconds_left

LOOK, REPORT = 1.0, 300.0
"""Seconds between two looks at the runs on a terminal, and between two lines of counts elsewhere."""
IDLE = 20
"""A look at many runs on a slow file system is followed by so many times its length without one."""
FAILURES = 3
"""Lines about failures that are shown below the table."""
SEEDS = 5
"""Most seeds in a cell of the table that are shown one by one."""
FRAME = 5 + FAILURES
"""Lines of the table that are no row: its head, counts, legend, failures, and the line of the cursor."""

MARKS: dict[State, tuple[str, str]] = {
    "done": ("ok", "green"),
    "running": ("%", "cyan"),
    "elsewhere": ("=", "magenta"),
    "failed": ("X", "bold red"),
    "stopped": ("-", "yellow"),
    "waiting": (".", "dim"),
}
"""How a run's state is shown, and in which style. ASCII, as not every terminal has more."""
LEGEND = "ok done   37% running   =37% in other hands   X failed   - stopped   . waiting"


class Screen:
    """stderr, on which nothing depends: that its disk is full, or its terminal gone, is no reason to end a sweep."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed, or cannot show a character.
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Board:
    """Shows the runs of a sweep for as long as it is entered; `take` tells it how they end. A thread looks at them meanwhile."""

    def __init__(self, jobs: Sequence[Job], console: Console | None = None) -> None:
        self._console = console or Console(file=Screen())
        self._runs = [Watched(job) for job in jobs]
        self._failures: collections.deque[str] = collections.deque(maxlen=FAILURES)
        self._began, self._over = time.monotonic(), threading.Event()
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False) if live else None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._over.set()
        self._thread.join()
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            self._live.stop()

    def take(self, index: int, outcome: Outcome, *, say: bool = True) -> None:
        """Notes the outcome of a job, and says it unless it is known."""
        run = self._runs[index]
        run.take(outcome)
        words = {"done": "", "busy": "tried again at the end, ", "lost": "run again, "}.get(outcome.kind, f"{outcome.kind}, ")
        if self._live is None and say:
            self._console.print(f"{run.job.workdir}: {words}{outcome.text}", highlight=False, markup=False, soft_wrap=True)
        elif say and outcome.kind in ("failed", "lost"):
            self._failures.append(f"{run.job.workdir.relative_to(run.job.root)}: {words}{outcome.text}")

    def _watch(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            began = time.monotonic()
            for run in self._runs:
                run.look()
            if self._live is not None:
                self._live.update(self.table(), refresh=True)
            elif pause:
                self._console.print(self.counts(), highlight=False, markup=False, soft_wrap=True)
            pause = max(REPORT if self._live is None else LOOK, IDLE * (time.monotonic() - began))

    # --- what is shown

    def counts(self) -> str:
        """How many runs are in which state, and the time, on one line."""
        count = collections.Counter(run.state for run in self._runs)
        words = {"elsewhere": "in other hands"}
        others = [f"{count[state]} {words.get(state, state)}" for state in MARKS if state != "done" and count[state]]
        left = seconds_left(self._runs) if count["waiting"] + count["running"] else None
        return ", ".join(
            [f"{count['done']} of {len(self._runs)} runs are done", *others]
            + [f"after {duration(time.monotonic() - self._began)}"]
            + ([] if left is None else [f"about {duration(left)} left"])
        )

    def table(self) -> RenderableType:
        """All runs, in no more lines than the console has: a row for each method on a data set, a column for each number of images."""
        rows: dict[tuple[str, ...], list[Watched]] = {}
        for run in self._runs:
            rows.setdefault(_row(run), []).append(run)
        sizes = sorted({run.job.config.data.n_per_class for run in self._runs}, key=lambda n: (n is None, n))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("images per class")
        for n in sizes:
            table.add_column(str(n or "all"), no_wrap=True)
        shown = _most_telling(rows, max(self._console.height - FRAME, 1))
        common = len({root for root, *_ in rows}) == 1
        for row in shown:
            cells = [_cell([run for run in rows[row] if run.job.config.data.n_per_class == n]) for n in sizes]
            table.add_row(_line(" ".join(row[1:] if common else row)), *cells)
        if len(shown) < len(rows):
            rest = [run for row in rows if row not in shown for run in rows[row]]
            cells = [_counted([run for run in rest if run.job.config.data.n_per_class == n]) for n in sizes]
            table.add_row(_line(f"{len(rows) - len(shown)} more rows", "dim"), *cells)
        failures = [_line(line, "red") for line in list(self._failures)]
        return Group(table, _line(self.counts()), _line(LEGEND, "dim"), *failures)


def _row(run: Watched) -> tuple[str, ...]:
    """The directory of all runs, data set, augmentation, and method with what else is tried."""
    job = run.job
    return str(job.root), job.config.data.dataset, job.config.augment.name, job.variant


def _most_telling(rows: dict[tuple[str, ...], list[Watched]], most: int) -> list[tuple[str, ...]]:
    """The rows if they fit, else, in their order, those that something is going on in, and then those that are next; one line is kept."""
    if len(rows) <= most:
        return list(rows)

    def rank(row: tuple[str, ...]) -> int:
        states = {run.state for run in rows[row]}
        return 0 if "running" in states else 1 if states & {"failed", "elsewhere"} else 3 if states <= {"done"} else 2

    chosen = sorted(rows, key=rank)[: most - 1]
    return [row for row in rows if row in chosen]


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _cell(runs: Sequence[Watched]) -> Text:
    """The seeds of a cell one by one, or counted where they are many."""
    if len(runs) > SEEDS:
        return _counted(runs)
    return Text(" ").join(Text(_mark(run), style=MARKS[run.state][1]) for run in runs)


def _mark(run: Watched) -> str:
    percent = f"{100 * run.fraction:.0f}%"
    return {"running": percent, "elsewhere": f"={percent}"}.get(run.state, MARKS[run.state][0])


def _counted(runs: Sequence[Watched]) -> Text:
    count = collections.Counter(run.state for run in runs)
    return Text(" ").join(Text(f"{count[state]}{mark}", style=style) for state, (mark, style) in MARKS.items() if count[state])


def duration(seconds: float) -> str:
    """A time in words, to two places: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
