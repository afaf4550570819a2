"""One writer at a time in a directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from wdkd.errors import Busy
from wdkd.files import parse_json, writing
from wdkd.notes import note

NAME = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory, which is made if it is not there, for this process alone.

    The lock is the kernel's (flock), on a file that says who holds it. So it ends with its process however that ends, and one
    that was left by a dead process is simply taken over.

    Raises:
      Busy: if another process holds it; names the process, its host and since when.
      UsageError: if the directory cannot be written.
    """
    path = directory / NAME
    with writing(path):
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with writing(path):
            _take(handle, directory)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
        with contextlib.suppress(OSError):  # The directory may be gone, or full; the lock ends with the handle.
            os.ftruncate(handle, 0)
    finally:
        with contextlib.suppress(OSError):  # Now, and not when a child process that is just being started has let go of it too.
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _take(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(f"{directory} is being written by {_holder(handle)}; wait for it or stop it, or give another --workdir") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        note(f"the file system of {directory} has no locks; see to it that no other process writes there")


def _holder(handle: int) -> str:
    """The process that the lock's file names. It may be just being written, or be anything."""
    try:
        told = parse_json(os.pread(handle, 1000, 0))
        words = f"process {int(told['pid'])} on {str(told['host'])[:100]} since {str(told['since'])[:30]}"
        return " ".join(words.split())
    except (ValueError, KeyError, TypeError):
        return "another process"
