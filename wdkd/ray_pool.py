"""Jobs as tasks of a Ray cluster: with the outcomes of `pool.Pool`, on as many machines as there are."""

import collections
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    WorkerCrashedError,
)

from wdkd.errors import Interrupted, UsageError
from wdkd.interruption import Interruption
from wdkd.lock import locked
from wdkd.pool import BEAT, Function, Outcome, Pool, describe
from wdkd.wording import shown

PASSED = ("JAX_PLATFORMS", "XLA_FLAGS", "TFDS_DATA_DIR", "WDKD_CACHE_DIR")
"""Variables of this process's environment that the runs get too."""
ANSWER = 25
"""Seconds that a cluster has to answer. Ray itself tries for minutes, and prints pages."""
OBJECTS = 100 * 2**20
"""Bytes of shared memory of a cluster started here: jobs and outcomes are small."""
TRIES = 3
"""How often a job is begun whose process in Ray dies on a node that goes on."""
PROBE = """
import signal, sys
signal.alarm(int(sys.argv[2]))
import ray
try:
    ray.init(address=sys.argv[1], include_dashboard=False, logging_level="error", log_to_driver=False)
except BaseException as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class RayPool:
    """Calls function(job, interruption) in a task of `cpus` CPUs and `gpus` GPUs for each job, wherever the cluster has room. A context.

    A task has a process with a `Pool` of one worker, so all that holds there holds here. Beside it:

    - The node of a task dies, or what runs there is stopped by someone else: its job is `lost` and begins again on another node,
      where a run goes on from its last checkpoint. If only Ray's processes die, the worker notices, saves and ends.
    - Ray's process of a task dies alone: the same, `TRIES` times, as it may be the job that has it killed.
    - A signal here: jobs at work save at their next step boundary, and are waited for. A second signal, or the death of this
      process, ends Ray's processes at once; the workers notice, save and end.
    - The node of this process, or the cluster's head, dies: so does the sweep, and the same command goes on.

    Nodes must have this code and this directory at the same paths, and share the file system of all that jobs read and write.

    Args:
      address: HOST:PORT of the cluster's head, or auto; None: a cluster of this machine alone, which ends with the context.
    """

    def __init__(self, function: Function, address: str | None, cpus: int, gpus: int, interruption: Interruption) -> None:
        if cpus < 1 or gpus < 0:
            raise UsageError(f"a run has {cpus} CPUs and {gpus} GPUs; it must have at least 1 and 0: see --cpus-per-run, --gpus-per-run")
        self._function, self._address, self._interruption = function, address, interruption
        self._cpus, self._gpus = cpus, gpus
        self._task = ray.remote(run_here).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
        self._crashes: collections.Counter[int] = collections.Counter()

    def __enter__(self) -> "RayPool":
        try:
            connect(self._address, self._environment())
            check_nodes(self._cpus, self._gpus)
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        ray.shutdown()

    def _environment(self) -> dict[str, str]:
        known = {name: os.environ[name] for name in PASSED if name in os.environ}
        hidden = {} if self._gpus else {"CUDA_VISIBLE_DEVICES": ""}  # Ray would show all to a task that asked for none.
        return known | hidden | {"RAY_kill_child_processes_on_worker_exit": "0"}  # They save, and end by themselves.

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
        """As `RunPool` says; and `lost` jobs, which come again."""
        pending = {self._submit(job): position for position, job in enumerate(jobs)}
        self._crashes.clear()
        stopping = False
        while pending:
            if self._interruption.requested and not stopping:
                stopping = True
                self._interruption.acknowledge()  # Workers keep to the time limit themselves, and may be saving for longer.
                for task in pending:
                    ray.cancel(task)
            for task in ray.wait(list(pending), num_returns=len(pending), timeout=BEAT)[0]:
                position = pending.pop(task)
                if (outcome := self._outcome(task, position)) is None:
                    continue
                if outcome.kind == "stopped" and not stopping:
                    outcome = Outcome("lost", outcome.text, outcome.seconds)
                if outcome.kind == "lost" and not stopping:
                    pending[self._submit(jobs[position])] = position
                yield position, outcome

    def _submit(self, job: Any) -> Any:
        return self._task.remote(self._function, job, os.getcwd(), self._cpus)

    def _outcome(self, task: Any, position: int) -> Outcome | None:
        """What became of a task that is over; None: it was cancelled before it began."""
        try:
            return ray.get(task)
        except TaskCancelledError:
            return None
        except NodeDiedError:
            return Outcome("lost", "its node has died")
        except (WorkerCrashedError, OutOfMemoryError, RuntimeEnvSetupError) as error:
            self._crashes[position] += 1
            why = shown(" ".join(describe(error).split()), 300)
            if self._crashes[position] < TRIES:
                return Outcome("lost", why)
            return Outcome("failed", f"Ray could not run it in {TRIES} tries: {why}")
        except RayTaskError as error:
            return Outcome("failed", shown(str(error).strip().splitlines()[-1], 300))  # The rest is a traceback of Ray's.
        except RayError as error:
            return Outcome("failed", shown(" ".join(describe(error).split()), 300))


# --- the cluster --------------------------------------------------------------------------------------------------------


def connect(address: str | None, environment: dict[str, str]) -> None:
    """Joins a cluster, or starts one, whose tasks get that environment. Raises UsageError if there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": "local", "num_cpus": len(os.sched_getaffinity(0)), "object_store_memory": OBJECTS}
    if address is not None:
        probe(address)
        options = {"address": address}
    with kept_handler(signal.SIGTERM):
        try:
            ray.init(
                **options,
                include_dashboard=False,
                logging_level="error",
                log_to_driver=False,
                runtime_env={"env_vars": environment},
            )
        except Exception as error:  # It has no class of its own for a node that does not come up in time.
            raise UsageError(f"Ray could not be started: {shown(' '.join(str(error).split()), 300)}") from error


