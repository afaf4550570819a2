"""What a person sees of a run, and what is kept of it: a progress bar, metrics.jsonl, TensorBoard events."""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wdkd.config import TrainConfig
from wdkd.errors import Diverged, UsageError
from wdkd.files import parse_json, read_file, write_file, writing

Item = TypeVar("Item")
MAX_METRICS = 2**30
"""Bytes of the largest metrics.jsonl that is read: some million lines."""


class Recorder:
    """Writes one line of metrics per call of `log`. A context manager; None as directory keeps nothing.

    A resumed run first drops the lines of steps after `start`, which it will write again.

    Raises:
      UsageError: from every method, where the disk cannot be written.
    """

    def __init__(self, directory: Path | None, *, title: str, start: int, steps: int, show: bool) -> None:
        self._lines = None if directory is None else Lines(directory / "metrics.jsonl", start)
        self._events = None if directory is None else Events(directory / "events", start)
        self._bar = _Bar(title, start, steps) if show and sys.stderr.isatty() else _Tenths(title, start, steps) if show else None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: Any) -> None:
        for part in (self._bar, self._lines, self._events):
            if part is not None:
                part.close()

    def log(self, step: int, metrics: dict[str, float], *, examples_per_second: float) -> None:
        """Records the metrics after `step` steps; values that were not computed, or are not finite, are left out."""
        known = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._lines is not None:
            self._lines.write(step, known)
            self._events.write(step, known)
        if self._bar is not None:
            self._bar.show(step, known, examples_per_second)

    def secure(self) -> None:
        """Has what was recorded on the disk, so that a checkpoint that is saved next is never ahead of it."""
        if self._lines is not None:
            self._lines.secure()


class Log:
    """What becomes of a step's metrics. They are fetched one call late, so that the device never waits for the host."""

    def __init__(self, recorder: Recorder, config: TrainConfig, step: int, max_skipped: int = 0) -> None:
        self._recorder, self._config, self._step, self._max_skipped = recorder, config, step, max_skipped
        self._clock = Clock(config.batch_size)
        self._pending: dict[str, jax.Array] | None = None
        self._objectives: list[float] = []
        self.wish = 0
        """What the processes agreed on in the last call that was looked at (`steps.Draw`)."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self._clock.rate

    def add(self, measured: dict[str, jax.Array]) -> None:
        """Takes the metrics (steps,) of a call, and looks at those of the call before."""
        self.flush()
        self._pending = measured

    def flush(self) -> None:
        """Stops the run at a value that is not finite; records the metrics every `log_every` steps."""
        if self._pending is None:
            return
        fetched = {name: np.asarray(values) for name, values in self._pending.items()}
        self._pending = None
        self._clock.tick(len(fetched["objective"]))
        self.wish = int(fetched.pop("wish", np.zeros(1)).max())
        # Every replica sees the same values, so all processes stop together.
        for place in range(len(fetched["objective"])):
            self._step += 1
            self.look({name: float(values[place]) for name, values in fetched.items()})

    def look(self, values: dict[str, float]) -> None:
        """Raises Diverged where a value is not finite, unless the step was skipped and that is allowed."""
        parameters = values.pop("finite_parameters", True)
        bad = [f"{name} is {values[name]}" for name in ("objective", "gradient_norm") if not math.isfinite(values[name])]
        bad += [] if parameters else ["a parameter is not finite"]
        if bad and values.get("skipped", math.inf) > self._max_skipped:
            after = f", after {self._max_skipped} skipped updates" if self._max_skipped else ""
            raise Diverged(f"{bad[0]} at step {self._step}{after}; lower optimizer.learning_rate or method.epsilon", self._step)
        if not bad:
            self._objectives.append(values["objective"])
        if self._step % self._config.log_every == 0 or self._step == self._config.steps:
            self._recorder.log(self._step, values, examples_per_second=self.rate)

    def secure(self) -> float | None:
        """Looks at what is pending and has it on the disk. Returns the mean objective since the last call of this, None of no step."""
        self.flush()
        self._recorder.secure()
        objectives, self._objectives = self._objectives, []
        return sum(objectives) / len(objectives) if objectives else None


class Clock:
    """Images per second since the second call; the first one compiles."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self._steps, self._first, self._began = batch_size, 0, 0, 0.0

    def tick(self, steps: int) -> None:
        """Counts the steps of a call that has finished."""
        if self._first == 0:
            self._began, self._first = time.monotonic(), steps
        self._steps += steps

    @property
    def rate(self) -> float:
        timed = self._steps - self._first
        return timed * self._batch_size / max(time.monotonic() - self._began, 1e-9)


