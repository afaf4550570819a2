"""A grid of independent runs, here or on a cluster: finished ones are skipped, stopped ones go on, failed ones are named at the end."""

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from wdkd import lock, parallel, train
from wdkd.board import Board
from wdkd.config import Config
from wdkd.errors import Diverged, Interrupted, UsageError
from wdkd.grid import Job
from wdkd.interruption import Interruption
from wdkd.pool import BEAT, Outcome, Pool, RunPool
from wdkd.result import Result, read_result, write_result
from wdkd.teacher_source import find_source

PATIENCE, RETRY = 60.0, 5.0
"""Seconds that runs in other hands are waited for at the end, at least, and between two tries."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each run is given of it."""

    address: str | None = None
    """HOST:PORT of its head, or auto for the one of this machine; None: one that is started here and ends with the sweep."""
    cpus_per_run: int = 1
    gpus_per_run: int = 0


def publish(job: Job, result: Result) -> Path:
    """Writes a result where reports look for it. Returns that path."""
    write_result(job.target, result)
    return job.target


def execute(job: Job, interruption: Interruption | None = None) -> Result:
    """One run, in whatever process this is. Raises as `train.run`; that a run diverged is published too."""
    finished = job.workdir / "result.json"
    if (job.workdir / lock.NAME).exists() and not finished.exists():
        with lock.locked(job.workdir):
            pass  # That it is in other hands is known before its data and its teacher are read.
    try:
        result = train.run(job.config, job.workdir, cache=job.cache, show_progress=False, interruption=interruption)
    except Diverged:
        publish(job, read_result(finished))
        raise
    publish(job, result)
    return result


def unpublished(jobs: Iterable[Job]) -> list[Job]:
    """The jobs without a result where reports look for it, whether or not the directories of those that have one are still there.

    It counts if it is complete, of the same config and of the teacher as that is now, which is known of a teacher that is a run alone.
    """
    return [job for job in jobs if not _is_published(job)]


def _is_published(job: Job) -> bool:
    try:
        result = read_result(job.target)
        return result.config == job.config and result.status == "complete" and result.teacher_hash == _teacher_hash(job.config)
    except UsageError:  # There is none, or it is damaged; what is wrong with a teacher the run will say.
        return False


def _teacher_hash(config: Config) -> str | None:
    """Of the teacher as it is now; None without one, and of one that is no run, which has to be read for that."""
    source = find_source(config.teacher) if config.teacher is not None else None
    if source is None or source.kind != "run":
        return None
    return read_result(Path(source.location) / "result.json").parameter_hash


def _execute_in_worker(job: Job, interruption: Interruption) -> str:
    parallel.enable_compilation_cache()
    found = execute(job, interruption).evaluation
    return f"agrees {found.agreement:.2%}" if found.accuracy is None else f"{found.accuracy:.2%}"


def run_sweep(jobs: Sequence[Job], workers: int = 1, cluster: Cluster | None = None) -> list[tuple[Job, str]]:
    """Runs all jobs and shows how far they are: `workers` at a time, each on its own share of the cores, or on a `cluster`.

    A job that fails, or whose process dies, does not stop the others. Several sweeps may share their jobs. On a CPU, the number of
    cores that a run has decides the last bits of its result, so they are those of another sweep that gives it as many.

    Returns:
      The jobs that are not complete, with one line each.

    Raises:
      Interrupted: after a signal, when the runs at work have been saved.
      UsageError: for more workers than cores, or a cluster that cannot be reached or has no node for a run.
    """
    last: dict[int, Outcome] = {}
    with Interruption() as interruption, interruption.deferred():
        with _create_pool(workers, cluster, interruption) as pool, Board(jobs) as board:
            for index, outcome in _outcomes(pool, jobs, interruption):
                # Of runs that were stopped, and of those tried again in vain, nothing more is to be said.
                say = outcome.kind == "done" or not interruption.requested and (outcome.kind != "busy" or index not in last)
                board.take(index, outcome, say=say)
                last[index] = outcome
        if interruption.requested:
            interruption.acknowledge()
            complete = sum(outcome.kind == "done" for outcome in last.values())
            raise Interrupted(f"stopped by a signal; {complete} of {len(jobs)} runs are complete, the same command goes on with the rest")
    return [(jobs[index], last[index].text) for index in sorted(last) if last[index].kind != "done"]


def _create_pool(workers: int, cluster: Cluster | None, interruption: Interruption) -> RunPool:
    if cluster is None:
        if not 1 <= workers <= (os.cpu_count() or 1):
            raise UsageError(f"workers is {workers}; it must be between 1 and the {os.cpu_count()} cores of this machine")
        return Pool(_execute_in_worker, workers, interruption)
    # Read by Ray when it is imported: pages about nodes that died would be printed among the results.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        from wdkd.ray_pool import RayPool
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError("a sweep on Ray needs the package ray; pip install 'wdkd[ray]', here and on every node") from error
    return RayPool(_execute_in_worker, cluster.address, cluster.cpus_per_run, cluster.gpus_per_run, interruption)


def _outcomes(pool: RunPool, jobs: Sequence[Job], interruption: Interruption) -> Iterator[tuple[int, Outcome]]:
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
