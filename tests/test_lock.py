"""One writer at a time, whoever it is, and nobody after it has to clean up."""

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from wdkd import lock
from wdkd.errors import Busy, UsageError
from wdkd.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from wdkd.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holding(directory):
    """Another process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """(process, the directory that it holds)."""
    directory = tmp_path_factory.mktemp("held")
    with holding(directory) as process:
        yield process, directory


def test_the_second_is_refused_and_told_who_the_first_is(held):
    process, directory = held
    with pytest.raises(Busy) as caught, locked(directory):
        pytest.fail("two at once")
    assert f"{directory} is being written by process {process.pid} on {socket.gethostname()} since 20" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    with holding(tmp_path) as process:
        process.kill()
        process.wait()
        assert str(process.pid) in (tmp_path / lock.NAME).read_text(), "it had no time to clean up"
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / lock.NAME).read_text()


def test_it_is_free_afterwards_also_after_an_error(tmp_path):
    directory = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError), locked(directory):
        raise ZeroDivisionError
    with locked(directory):
        pass
    assert (directory / lock.NAME).read_text() == ""


def test_a_child_process_does_not_hold_it_on(tmp_path):
    """A subprocess that outlives the run must not keep the directory."""
    with locked(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], close_fds=False)
    try:
        with locked(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff" * 2000, b'{"pid": 1, "host": "a\\nb", "since": []}'])
def test_what_the_file_says_may_be_anything(content, held):
    path = held[1] / lock.NAME
    before = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(Busy, match="is being written by .*process") as caught, locked(held[1]):
        pytest.fail("two at once")
    path.write_bytes(before)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["directory", "link", "file in the way"])
def test_what_cannot_be_locked_is_refused_in_one_line(kind, tmp_path):
    directory = tmp_path / "run"
    if kind == "file in the way":
        directory.write_text("")
    else:
        directory.mkdir()
        (directory / lock.NAME).mkdir() if kind == "directory" else (directory / lock.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"cannot write {directory}/.lock: "), locked(directory):
        pytest.fail("held")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_is_said_to_have_none(tmp_path, monkeypatch, capsys):
    def refuse(handle, operation):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    said = capsys.readouterr().err
    assert said == f"note: the file system of {tmp_path} has no locks; see to it that no other process writes there\n"
