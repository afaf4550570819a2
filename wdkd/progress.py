"""What a person sees of a run, and what is kept of it: a progress bar, metrics.jsonl, TensorBoard events."""

import json
import math
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
from wdkd.errors import UsageError

Item = TypeVar("Item")


class Recorder:
    """Writes one line of metrics per call of `log`. A context manager; None as directory keeps nothing.

    A resumed run first drops the lines of steps after `start`, which it will write again.
    """

    def __init__(self, directory: Path | None, *, title: str, start: int, steps: int, show: bool) -> None:
        self._lines = None if directory is None else _reopen(directory / "metrics.jsonl", start)
        self._events: Any = None
        self._directory, self._start = directory, start
        self._bar = _Bar(title, start, steps) if show and sys.stderr.isatty() else _Lines(title, start, steps) if show else None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: Any) -> None:
        for part in (self._lines, self._events, self._bar):
            if part is not None:
                part.close()

    def log(self, step: int, metrics: dict[str, float], *, examples_per_second: float) -> None:
        """Records the metrics after `step` steps; values that were not computed (NaN) are left out."""
        known = {name: value for name, value in metrics.items() if value == value}
        if self._lines is not None:
            self._lines.write(json.dumps({"step": step, **known}) + "\n")
            self._lines.flush()
            self._show_tensorboard(step, known)
        if self._bar is not None:
            self._bar.show(step, known, examples_per_second)

    def _show_tensorboard(self, step: int, metrics: dict[str, float]) -> None:
        if self._events is None:
            # Not before the first step: where torch is installed too, this imports it, which takes a second or two.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._directory / "events"), purge_step=self._start + 1, flush_secs=10)
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)


class Log:
    """What becomes of a step's metrics. They are fetched one call late, so that the device never waits for the host."""

    def __init__(self, recorder: Recorder, config: TrainConfig, step: int) -> None:
        self._recorder, self._config, self._step = recorder, config, step
        self._clock = Clock(config.batch_size)
        self._pending: dict[str, jax.Array] | None = None

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
        # Every replica sees the same values, so all processes stop together.
        for place in range(len(fetched["objective"])):
            self._step += 1
            self.look({name: float(values[place]) for name, values in fetched.items()})

    def look(self, values: dict[str, float]) -> None:
        for name in ("objective", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise UsageError(f"{name} is {values[name]} at step {self._step}; lower optimizer.learning_rate or method.epsilon")
        if self._step % self._config.log_every == 0 or self._step == self._config.steps:
            self._recorder.log(self._step, values, examples_per_second=self.rate)


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


def _reopen(path: Path, start: int) -> Any:
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
        path.write_text("".join(f"{line}\n" for line in kept))
    return path.open("a")


def _step(line: str) -> float:
    """The step of a line, or infinity where a killed run left half a line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


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


class _Lines:
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
