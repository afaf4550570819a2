"""A grid of independent runs on one machine: finished ones are skipped, stopped ones go on, failed ones are named at the end."""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wdkd import parallel, train
from wdkd.config import Config
from wdkd.errors import UsageError
from wdkd.methods import create_stages
from wdkd.result import Result, results_path, write_result


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
    if result.evaluation.split == "validation":
        path = path.parents[2] / Path(*job.workdir.parts[-3:]).with_suffix(".json")
    write_result(path, result)
    return path


def execute(job: Job) -> Result:
    """One run, in whatever process this is."""
    result = train.run(job.config, job.workdir, cache=job.cache, show_progress=False)
    publish(job, result)
    return result


def run_sweep(jobs: list[Job], workers: int) -> list[tuple[Job, str]]:
    """Runs all jobs, `workers` at a time, each worker on its own share of the cores, and shows how far they are.

    Returns the jobs that failed, with one line each. A job that fails does not stop the others.
    """
    if not 1 <= workers <= (os.cpu_count() or 1):
        raise UsageError(f"workers is {workers}; it must be between 1 and the {os.cpu_count()} cores of this machine")
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("runs", total=len(jobs))
        for job, outcome in _outcomes(jobs, workers):
            progress.advance(task)
            if isinstance(outcome, Result):
                progress.console.print(f"{job.workdir}: {outcome.evaluation.accuracy:.2%}", highlight=False, soft_wrap=True)
            else:
                line = " ".join(f"{type(outcome).__name__}: {outcome}".split())[:300]
                failed.append((job, line))
                progress.console.print(f"{job.workdir}: failed, {line}", highlight=False, soft_wrap=True)
    return failed


def _outcomes(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Result | Exception]]:
    context = multiprocessing.get_context("spawn")  # A forked process cannot use JAX that its parent has started.
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0))
    for worker in range(workers):
        cores.put(set(available[worker::workers]) or set(available))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(cores,)) as pool:
        futures = {pool.submit(execute, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else error


def _start_worker(cores: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, cores.get())
    parallel.enable_compilation_cache()
