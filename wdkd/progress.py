"""What a person sees of a run, and what is kept of it: a progress bar, metrics.jsonl, TensorBoard events."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class Recorder:
    """Writes one line of metrics per call of `log`. A context manager; None as directory keeps nothing.

    A resumed run first drops the lines of steps after `start`, which it will write again.
    """

    def __init__(self, directory: Path | None, *, title: str, start: int, steps: int, show: bool) -> None:
        self._lines = None if directory is None else _reopen(directory / "metrics.jsonl", start)
        self._events = None if directory is None else SummaryWriter(str(directory / "events"), purge_step=start + 1, flush_secs=10)
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
            for name, value in known.items():
                self._events.add_scalar(name, value, step)
        if self._bar is not None:
            self._bar.show(step, known, examples_per_second)


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
