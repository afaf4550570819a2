"""Worker processes that run jobs one after the other: one that dies costs its job alone, and none outlives its parent."""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol

from wdkd.errors import Busy, Interrupted, UsageError
from wdkd.interruption import GRACE, SIGNALS, Interruption

BEAT = 0.2
"""Seconds between two looks at whether a signal has come."""
RESTART = 5.0
"""Seconds from a process that could not be started to the next try."""
CONTEXT = multiprocessing.get_context("spawn")  # A forked process cannot use JAX that its parent has started.

Function = Callable[[Any, Interruption], str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended, in one line, and after how long. All that comes back from a worker: an exception need not even pickle.

    `lost` is no end: where it was at work is gone, and it begins again elsewhere.
    """

    kind: Literal["done", "failed", "busy", "stopped", "lost"]
    text: str
    seconds: float = 0.0


class RunPool(Protocol):
    """What runs jobs: a context."""

    def __enter__(self) -> "RunPool": ...

    def __exit__(self, *exception: Any) -> None: ...

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
        """Yields (position, outcome) of every job as it ends. They begin in order.

        After a signal no job begins, those at work are told to save and to stop, and only theirs are the outcomes still to come.
        """
        ...


class Pool:
    """Up to `workers` processes that call function(job, interruption), each on its own share of the cores. A context.

    `cores`: those to share out; None: all that this process may use.
    """

    def __init__(self, function: Function, workers: int, interruption: Interruption, cores: Collection[int] | None = None) -> None:
        self._workers = [Worker(function, share) for share in shares(sorted(cores or os.sched_getaffinity(0)), workers)]
        self._interruption = interruption

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop()
        for worker in self._workers:
            worker.end()

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
        """As `RunPool` says."""
        waiting = collections.deque(enumerate(jobs))
        while waiting or any(worker.position is not None for worker in self._workers):
            if self._interruption.requested:
                self._stop()
                waiting.clear()
            for worker in self._workers:
                if waiting and worker.is_free:
                    worker.give(*waiting.popleft())
            yield from self._start(waiting)
            wait([source for worker in self._workers for source in worker.sources], BEAT)
            for worker in self._workers:
                position = worker.position
                if (outcome := worker.take()) is not None:
                    yield position, outcome

    def _start(self, waiting: collections.deque[tuple[int, Any]]) -> Iterator[tuple[int, Outcome]]:
        """Starts processes for the jobs that wait. A job fails when that has failed for every worker: else it can wait for another."""
        # The one refused longest ago first, so that every worker has its turn.
        absent = sorted((worker for worker in self._workers if worker.is_absent), key=lambda worker: worker.not_before)
        starting = sum(worker.is_starting for worker in self._workers)
        for worker in absent[: max(len(waiting) - starting, 0)]:
            worker.start()
        if waiting and all(worker.refusal for worker in self._workers):
            yield waiting.popleft()[0], Outcome("failed", f"no process could be started for this run: {self._workers[0].refusal}")
            for worker in self._workers:
                worker.refusal = ""

    def _stop(self) -> None:
        if self._interruption.requested:
            self._interruption.acknowledge()  # Workers keep to the time limit themselves, and may be saving for longer.
        for worker in self._workers:
            worker.let_go()


def shares(cores: Sequence[int], workers: int) -> list[set[int]]:
    """The cores of each worker. All get as many, if need be by leaving some idle: the number decides the last bits of what XLA computes."""
    size = max(len(cores) // workers, 1)
    return [set(cores[index % len(cores) :: workers][:size]) for index in range(workers)]


class Worker:
    """A process with its share of the cores, started when there is a job for it, and again when it has died."""

    def __init__(self, function: Function, cores: set[int]) -> None:
        self.position: int | None = None
        """Of the job it is at; None: it has none."""
        self.refusal = ""
        """Why the last try to start a process came to nothing, if it did."""
        self.not_before = 0.0
        """When to try again."""
        self._function, self._cores = function, cores
        self._process: multiprocessing.process.BaseProcess | None = None
        self._ready = False

    @property
    def is_absent(self) -> bool:
        """Whether it has no process, and should have one if there is work."""
        return self._process is None and time.monotonic() >= self.not_before

    @property
    def is_starting(self) -> bool:
        """Whether its process is on its way."""
        return self._process is not None and not self._ready

    @property
    def is_free(self) -> bool:
        """Whether it can be given a job."""
        return self._process is not None and self._ready and self.position is None and self._process.is_alive()

    @property
    def sources(self) -> tuple[Connection | int, ...]:
        """What becomes readable when `take` has something to do."""
        return () if self._process is None or self._connection.closed else (self._connection, self._process.sentinel)

    def start(self) -> None:
        """Starts a process, which needs seconds until it can take a job, or says in `refusal` why not."""
        try:
            self._connection, theirs = CONTEXT.Pipe()
            ended, self._life = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=work, args=(theirs, ended, self._cores, self._function))
            with blocked():
                process.start()
        except OSError as error:
            self._refuse(error.strerror or str(error))
            return
        theirs.close()  # Now that only the process has them, they end with it.
        ended.close()
        self._process, self._ready, self.refusal = process, False, ""

    def _refuse(self, why: str) -> None:
        self.refusal, self.not_before = why, time.monotonic() + RESTART

    def give(self, position: int, job: Any) -> None:
        """Begins a job."""
        self.position = position
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # It died just now; `take` finds that.
            self._connection.send(job)

    def take(self) -> Outcome | None:
        """The outcome of its job; None while it is at it. Also sees what becomes of a process without a job."""
        if not self.sources:
            return None
        alive = self._process.is_alive()  # Asked first: what it has sent counts, even if it has died since.
        try:
            if self._connection.poll():
                return self._took(self._connection.recv())
        except (EOFError, OSError):  # It died, perhaps in the middle of the message.
            alive = False
        return None if alive else self._died()

    def _took(self, outcome: Outcome | None) -> Outcome | None:
        if outcome is None:
            self._ready = True
        else:
            self.position = None
            if outcome.kind == "stopped":
                self.end()
        return outcome

    def _died(self) -> Outcome | None:
        position, ready, how = self.position, self._ready, ending(self.end())
        self.position = None
        if not ready:
            self._refuse(f"it {how}")
        return None if position is None else Outcome("failed", f"the process of this run {how}")

    def let_go(self) -> None:
        """Tells the process to stop: at once if it has no job, else at the next boundary, its state saved."""
        if self._process is not None:
            self._life.close()
            if self.position is None:
                self._connection.close()
            if not self._ready:
                self._process.kill()

    def end(self) -> int | None:
        """Sees that the process ends, if there is one. Returns its exit code, as `multiprocessing` gives it."""
        if self._process is None:
            return None
        self._life.close()
        self._connection.close()
        self._process.join(GRACE + 2)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(2)
        code, self._process = self._process.exitcode, None
        return code


def ending(code: int | None) -> str:
    """In words, how a process ended."""
    if code is None or code >= 0:
        return f"ended with code {code}"
    return f"was killed by signal {-code} ({'out of memory?' if -code == signal.SIGKILL else signal.strsignal(-code)})"


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Signals wait, also in a process that is started meanwhile, for as long as it lives: see `obey`."""
    resource_tracker.ensure_running()  # Python 3.11 unblocks signals when it starts that.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the worker's process --------------------------------------------------------------------------------------------


def work(connection: Connection, life: Connection, cores: set[int], function: Function) -> None:
    """What a worker process does, until its parent is gone or lets it go."""
    with contextlib.suppress(OSError):  # Cores may have been taken away since.
        os.sched_setaffinity(0, cores)
    with contextlib.suppress(Interrupted, EOFError, OSError), Interruption() as interruption:
        threading.Thread(target=obey, args=(life,), daemon=True).start()
        connection.send(None)  # It is ready.
        while not interruption.requested:
            outcome = attempt(function, connection.recv(), interruption)
            with interruption.deferred():
                connection.send(outcome)


def obey(life: Connection) -> None:
    """Turns the end of `life`, whose other end only the parent has, and any number of SIGTERMs into one.

    Interruption takes a second signal as an order to stop without saving, and batch systems send SIGTERM to all processes of a
    job at once. So signals are blocked here (see `blocked`): SIGINT and SIGHUP, which terminals send to all, for good, and
    SIGTERM, of which no more than one is ever pending, until now.
    """
    while not life.poll(BEAT) and signal.SIGTERM not in signal.sigpending():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def attempt(function: Function, job: Any, interruption: Interruption) -> Outcome:
    """The outcome of a job, whatever it does short of ending the process."""
    began = time.monotonic()
    try:
        kind, text = "done", function(job, interruption)
    except BaseException as error:
        kind = "busy" if isinstance(error, Busy) else "stopped" if isinstance(error, Interrupted) else "failed"
        text = describe(error)
    return Outcome(kind, " ".join(text.split())[:500], time.monotonic() - began)


def describe(error: BaseException) -> str:
    """What an error says; with its class, unless its text is meant for users."""
    try:
        text = str(error)
    except Exception:
        text = "it has no text"
    return text if isinstance(error, UsageError | Interrupted) else f"{type(error).__name__}: {text}"
