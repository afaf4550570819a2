"""A pool loses the job of a process that dies and no other, stops all of its processes once and gently, and leaves none behind."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wdkd import pool
from wdkd.errors import Busy, Diverged, UsageError
from wdkd.interruption import GRACE, Interruption
from wdkd.pool import Outcome, Pool, ending, shares

pytestmark = pytest.mark.timeout(600)


class Unpicklable(Exception):
    """Neither pickles nor has a text of one line."""

    def __init__(self, text="a\n\n  b"):
        super().__init__(text)
        self.lock = threading.Lock()


class Textless(Unpicklable):
    def __str__(self):
        raise RuntimeError


class Strange(BaseException):
    pass


RAISED = {
    "unpicklable": (Unpicklable(), "failed", "Unpicklable: a b"),
    "without a text": (Textless(), "failed", "Textless: it has no text"),
    "exit": (SystemExit(3), "failed", "SystemExit: 3"),
    "no Exception": (Strange("x"), "failed", "Strange: x"),
    "long": (ValueError("x" * 10**7), "failed", "ValueError: " + "x" * 488),
    "for users": (UsageError("give another"), "failed", "give another"),
    "diverged": (Diverged("loss is nan at step 3"), "failed", "loss is nan at step 3"),
    "busy": (Busy("in the hands of process 1"), "busy", "in the hands of process 1"),
}
DEATHS = {
    "kill -9": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by signal 9 (out of memory?)"),
    "segmentation fault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by signal 11 (Segmentation fault)"),
    "exit": (lambda: os._exit(7), "ended with code 7"),
    "exit that looks well": (lambda: os._exit(0), "ended with code 0"),
}


def act(job, interruption):
    """The function of these tests' pools: a job says what to do."""
    match job:
        case "raise", name:
            raise RAISED[name][0]
        case "die", name:
            DEATHS[name][0]()
        case "work", directory:
            return until_stopped(Path(directory), interruption)
        case "meet", directory:
            directory.mkdir(exist_ok=True)
            (directory / str(os.getpid())).touch()
            wait_for(lambda: len(list(directory.iterdir())) == 2, 120)
        case "take", seconds:
            time.sleep(seconds)
    return f"{os.getpid()} {' '.join(map(str, sorted(os.sched_getaffinity(0))))}"


def until_stopped(directory, interruption):
    """Work without end that is saved when it is told to stop, which takes a while: files named by the process say how far it is."""
    with interruption.deferred():
        (directory / f"{os.getpid()}.begun").touch()
        while not interruption.requested:
            time.sleep(0.02)
        interruption.acknowledge()
        time.sleep(2)
        (directory / f"{os.getpid()}.saved").touch()


def run(jobs, workers=1):
    """The outcomes of the jobs, in the order of the jobs, of which there is exactly one each."""
    with Interruption() as interruption, Pool(act, workers, interruption) as started:
        outcomes = list(started.run(jobs))
    assert sorted(position for position, _ in outcomes) == list(range(len(jobs)))
    return [outcome for _, outcome in sorted(outcomes, key=lambda pair: pair[0])]


def process_of(outcome):
    assert outcome.kind == "done", outcome
    return int(outcome.text.split()[0])


def cores_of(outcome):
    return set(map(int, outcome.text.split()[1:]))


