"""A sweep's runs as they look from outside, whichever process is at them, and how long what is left of them may take."""

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from wdkd import lock
from wdkd.errors import UsageError
from wdkd.files import open_regular, parse_json
from wdkd.grid import Job
from wdkd.pool import Outcome
from wdkd.result import read_result

State = Literal["waiting", "running", "done", "failed", "stopped", "elsewhere"]
Kind = tuple[str, str]
"""Data set and method: runs of one kind take about as long."""
TAIL = 8192
"""Bytes at the end of a file of metrics that have its last line, which is a few hundred long."""
LEAST_PACE = 0.02
"""Share of a run from which on its pace tells how long all of it takes."""


class Watched:
    """A run of a sweep: what its lock and its metrics say, which all processes on its file system see, and its outcome here."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outcome: Outcome | None = None
        self.seconds: float | None = None
        """What all of it took, once it is done."""
        self.step = last_step(job.workdir / "metrics.jsonl")
        # A process that was killed leaves its lock as it was, so only one taken from now on says that the run is at work.
        self._lock = self._past = _mark(job.workdir)
        self._first: tuple[float, float] | None = None

    @property
    def kind(self) -> Kind:
        return self.job.config.data.dataset, self.job.config.method.name

    @property
    def state(self) -> State:
        """`elsewhere`: in the hands of another process when it was tried here."""
        kind = self.outcome.kind if self.outcome else None
        if kind in ("done", "failed", "stopped"):
            return kind
        if self._lock not in (None, self._past):
            return "running"
        return "elsewhere" if kind == "busy" and self._lock is not None else "waiting"

    @property
    def fraction(self) -> float:
        """Share of the steps that are done."""
        steps = self.job.config.train.steps
        return 1.0 if self.state == "done" else min(self.step, steps) / steps

    @property
    def pace(self) -> float | None:
        """Seconds that all of the run would take as it goes now; None as long as that cannot be told."""
        if self._first is None or self.state != "running":
            return None
        began, before = self._first
        gone = self.fraction - before
        return (time.monotonic() - began) / gone if gone >= LEAST_PACE else None

    def look(self) -> None:
        """Looks at its files again, if it is not over. Costs a look at the lock, and at the end of the metrics of a run at work."""
        if self.state in ("done", "failed", "stopped"):
            return
        self._lock = _mark(self.job.workdir)
        if self.state == "waiting":
            self._first = None
            return
        self.step = last_step(self.job.workdir / "metrics.jsonl")
        self._first = self._first or (time.monotonic(), self.fraction)

    def take(self, outcome: Outcome) -> None:
        """Notes how it ended here."""
        if outcome.kind == "done":
            with contextlib.suppress(UsageError):
                self.seconds = read_result(self.job.workdir / "result.json").wall_seconds
        self._lock = self._past = _mark(self.job.workdir)
        self.outcome = outcome


def _mark(workdir: Path) -> int | None:
    """When the lock of a run was taken, by its file system's clock; None where nobody holds it."""
    try:
        found = (workdir / lock.NAME).stat()
    except OSError:
        return None
    return found.st_mtime_ns if found.st_size else None


def last_step(path: Path) -> int:
    """The step of the last line of a run's metrics, 0 where there is none. Reads no more than the file's end."""
    try:
        with open_regular(path) as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
            lines = file.read(TAIL).splitlines()
    except (OSError, UsageError):
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # It is just being written, or begins before what was read.
            step = parse_json(line)["step"]
            if type(step) is int and step > 0:
                return step
    return 0


def seconds_left(runs: Sequence[Watched]) -> float | None:
    """How long what waits or runs may take with as many at a time as now; None as long as nothing tells.

    A run takes what finished ones of the same data set and method took, on average; where there is none, what those at work are
    going to take, then what all finished ones took, then what all at work are going to take.
    """
    states = [run.state for run in runs]
    finished, working = _means((run.kind, run.seconds) for run in runs), _means((run.kind, run.pace) for run in runs)
    left, longest = 0.0, 0.0
    for run, state in zip(runs, states, strict=True):
        if state not in ("waiting", "running"):
            continue
        seconds = finished.get(run.kind) or working.get(run.kind) or finished.get(None) or working.get(None)
        if seconds is None:
            return None
        needed = seconds * (1 - run.fraction)
        left += needed
        longest = max(longest, needed if state == "running" else 0.0)
    return max(left / max(states.count("running"), 1), longest)


def _means(known: Iterable[tuple[Kind, float | None]]) -> dict[Kind | None, float]:
    """The mean of each kind, and of all, under None."""
    seconds: dict[Kind | None, list[float]] = {}
    for kind, value in known:
        if value is not None:
            seconds.setdefault(kind, []).append(value)
            seconds.setdefault(None, []).append(value)
    return {kind: fmean(values) for kind, values in seconds.items()}
