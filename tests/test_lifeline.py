"""When one process ends, the others say which and end too. Real processes, without JAX, meet and then do as they are told, line by line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[1]
HERE = "127.0.0.1"
GRACE = 0.5
"""Shorter than in truth, for tests that wait for it."""
SOON = 8
"""Seconds for the news to have come round and the grace to be over."""
PROCESS = f"""
import sys, types
package = types.ModuleType("wdkd")  # In place of the public API, which imports JAX, and that takes seconds.
package.__path__ = [{str(ROOT / "wdkd")!r}]
sys.modules["wdkd"] = package
import re, socket, time
from wdkd import lifeline
from wdkd.launcher import Launch
from wdkd.meeting import meet
lifeline.GRACE = {GRACE}
process_id, processes, port = map(int, sys.argv[1:])
connections = meet(Launch("{HERE}:%d" % port, processes, process_id), 30)
line = lifeline.Lifeline(process_id, processes, connections)
print("joined", flush=True)
for task in sys.stdin:
    exec(task)
    print("done", flush=True)
"""


class Process:
    """One process, which has come to the others as soon as `joined`."""

    def __init__(self, process_id, processes, port, stderr=subprocess.PIPE):
        command = [sys.executable, "-c", PROCESS, *map(str, (process_id, processes, port))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def joined(self):
        assert self.process.stdout.readline() == "joined\n", self.process.stderr.read()

    def do(self, task):
        """Gives the main thread something to do."""
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()

    def done(self):
        """Waits for the main thread to have done it."""
        assert self.process.stdout.readline() == "done\n", self.process.stderr.read()

    def end(self, within=SOON):
        """(exit code, stderr) of the process, which ends by itself. Its main thread is not told to."""
        self.process.wait(within)
        return self.process.returncode, self.process.stderr.read()

    def is_alive(self):
        return self.process.poll() is None


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind((HERE, 0))
        return one.getsockname()[1]


@pytest.fixture
def start():
    """A function that starts the process of a number, of how many, at a port, with a stderr. They do not outlive the test."""
    with contextlib.ExitStack() as processes:

        def start(*given):
            one = Process(*given)
            processes.callback(one.process.wait)
            processes.callback(one.process.kill)
            return one

        yield start


@pytest.fixture
def run(start):
    """A function that starts so many processes and returns them when they have joined."""

    def run(count):
        port = free_port()
        together = [start(index, count, port) for index in range(count)]
        for one in together:
            one.joined()
        return together

    return run


@pytest.fixture
def stranger(start):
    """Process 0, joined, and the bare socket that came to it as process 1 of 2."""
    port = free_port()
    zero = start(0, 2, port)
    with connected(port) as connection:
        connection.sendall(b"process 1 of 2")
        assert connection.recv(99) == b"wdkd: all have come"
        zero.joined()
        yield zero, connection


def connected(port):
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((HERE, port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ended(number, count):
    """How a process ends when another one has ended."""
    line = f"error: process {number} of {count} has ended; this one stops too, and the same command on all of them goes on from the last"
    return 2, f"{line} checkpoint\n"


ORDERS = [(0, 1, 2), (2, 1, 0), (2, 0, 1)]
"""Each of three processes comes last in one of these, process 0 to which the others are connected."""


# --- a process ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("busy", ["time.sleep(100)", "while True: pass"])
def test_a_killed_process_is_named_by_all_others_within_seconds(victim, busy, run):
    together = run(3)
    for one in together:
        one.do(busy)
    dead = together.pop(victim)
    dead.process.send_signal(signal.SIGKILL)
    for one in together:
        assert one.end() == ended(victim, 3)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_ends_with_its_own_error_counts_as_ended(victim, run):
    together = run(3)
    failed = together.pop(victim)
    failed.do("line.leave(2); sys.exit('error: the disk is full')")
    assert failed.end() == (2, "error: the disk is full\n"), "it does not name another"
    for one in together:
        assert one.end() == ended(victim, 3)


@pytest.mark.parametrize("order", ORDERS)
def test_errors_of_their_own_come_before_the_news(order, run):
    together = run(3)
    for index in order:
        together[index].do(f"line.leave(2); sys.exit('error: {index} found the same option wrong')")
        time.sleep(0.1)
    for index, one in enumerate(together):
        assert one.end() == (2, f"error: {index} found the same option wrong\n")


def test_an_error_that_comes_too_late_is_not_a_second_line(run):
    zero, one = run(2)
    one.do("say = lifeline._say; lifeline._say = lambda text: (time.sleep(1), say(text))")
    one.do(f"line.news(20); time.sleep({GRACE + 0.5}); line.leave(2); sys.exit('error: the disk is full')")
    zero.process.kill()
    assert one.end() == ended(0, 2)


def test_a_terminal_gets_its_cursor_back_and_the_line_below_the_bar(start):
    port = free_port()
    terminal, stderr = os.openpty()
    zero, one = start(0, 2, port), start(1, 2, port, stderr)
    one.do("print('\\033[?25l a bar', end='', file=sys.stderr, flush=True)")
    for process in (zero, one):
        process.joined()
    one.done()
    zero.process.kill()
    assert one.process.wait(SOON) == 2
    code, text = ended(0, 2)
    bar, line = os.read(terminal, 9999).decode().replace("\r", "").split("\n", 1)
    assert (bar, line) == ("\033[?25l a bar", f"\033[?25h{text}")


def test_a_computation_that_failed_is_told_why(run):
    zero, one, two = run(3)
    one.do("print('late' if line.news(20) is None else line.news(), file=sys.stderr); line.leave(2); sys.exit()")
    two.process.kill()
    code, text = ended(2, 3)
    assert one.end() == (code, text.removeprefix("error: ")), "the line is printed once, by the main thread"
    assert zero.end() == ended(2, 3)


def test_no_news_are_waited_for_no_longer_than_said(run):
    zero, one = run(2)
    one.do("began = time.monotonic(); assert line.news(0.5) is None and time.monotonic() - began < 5")
    one.done()
    assert zero.is_alive() and one.is_alive()


def test_a_process_that_cannot_come_to_its_end_is_ended(run):
    zero, one = run(2)
    one.do("lifeline.LEAVING = 0.5; line.leave(7); time.sleep(100)")
    assert one.end() == (7, "")
    assert zero.end() == ended(1, 2)


def test_a_process_leaves_without_what_others_do_at_exit_and_keeps_what_it_printed(run):
    zero, one = run(2)
    one.do("import atexit; atexit.register(time.sleep, 100); print('kept'); line.leave(7); sys.exit()")
    assert one.end() == (7, "")
    assert one.process.stdout.read() == "kept\n"


# --- goodbye ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_goodbye_in_any_order_is_silent_and_waits_for_all(order, run):
    together = run(3)
    for index in order[:2]:
        together[index].do("sys.exit(0 if line.goodbye() else 1)")
    time.sleep(GRACE + 0.3)
    assert all(one.is_alive() for one in together), "who is at the end waits, and nobody is disturbed"
    together[order[2]].do(f"parted = line.goodbye(); time.sleep({GRACE + 0.3}); sys.exit(0 if parted else 1)")
    for one in together:
        assert one.end() == (0, ""), "nor is who takes longer to end"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_when_others_are_at_the_end_is_named(victim, run):
    together = run(3)
    dead = together.pop(victim)
    for one in together:
        one.do("line.goodbye()")
    time.sleep(0.5)
    dead.process.kill()
    for one in together:
        assert one.end() == ended(victim, 3)


def test_a_process_that_alone_was_stopped_leaves_when_its_patience_is_over(run):
    zero, one, two = run(3)
    two.do("stopped = line.goodbye(0.5); line.leave(75); sys.exit('all of them?' if stopped else 0)")
    assert two.end() == (75, "")
    assert zero.end() == one.end() == ended(2, 3)


# --- odd connections ----------------------------------------------------------------------------------------------------


def test_a_machine_that_vanishes_is_noticed_within_a_minute(run):
    zero, one = run(2)
    options = "SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"
    for process in (zero, one):
        process.do(f"(c,) = connections.values(); levels = socket.SOL_SOCKET, *[socket.IPPROTO_TCP] * 4; names = {options}")
        process.do("print([c.getsockopt(level, getattr(socket, name)) for level, name in zip(levels, names)], c.gettimeout())")
        process.done()
        alive, idle, interval, count, unanswered, timeout = re.findall(r"\d+|None", process.process.stdout.readline())
        assert (alive, timeout) == ("1", "None")
        assert 10 <= int(idle) + int(interval) * int(count) <= 60
        assert 10_000 <= int(unanswered) <= 60_000


@pytest.mark.parametrize(
    "words", [b"\xff" * 10**8, b"\n" * 1000, b"ended\nended x\nended -1\nGOODBYE\ngood", b"ended " + b"1" * 5000 + b"\n"]
)
def test_garbage_is_nothing_however_much_and_its_end_is_an_end(words, stranger):
    zero, connection = stranger
    connection.sendall(words)
    zero.do("assert line.news(1) is None")
    zero.done()
    zero.do("assert int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) < 2**16, 'it is not kept'")
    zero.done()
    connection.close()
    assert zero.end() == ended(1, 2)


def test_a_message_may_come_in_pieces(stranger):
    zero, connection = stranger
    zero.do("sys.exit(0 if line.goodbye() else 1)")
    for piece in (b"good", b"by", b"e\n"):
        connection.sendall(piece)
        time.sleep(0.1)
    assert connection.recv(99) == b"goodbye\n"
    assert zero.end() == (0, "")


@pytest.mark.parametrize("end", ["shutdown(socket.SHUT_WR)", "close()"], ids=["half closed", "closed"])
def test_a_connection_that_says_nothing_more_has_ended(end, stranger):
    zero, connection = stranger
    eval(f"connection.{end}", {"connection": connection, "socket": socket})
    assert zero.end() == ended(1, 2)


def test_a_process_that_died_while_others_were_waited_for_may_come_again(start):
    port = free_port()
    zero = start(0, 3, port)
    with connected(port) as dead:
        dead.sendall(b"process 2 of 3")
        time.sleep(0.5)
    together = zero, start(2, 3, port), start(1, 3, port)
    for one in together:
        one.joined()
    for one in together:
        one.do("sys.exit(0 if line.goodbye() else 1)")
    for one in together:
        assert one.end() == (0, "")


def test_strangers_that_only_hold_on_to_the_port_do_no_harm(start):
    port = free_port()
    zero = start(0, 2, port)
    with connected(port), connected(port) as talks:
        talks.sendall(b"\xff\xfeGET / HTTP/1.1\r\n\r\n")
        one = start(1, 2, port)
        zero.joined()
        one.joined()
        for process in (zero, one):
            process.do("sys.exit(0 if line.goodbye() else 1)")
        assert zero.end() == one.end() == (0, "")


def test_the_port_is_free_again_while_the_lifelines_hold(start):
    port = free_port()
    together = [start(index, 2, port) for index in (0, 1)]
    for one in together:
        one.joined()
    with socket.create_server(("", port)) as coordinator:
        assert coordinator.getsockname()[1] == port
    assert all(one.is_alive() for one in together)