def is_alive(process):
    """Also of processes that are not ours; one that is dead and waits to be noticed is not alive."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


# --- deaths and exceptions ----------------------------------------------------------------------------------------------


def test_a_worker_runs_jobs_in_order_and_exceptions_are_outcomes_of_theirs():
    jobs = [job for name in RAISED for job in (("raise", name), ("take", 0))]
    with Interruption() as interruption, Pool(act, 1, interruption) as started:
        outcomes = list(started.run(jobs))
    assert [position for position, _ in outcomes] == list(range(len(jobs)))
    for (_, kind, text), (_, outcome) in zip(RAISED.values(), outcomes[::2], strict=True):
        assert (outcome.kind, outcome.text) == (kind, text)
    processes = {process_of(outcome) for _, outcome in outcomes[1::2]}
    assert len(processes) == 1 and os.getpid() not in processes, "one process, which shares what it has compiled"
    wait_for(lambda: not any(map(is_alive, processes)), 1)


def test_a_death_costs_one_job_and_its_cores_go_to_the_next_process():
    jobs = [job for name in DEATHS for job in (("take", 0), ("die", name))] + [("take", 0)]
    outcomes = run(jobs)
    for (_, text), outcome in zip(DEATHS.values(), outcomes[1::2], strict=True):
        assert (outcome.kind, outcome.text) == ("failed", f"the process of this run {text}")
    assert len({process_of(outcome) for outcome in outcomes[::2]}) == len(DEATHS) + 1
    assert all(cores_of(outcome) == os.sched_getaffinity(0) for outcome in outcomes[::2])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_workers_and_their_replacements_share_the_cores_out(tmp_path):
    with Interruption() as interruption, Pool(act, 2, interruption) as started:
        before, lost, after = (
            [outcome for _, outcome in started.run([job] * 2)]
            for job in (("meet", tmp_path / "before"), ("die", "kill -9"), ("meet", tmp_path / "after"))
        )
    assert [outcome.kind for outcome in lost] == ["failed"] * 2
    assert len({process_of(outcome) for outcome in before + after}) == 4
    one, other = map(cores_of, before)
    assert not one & other and one | other == os.sched_getaffinity(0)
    assert sorted(map(cores_of, after), key=sorted) == sorted((one, other), key=sorted)


def test_a_worker_that_dies_without_a_job_costs_nothing():
    with Interruption() as interruption, Pool(act, 1, interruption) as started:
        ((_, before),) = started.run([("take", 0)])
        os.kill(process_of(before), signal.SIGKILL)
        wait_for(lambda: not multiprocessing.active_children(), 5)
        ((_, after),) = started.run([("take", 0)])
    assert process_of(after) != process_of(before)


def test_a_worker_that_is_stopped_by_someone_else_is_replaced(tmp_path):
    def stop_it():
        wait_for(lambda: list(tmp_path.glob("*.begun")), 250)
        for _ in range(2):
            os.kill(int(next(tmp_path.glob("*.begun")).stem), signal.SIGTERM)

    thread = threading.Thread(target=stop_it)
    thread.start()
    stopped, after = run([("work", tmp_path), ("take", 0)])
    thread.join()
    assert (stopped.kind, "stopped by a signal" in stopped.text) == ("stopped", True)
    assert len(list(tmp_path.glob("*.saved"))) == 1, "two signals are one"
    assert process_of(after) != int(next(tmp_path.glob("*.saved")).stem)


def test_jobs_wait_where_a_process_cannot_be_started_and_fail_where_none_is_left(monkeypatch):
    """As where the system has no room: only the second try is granted."""
    start, tries = pool.CONTEXT.Process.start, []

    def refusing(self):
        tries.append(self)
        if len(tries) != 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(self)

    monkeypatch.setattr(pool.CONTEXT.Process, "start", refusing)
    monkeypatch.setattr(pool, "RESTART", 0.1)
    outcomes = run([("take", 0), ("take", 0.5), ("die", "exit"), ("take", 0)], workers=2)
    assert [outcome.kind for outcome in outcomes] == ["done", "done", "failed", "failed"]
    assert outcomes[3] == Outcome("failed", "no process could be started for this run: Resource temporarily unavailable")
    assert len(tries) > 4, "it tried again while the one worker was at work"


class Broken:
    """A function that a process cannot even be given, as when the code has been edited since."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_process_that_dies_before_it_is_ready_is_not_given_a_job():
    with Interruption() as interruption, Pool(Broken(), 1, interruption) as started:
        outcomes = list(started.run(["job"]))
    assert outcomes == [(0, Outcome("failed", "no process could be started for this run: it ended with code 3"))]


