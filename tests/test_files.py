"""Files appear whole or not at all, and nothing that is there in place of one is waited for, believed or read to its end."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from wdkd.errors import UsageError
from wdkd.files import MAX_JSON, parse_json, read_file, read_json, write_file, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(function, *arguments):
    """The text of the UsageError that the call must raise, at once and in one line."""
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    assert time.monotonic() - start < 5
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000
    return text


# --- writing ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    for value in ({"a": [1, 2.5, None, "ä☃\ud800"]}, [], "x" * 10**6):
        write_json(path, value)
        assert read_json(path) == value
    assert write_file(path, b"\0\xff") == path and read_file(path) == b"\0\xff"
    assert names(path.parent) == ["file.json"] and path.stat().st_mode & 0o777 == 0o644


def test_rows_of_numbers_are_lines_and_strings_stay_as_they_are(tmp_path):
    awkward = ["[\n 1,\n 2\n]", "[ 1,  2 ]", "\n[", "]"]
    value = {"matrix": [[1, -2.5e-9], [None, True]], "names": awkward, "[ 1 ]": [], "one": [3]}
    value |= {"mixed": [1, "a  b", 2], "pairs": [[1, {"a": [2]}]]}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    lines = [line.strip() for line in (tmp_path / "file.json").read_text().splitlines()]
    assert {"[1, -2.5e-09],", "[null, true]", '"one": [3],', '"a": [2]'} <= set(lines)


BROKEN = {"fsync": "os.fsync", "replace": "os.replace", "chmod": "os.chmod"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", BROKEN.values(), ids=BROKEN)
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file"
    write_file(path, b"before")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(function, fail)
    with pytest.raises((UsageError, KeyboardInterrupt)) as caught:
        write_file(path, b"after")
    if isinstance(error, OSError):
        assert f"cannot write {path}: No space left on device" in str(caught.value) and "that has room" in str(caught.value)
    assert path.read_bytes() == b"before" and names(tmp_path) == ["file"]


def test_a_full_disk_is_told_in_a_line_and_harms_nothing(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"before")
    code = f"""if True:
        import resource
        from wdkd.errors import UsageError
        from wdkd.files import write_file
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_file({str(path)!r}, bytes(10**6))
        except UsageError as error:
            print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {path}: File too large; choose a directory") and not done.stderr
    assert path.read_bytes() == b"before" and names(tmp_path) == ["file"]


def test_places_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder", tmp_path / ("x" * 300), "/proc/nowhere/file"):
        assert "cannot write" in refused(write_file, path, b"content")
    assert names(tmp_path) == ["file", "folder"]


# --- reading ------------------------------------------------------------------------------------------------------------


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD = {
    "a pipe": (os.mkfifo, "no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "a terminal": (lambda path: path.symlink_to("/dev/ptmx"), "no regular file|cannot be read"),
    "a pipe behind a link": (lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")), "no regular file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "a link to a folder": (lambda path: path.symlink_to("."), "cannot be read: Is a directory"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
    "a socket": (socket_at, "cannot be read"),
    "a deleted folder": (lambda path: path.parent.rmdir(), "does not exist"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch, odd):
    make, text = ODD[odd]
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")  # A socket's path is short.
    path = type(tmp_path)("f") if odd == "a socket" else tmp_path / "d" / "f"
    make(path)
    assert any(part in refused(read_json, path) for part in text.split("|"))


def test_no_handles_are_left_open(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        refused(read_file, tmp_path / "pipe")
        refused(read_file, tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_missing_file_is_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "missing")
    assert "does not exist" in refused(read_json, tmp_path / "missing")


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    assert "has 5 bytes; at most 4 are read" in refused(read_file, path, 4)
    os.truncate(path, 2**40)
    assert f"at most {MAX_JSON:,} are read" in refused(read_json, path)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 5000])
def test_paths_that_are_none_are_refused(path):
    refused(read_file, path)
    refused(read_json, path)


def test_paths_of_any_bytes_are_told_in_printable_characters(tmp_path):
    for name in (b"\xff\xfe", b"a\nb", b"\x1b[31m"):
        path = tmp_path / os.fsdecode(name)
        write_file(path, b"{")
        refused(read_json, path)


CONTENTS = {
    "deep lists": b"[" * 10**6,
    "deep objects": b'{"a":' * 10**6,
    "deep and closed": b"[" * 10**5 + b"]" * 10**5,
    "a number of many digits": b"1" * 10**5,
    "no text": b"\xff\xfe\x00",
    "bytes": bytes(range(256)) * 100,
    "zeros": bytes(1000),
    "cut short": json.dumps({"a": [1] * 100}).encode()[:-10],
    "empty": b"",
    "two values": b"{} {}",
    "a pickle": b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_what_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert f"{tmp_path / 'file'} cannot be read: " in refused(read_json, tmp_path / "file")
    with pytest.raises(ValueError):
        parse_json(content)


def test_lone_surrogates_and_infinities_are_values_for_others_to_refuse(tmp_path):
    (tmp_path / "file").write_bytes(b'["\\ud800", NaN, -Infinity, 1e999]')
    text, *numbers = read_json(tmp_path / "file")
    assert text == "\ud800" and [str(number) for number in numbers] == ["nan", "-inf", "inf"]