def track(steps: Iterable[Item], *, title: str, total: int, show: bool) -> Iterator[Item]:
    """The steps one by one, with a bar on stderr that says how much is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        yield from progress.track(steps, total=total, description=title)


class Lines:
    """A file of one JSON object per step. Opening it again drops the steps after `start`, and what is no such line."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        write_file(path, b"".join(line for _, line in read_lines(path, start)))
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with writing(self._path):
            self._file.write(f"{json.dumps({'step': step, **metrics})}\n".encode())

    def secure(self) -> None:
        """Has the lines on the disk. Raises UsageError also where the file is no longer there: all that is written would be lost."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                raise UsageError(f"{self._path} was replaced while this run was writing it; the same command goes on with what is there")

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path, last: int) -> list[tuple[int, bytes]]:
    """(step, line) of the metrics in a file, in the order of their steps, up to `last`; what a killed run left half is left out."""
    try:
        content = read_file(path, MAX_METRICS)
    except FileNotFoundError:
        return []
    kept: list[tuple[int, bytes]] = []
    before = 0
    for line in content.splitlines(keepends=True):
        step = _step(line)
        if step is not None and before < step <= last and line.endswith(b"\n"):
            kept.append((step, line))
            before = step
    return kept


def _step(line: bytes) -> int | None:
    """The step of a line, or None where it is not one."""
    try:
        step = parse_json(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


class Events:
    """The same for TensorBoard. Written by this thread, so that a full disk is heard of: tensorboardX's own writer would hang."""

    def __init__(self, directory: Path, start: int) -> None:
        self._directory, self._start = directory, start
        self._writer: Any = None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        EventsWriter, Event, SessionLog, Summary = _tensorboard()
        with writing(self._directory):
            if self._writer is None:
                self._directory.mkdir(exist_ok=True)
                self._writer = EventsWriter(str(self._directory / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
                # Has TensorBoard forget the steps after the checkpoint that this call went on from.
                started = Event(wall_time=time.time(), step=self._start + 1, session_log=SessionLog(status=SessionLog.START))
                self._writer.write_event(started)
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with writing(self._directory):
                self._writer.close()


@functools.cache
def _tensorboard() -> tuple[Any, Any, Any, Any]:
    """What events are made of. tensorboardX would import torch where that is installed, for what is not used here: a second or two."""
    with _not_found("torch"):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

    return EventsWriter, Event, SessionLog, Summary


@contextlib.contextmanager
def _not_found(package: str) -> Iterator[None]:
    """Imports of the package fail as where it is not installed, unless it is imported already."""
    imported = package in sys.modules
    sys.modules.setdefault(package, None)
    try:
        yield
    finally:
        if not imported:
            del sys.modules[package]


class _Bar:
    """A live bar, for terminals."""

    def __init__(self, title: str, start: int, steps: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=steps, completed=start, text="compiling")
        self._progress.start()

    def show(self, step: int, metrics: dict[str, float], rate: float) -> None:
        self._progress.update(self._task, completed=step, text=_text(metrics, rate))

    def close(self) -> None:
        self._progress.stop()


class _Tenths:
    """A line per tenth of the run, for log files."""

    def __init__(self, title: str, start: int, steps: int) -> None:
        self._title, self._steps, self._start = title, steps, start
        self._tenth, self._began = start * 10 // steps, time.monotonic()

    def show(self, step: int, metrics: dict[str, float], rate: float) -> None:
        if step * 10 // self._steps > self._tenth:
            self._tenth = step * 10 // self._steps
            left = (time.monotonic() - self._began) / (step - self._start) * (self._steps - step)
            print(f"{self._title} {step}/{self._steps} {_text(metrics, rate)} {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _text(metrics: dict[str, float], rate: float) -> str:
    names = {"loss": "loss", "input_gradient_norm": "‖∇ₓℓ‖", "gradient_norm": "‖∇θ‖"}
    shown = [f"{label} {metrics[name]:.4g}" for name, label in names.items() if name in metrics]
    return " ".join([*shown, f"{rate:.0f} images/s"])
