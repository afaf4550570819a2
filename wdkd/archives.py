"""Files that were downloaded by hand, checked before anything opens them."""

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from wdkd.errors import UsageError
from wdkd.files import open_regular
from wdkd.isolation import answers
from wdkd.wording import shown

MAX_ENTRIES = 2_000_000
SILENCE = 600.0
"""Seconds that unpacking one member, in memory and for its size alone, may take."""


def check_published(path: Path, published: Collection[tuple[int, str]]) -> None:
    """Raises UsageError unless the file is a regular one with one of the published (sizes, SHA-256)."""
    sizes = sorted({size for size, _ in published})
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size not in sizes:
                wanted = " or ".join(f"{size:,}" for size in sizes)
                raise UsageError(f"{_name(path)} has {size:,} bytes; the published file has {wanted}: download it again")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{_name(path)} cannot be read: {error.strerror or error}; restore it or its permissions") from error
    if (size, digest) not in published:
        raise UsageError(f"{_name(path)} has SHA-256 {digest}, which is not that of the published file: download it again")


def check_folder(folder: Path) -> None:
    """Looks at everything in a folder that TFDS is to read as it is, and into every archive.

    Raises:
      UsageError: for what is no regular file or folder, a link that leads out of the folder, an archive that has such members,
        unpacks to too much or is damaged, or too many files.
    """
    files = []
    for count, path in enumerate(_entries(folder), start=1):
        if count > MAX_ENTRIES:
            raise UsageError(f"{_name(folder)} holds more than {MAX_ENTRIES:,} files; {REMEDY}")
        if path.is_symlink() and not _is_within(path, folder):
            raise UsageError(f"{_name(path)} is a link that leads out of {_name(folder)}; {REMEDY}")
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UsageError(f"{_name(path)} is neither a file nor a folder; {REMEDY}")
        if stat.S_ISREG(mode):
            files.append(os.fsencode(path))
    try:
        for _ in answers("inspect_archive", b"\0".join(files), silence=SILENCE) if files else ():
            pass
    except ValueError as error:
        raise UsageError(f"{shown(error, 500)}; download it again") from error


REMEDY = "put the files of the set alone into a folder of their own"


def _entries(folder: Path) -> Iterator[Path]:
    """Every path below a folder; links to folders are not followed."""
    try:
        for directory, folders, names in os.walk(folder, onerror=_raise):
            yield from (Path(directory) / name for name in (*folders, *names))
    except OSError as error:
        raise UsageError(f"{shown(error.filename, 300)} cannot be read: {error.strerror}; restore its permissions") from error


def _raise(error: OSError) -> None:
    raise error


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a link leads to something that is there, below the folder."""
    try:
        return path.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # RuntimeError: it leads to itself.
        return False


def _name(path: Path) -> str:
    return shown(path, 300)