def probe(address: str) -> None:
    """Raises UsageError unless a cluster answers at that address, asked by a process that can be given up."""
    if "://" in address:
        raise UsageError(f"address is {shown(address)}; it must be HOST:PORT or auto: a sweep runs on one of the cluster's machines")
    asked = subprocess.run([sys.executable, "-c", PROBE, address, str(ANSWER)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if asked.returncode:
        late = asked.returncode == -signal.SIGALRM
        why = f"no answer within {ANSWER} s" if late else (asked.stderr.strip().splitlines() or ["it ended"])[-1]
        raise UsageError(
            f"no Ray cluster at {shown(address)} ({shown(why, 200)}); start one by `ray start --head`, join it from here by "
            "`ray start --address HOST:PORT`, or leave --address out"
        )


def check_nodes(cpus: int, gpus: int) -> None:
    """Raises UsageError where no node has room for a run: it would wait for one without end."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    if not any(size[0] >= cpus and size[1] >= gpus for size in sizes):
        known = ", ".join(f"{size[0]} and {size[1]}" for size in sorted(set(sizes), reverse=True)[:5])
        raise UsageError(f"no node has the {cpus} CPUs and {gpus} GPUs of a run; they have {known}: lower --cpus-per-run, --gpus-per-run")


@contextlib.contextmanager
def kept_handler(number: int) -> Iterator[None]:
    """Puts a signal's handler back, where something else sets its own."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


# --- on a node ----------------------------------------------------------------------------------------------------------


def run_here(function: Function, job: Any, directory: str, cpus: int) -> Outcome:
    """The outcome of a job, in a process of its own with cores of its own, at a directory that is the sweep's on every node.

    Ray's `cancel` is a SIGINT to this function, so Interruption hears of it as of the signals of a batch system.
    """
    outcome = Outcome("stopped", "stopped by a signal before it began")
    try:
        os.chdir(directory)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(Interrupted))
            interruption = stack.enter_context(Interruption())
            stack.enter_context(interruption.deferred())
            cores = stack.enter_context(claimed(cpus))
            pool = stack.enter_context(Pool(functools.partial(apart, function), 1, interruption, cores))
            for _, ended in pool.run([job]):
                outcome = ended
    except OSError as error:
        return Outcome("failed", f"{error.filename}: {error.strerror} on the node {os.uname().nodename}; it must be there on every node")
    return outcome


def apart(function: Function, job: Any, interruption: Interruption) -> str:
    """Calls the function in a session of its own: Ray kills the process group of a process of its that has died."""
    os.setsid()
    return function(job, interruption)


@contextlib.contextmanager
def claimed(count: int) -> Iterator[set[int]]:
    """`count` cores that no other task on this machine is at, or all where there are fewer.

    Where Ray was told of more CPUs than there are, some are shared, but never fewer are given: the number decides the last bits.
    """
    allowed = sorted(os.sched_getaffinity(0))
    folder = Path(tempfile.gettempdir()) / f"wdkd-cores-{os.getuid()}"
    cores: list[int] = []
    with contextlib.ExitStack() as stack:
        for core in allowed:
            if len(cores) < count:
                with contextlib.suppress(UsageError):  # Busy; or nothing can be written there, so nothing can be claimed.
                    stack.enter_context(locked(folder / str(core)))
                    cores.append(core)
        others = [core for core in allowed if core not in cores]
        yield set(cores + others[: max(count - len(cores), 0)])
