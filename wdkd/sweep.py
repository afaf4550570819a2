"""A grid of independent runs on one machine: finished ones are skipped, stopped ones go on, failed ones are named at the end."""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wdkd import parallel, train
from wdkd.config import Config
from wdkd.errors import Diverged, Interrupted, UsageError
from wdkd.interruption import Interruption
from wdkd.methods import create_stages
from wdkd.pool import BEAT, Outcome, Pool
from wdkd.result import Result, read_result, results_path, write_result

PATIENCE, RETRY = 60.0, 5.0
"""Seconds that runs in other hands are waited for at the end, at least, and between two tries."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of these, each an edit of one config."""

    methods: tuple[str, ...]
    """Names of methods."""
    n_per_class: tuple[int, ...]
    """Training images per class; 0 means all of them."""
    seeds: tuple[int, ...]
    augmentations: tuple[Literal["none", "flip_crop", "matching"], ...] = ("none",)
    """none is the plain track."""
    epsilons: tuple[float, ...] = ()
    """Radii to try; none given: each method's own."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep: its config, its directory, where its result is also written, and where recorded teachers are kept."""

    config: Config
    workdir: Path
    publish: Path
    cache: Path


def expand(grid: Grid, base: Config, workdir: Path, results: Path) -> list[Job]:
    """The grid's runs, small N first. Results of tuning (on validation) go below results/tuning, apart from the tables'.

    Raises:
      UsageError: for an empty axis, or for an option out of range in any combination.
    """
    for field in ("methods", "n_per_class", "seeds", "augmentations"):
        if not getattr(grid, field):
            raise UsageError(f"{field} is empty; name at least one")
    axes = (grid.n_per_class, grid.seeds, grid.augmentations, grid.methods, grid.epsilons or (None,))
    return [_job(base, workdir, results, *point) for point in itertools.product(*axes)]


def _job(base: Config, workdir: Path, results: Path, n: int, seed: int, augmentation: str, method: str, epsilon: float | None) -> Job:
    epsilon = base.method.epsilon if epsilon is None else epsilon
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, n_per_class=n or None),
        augment=dataclasses.replace(base.augment, name=augmentation),
        method=dataclasses.replace(base.method, name=method, epsilon=epsilon),
        seed=seed,
    ).check()
    create_stages(config.method)
    variant = method if epsilon is None else f"{method}-epsilon{epsilon:g}"
    name = Path(base.data.name) / augmentation / variant / f"n{n or 'full'}" / f"seed{seed}"
    return Job(
        config, workdir / name, results / "tuning" if config.data.evaluate_on == "validation" else results, workdir / "teacher-cache"
    )


def publish(job: Job, result: Result) -> Path:
    """Writes a result where reports look for it; variants of a method in tuning keep their directory's name."""
    path = results_path(job.publish, result)
    if job.config.data.evaluate_on == "validation":
        path = path.parents[2] / Path(*job.workdir.parts[-3:]).with_suffix(".json")
    write_result(path, result)
    return path


def execute(job: Job, interruption: Interruption | None = None) -> Result:
    """One run, in whatever process this is. Raises as `train.run`; that a run diverged is published too."""
    try:
        result = train.run(job.config, job.workdir, cache=job.cache, show_progress=False, interruption=interruption)
    except Diverged:
        publish(job, read_result(job.workdir / "result.json"))
        raise
    publish(job, result)
    return result


def _execute_in_worker(job: Job, interruption: Interruption) -> str:
    parallel.enable_compilation_cache()
    return f"{execute(job, interruption).evaluation.accuracy:.2%}"


def run_sweep(jobs: Sequence[Job], workers: int) -> list[tuple[Job, str]]:
    """Runs all jobs, `workers` at a time, each worker on its own share of the cores, and shows how far they are.

    A job that fails, or whose process dies, does not stop the others. Several sweeps may share their jobs. On a CPU, the number of
    cores in a share decides the last bits of the results, so they are those of another sweep with as many workers.

    Returns:
      The jobs that are not complete, with one line each.

    Raises:
      Interrupted: after a signal, when the runs at work have been saved.
    """
    if not 1 <= workers <= (os.cpu_count() or 1):
        raise UsageError(f"workers is {workers}; it must be between 1 and the {os.cpu_count()} cores of this machine")
    last: dict[int, Outcome] = {}
    with Interruption() as interruption, interruption.deferred():
        with _display(len(jobs)) as progress, Pool(_execute_in_worker, workers, interruption) as pool:
            for index, outcome in _outcomes(pool, jobs, interruption):
                # Of runs that were stopped, and of those tried again in vain, nothing more is to be said.
                if outcome.kind == "done" or not interruption.requested and (outcome.kind != "busy" or index not in last):
                    _show(progress, jobs[index], outcome)
                last[index] = outcome
        if interruption.requested:
            interruption.acknowledge()
            complete = sum(outcome.kind == "done" for outcome in last.values())
            raise Interrupted(f"stopped by a signal; {complete} of {len(jobs)} runs are complete, the same command goes on with the rest")
    return [(jobs[index], last[index].text) for index in sorted(last) if last[index].kind != "done"]


def _outcomes(pool: Pool, jobs: Sequence[Job], interruption: Interruption) -> Iterator[tuple[int, Outcome]]:
    """(index, outcome) of every job. Those in other hands come again when all others are done, until they are in none.

    That is waited for twice as long as the longest run took here, as it is likely to be another's last run of the same sweep.
    """
    indices, longest, deadline = list(range(len(jobs))), 0.0, None
    while indices:
        held = []
        for position, outcome in pool.run([jobs[index] for index in indices]):
            longest = max(longest, outcome.seconds)
            if outcome.kind == "busy":
                held.append(indices[position])
            yield indices[position], outcome
        now = time.monotonic()
        deadline = deadline or now + max(PATIENCE, 2 * longest)
        if now > deadline or interruption.requested:
            return
        indices = sorted(held)
        _pause(RETRY if held else 0, interruption)


def _pause(seconds: float, interruption: Interruption) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not interruption.requested:
        time.sleep(BEAT)


class Screen:
    """stderr, on which nothing depends: that its disk is full, or its terminal gone, is no reason to end a sweep."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _display(total: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(file=Screen()))
    progress.add_task("runs", total=total)
    return progress


def _show(progress: Progress, job: Job, outcome: Outcome) -> None:
    """Says how a run ended, and moves the bar on if it did."""
    if outcome.kind != "busy":
        progress.advance(progress.task_ids[0])
    words = {"done": "", "failed": "failed, ", "busy": "tried again at the end, ", "stopped": "stopped, "}[outcome.kind]
    progress.console.print(f"{job.workdir}: {words}{outcome.text}", highlight=False, markup=False, soft_wrap=True)