@pytest.mark.parametrize(("count", "workers"), [(8, 1), (8, 2), (7, 2), (3, 3), (5, 4), (2, 5)])
def test_shares_are_of_one_size_and_apart_where_there_are_enough(count, workers):
    """A run must not depend on the worker that takes it."""
    found = shares(range(10, 10 + count), workers)
    assert len(found) == workers and {len(share) for share in found} == {max(count // workers, 1)}
    assert set().union(*found) <= set(range(10, 10 + count))
    assert len(set().union(*found)) == min(workers, count) * max(count // workers, 1)


def test_endings_in_words():
    assert ending(-9) == "was killed by signal 9 (out of memory?)"
    assert ending(-6) == "was killed by signal 6 (Aborted)"
    assert ending(None) == "ended with code None"


# --- signals ------------------------------------------------------------------------------------------------------------

PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_pool import act
from wdkd.interruption import Interruption
from wdkd.pool import Pool

with Interruption(grace=1) as interruption, interruption.deferred(), Pool(act, 2, interruption) as pool:
    for position, outcome in pool.run([("work", sys.argv[2])] * 4):
        print(position, outcome.kind, flush=True)
"""


@contextlib.contextmanager
def parent(directory, *, begun=2):
    """A process, first of its group, with two workers that have begun 2 of 4 jobs."""
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent), str(directory)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            wait_for(lambda: len(list(directory.glob("*.begun"))) == begun, 120)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def named(directory, pattern):
    return {int(path.stem) for path in directory.glob(pattern)}


SENT = {
    "SIGTERM to the parent": lambda process: os.kill(process.pid, signal.SIGTERM),
    "Ctrl-C in a terminal": lambda process: os.killpg(process.pid, signal.SIGINT),
    "a terminal is closed": lambda process: os.killpg(process.pid, signal.SIGHUP),
    "a batch system ends the job": lambda process: os.killpg(process.pid, signal.SIGTERM),
}


@pytest.mark.parametrize("sent", SENT)
def test_a_signal_lets_the_jobs_at_work_save_and_no_other_begin(sent, tmp_path):
    with parent(tmp_path) as process:
        began = time.monotonic()
        SENT[sent](process)
        printed, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 15
    assert sorted(printed.split("\n")) == ["", "0 stopped", "1 stopped"]
    assert named(tmp_path, "*.saved") == named(tmp_path, "*.begun") and len(named(tmp_path, "*.begun")) == 2
    assert not any(map(is_alive, named(tmp_path, "*.begun")))
    assert errors.splitlines()[-1].startswith("wdkd.errors.Interrupted: stopped by a signal"), errors
    assert errors.count("Traceback") == 1, "the parent's own, which a command turns into a line"


def test_workers_save_and_end_when_their_parent_is_killed(tmp_path):
    with parent(tmp_path) as process:
        process.kill()
        wait_for(lambda: not any(map(is_alive, named(tmp_path, "*.begun"))), 2 * GRACE)
        assert named(tmp_path, "*.saved") == named(tmp_path, "*.begun")
        assert process.communicate(timeout=10)[1] == ""


def test_a_signal_while_workers_are_being_started_ends_them_too(tmp_path):
    """They would need seconds to come to anything of this project, and have nothing to say."""
    with parent(tmp_path, begun=0) as process:
        wait_for(lambda: len(children(process.pid)) == 3, 60)  # With the one that multiprocessing has for itself.
        started, began = children(process.pid), time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 5
    wait_for(lambda: not any(map(is_alive, started)), 5)
    assert printed == "" and not list(tmp_path.iterdir())
    assert errors.count("Traceback") == 1 and re.search(r"^wdkd.errors.Interrupted: ", errors, re.MULTILINE), errors


def children(process):
    return [int(name) for name in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
