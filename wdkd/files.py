"""Files as others may have left them: written whole or not at all, read only if they are regular and not too large."""

import contextlib
import gc
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from wdkd.errors import UsageError
from wdkd.wording import shown

MAX_JSON = 64 * 2**20
"""Bytes of the largest JSON file that is read: the indices of a few million images."""


def write_file(path: str | os.PathLike, content: bytes) -> Path:
    """Writes a file whole or not at all: to a temporary name beside it, to the disk, then renamed. Returns its path.

    Raises:
      UsageError: if it cannot be written; what was there is as it was.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    return path


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the disk has to say while `path` is written into one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {_name(path)}: {error.strerror or error}; choose a directory that you may write to and that has room, "
            "then the same command goes on"
        ) from error


def read_file(path: str | os.PathLike, limit: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
      FileNotFoundError: if there is nothing.
      UsageError: if it is no regular file (a pipe would be waited for, a device has no end), larger, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise UsageError(f"{_name(path)} has {size:,} bytes; at most {limit:,} are read: restore it")
            return file.read(limit)
    except (FileNotFoundError, UsageError):
        raise
    except (OSError, ValueError) as error:  # ValueError: the path itself is none.
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{_name(path)} cannot be read: {why}; restore it or its permissions") from error


@contextlib.contextmanager
def open_regular(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A regular file, opened to be read. Raises OSError, and UsageError for what is no regular file."""
    # Opening a pipe would otherwise wait for whoever writes to it.
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UsageError(f"{_name(path)} is no regular file; put the file itself there")
        yield file


def _name(path: str | os.PathLike) -> str:
    return shown(path, 300)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file whole or not at all, as `write_file`; a list of nothing but numbers is one line, as a row of a matrix is."""
    # No string of JSON holds the line break that must follow the bracket, and a list with a quote in it is left as it is.
    text = re.sub(r'\[\n([^][{}"]*)\]', lambda row: f"[{' '.join(row[1].split())}]", json.dumps(value, indent=1))
    write_file(path, (text + "\n").encode())


def read_json(path: str | os.PathLike, limit: int = MAX_JSON) -> Any:
    """The value in a JSON file. Raises UsageError when it is missing, is not JSON, or `read_file` refuses it."""
    try:
        return parse_json(read_file(path, limit))
    except FileNotFoundError as error:
        raise UsageError(f"{_name(path)} does not exist; give the directory of a run") from error
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{_name(path)} cannot be read: {error}; restore it or run again in a new directory") from error


def parse_json(content: bytes | str) -> Any:
    """The value that JSON says. Raises ValueError for anything else, however deeply it is nested."""
    collecting = gc.isenabled()
    gc.disable()  # It would look at all of the value again and again while that grows, for many seconds where it is large.
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    finally:
        if collecting:
            gc.enable()
