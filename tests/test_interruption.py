"""Signals raise where nothing must be saved, are noted where something must, and end the process in any case."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from wdkd.errors import Interrupted
from wdkd.interruption import SIGNALS, Interruption


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # Python runs the handler before the next of its instructions.


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_where_nothing_must_be_saved(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted, match="the same command goes on"), Interruption():
        send(number)
        pytest.fail("went on")
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_where_something_must_be_saved(number):
    done = []
    with pytest.raises(Interrupted), Interruption() as interruption:
        with interruption.deferred():
            assert not interruption.requested
            send(number)
            done.append(interruption.requested)
        pytest.fail("went on")
    assert done == [True]


def test_an_error_in_the_meantime_is_not_hidden():
    with pytest.raises(ZeroDivisionError), Interruption() as interruption, interruption.deferred():
        send(signal.SIGTERM)
        1 / 0  # noqa: B018


def test_the_time_limit_ends_with_it():
    with pytest.raises(ZeroDivisionError), Interruption(grace=0.2) as interruption, interruption.deferred():
        send(signal.SIGTERM)
        1 / 0  # noqa: B018
    time.sleep(0.5)


def test_no_exception_handler_swallows_it():
    assert not issubclass(Interrupted, Exception)


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGHUP)
            assert not interruption.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_it_does_nothing():
    outcome = []

    def work():
        with Interruption() as interruption, interruption.deferred():
            outcome.append(interruption.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [False]


def test_its_thread_and_pipe_end_with_it():
    def held():
        """By identity, not by count: a thread of an earlier test may end meanwhile."""
        found = set(threading.enumerate())
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # That of the listing itself.
                found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        return found

    before = held()
    for _ in range(5):
        with Interruption():
            pass
    deadline = time.monotonic() + 5
    while held() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not held() - before


def process(body):
    """A process that is told what to do within an interruption with a grace of half a second; started when it says so."""
    code = f"""
import hashlib, sys, time
from wdkd.interruption import Interruption
with Interruption(grace=0.5) as interruption:
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    return started


BUSY = """
with interruption.deferred():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)
"""


def ended(started, within):
    began = time.monotonic()
    _, errors = started.communicate(timeout=30)
    assert time.monotonic() - began < within
    return started.returncode, errors


def test_a_process_that_does_not_come_to_a_boundary_is_ended():
    """In C code that does not return, as a compiler's: no handler of Python's runs."""
    started = process(BUSY)
    started.send_signal(signal.SIGTERM)
    code, errors = ended(started, within=5)
    assert code == Interrupted.EXIT_CODE == 75
    assert errors == (
        "error: stopped by a signal, 0.5 s after it and in the middle of a step; the same command goes on from the last checkpoint\n"
    )


def test_a_second_signal_ends_it_at_once():
    started = process(BUSY.replace("print", "interruption._grace = 50; print"))
    started.send_signal(signal.SIGINT)
    time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    code, errors = ended(started, within=5)
    assert code == 75 and "stopped at once by a second signal" in errors and errors.count("\n") == 1


def test_a_process_that_has_said_that_it_is_saving_gets_the_time_it_takes():
    started = process(
        """
        with interruption.deferred():
            print("ready", flush=True)
            while not interruption.requested:
                time.sleep(0.01)
            interruption.acknowledge()
            time.sleep(1.5)
            print("saved", flush=True)
            sys.exit(3)
        """
    )
    started.send_signal(signal.SIGTERM)
    printed, errors = started.communicate(timeout=30)
    assert (started.returncode, printed, errors) == (3, "saved\n", "")
