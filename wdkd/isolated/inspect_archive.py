"""Whether archives unpack to something reasonable, below the folder that they are unpacked in."""

import bz2
import gzip
import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator

MAX_BYTES = 32 * 2**30
"""Unpacked. Of a set that can be used, 2 GiB of images are left."""
MAX_MEMBERS = 2_000_000
MAX_RATIO, HARMLESS = 200, 2**28
"""Unpacked bytes to packed ones; of less than the second, none is asked for."""
CHUNK = 2**20

COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""By the bytes that such a file begins with."""


def answer(question: bytes) -> Iterator[bytes]:
    """Looks into the files, whose paths are separated by NUL; what is no archive passes. Raises ValueError naming the first bad one."""
    for path in question.split(b"\0"):
        name = os.fsdecode(path)
        try:
            for _ in _inspect(name):
                yield b""
        except Unreasonable as error:
            raise ValueError(f"{name!r} {error}") from error
        except Exception as error:  # Each kind of archive has its own.
            raise ValueError(f"{name!r} cannot be unpacked ({type(error).__name__}: {error})") from error
        yield b""


class Unreasonable(ValueError):
    """An archive that must not be unpacked: its text says what it does."""


def _inspect(path: str) -> Iterator[None]:
    """Raises Unreasonable where the file is an archive of any kind that is; some are of more than one."""
    with open(path, "rb") as file:
        start = file.read(6)
    unpack = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    packed = os.path.getsize(path)
    if unpack is not None:
        with unpack(path, "rb") as file:
            count = 0
            while content := file.read(CHUNK):
                count += len(content)
                check_size(count, packed)
                yield
    with (unpack or open)(path, "rb") as file:
        is_tar = _is_tar_header(file.read(tarfile.BLOCKSIZE))
    if is_tar:
        with (unpack or open)(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            yield from _tar(tar, packed)
    if zipfile.is_zipfile(path):
        yield from _zip(path, packed)


def check_size(unpacked: int, packed: int) -> None:
    """Raises Unreasonable where it is."""
    if unpacked > MAX_BYTES:
        raise Unreasonable(f"unpacks to more than {MAX_BYTES / 2**30:.0f} GiB")
    if unpacked > HARMLESS and unpacked > MAX_RATIO * packed:
        raise Unreasonable(f"unpacks to more than {MAX_RATIO} times its size")


def check_name(name: str) -> None:
    """Raises Unreasonable for a member's path, with forward slashes, that leads out of the folder."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise Unreasonable(f"has a member {name[:100]!r}, outside of where it is unpacked")


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _tar(tar: tarfile.TarFile, packed: int) -> Iterator[None]:
    total = count = 0
    while (member := tar.next()) is not None:
        check_name(member.name)
        if member.issym() or member.islnk():
            base = posixpath.dirname(member.name) if member.issym() else ""
            check_name(posixpath.normpath(posixpath.join(base, member.linkname)))
        elif not (member.isreg() or member.isdir()):
            raise Unreasonable(f"has a member {member.name[:100]!r} that is no file, folder or link")
        if member.size < 0:
            raise Unreasonable(f"has a member {member.name[:100]!r} of {member.size} bytes")
        total, count = total + member.size, count + 1
        check_size(max(total, tar.offset), packed)  # A file with holes is larger than what there is of it, or smaller than it says.
        check_count(count)
        tar.members.clear()  # It would keep them all.
        tar.pax_headers.clear()
        yield


def check_count(count: int) -> None:
    """Raises Unreasonable where an archive has too many members."""
    if count > MAX_MEMBERS:
        raise Unreasonable(f"has more than {MAX_MEMBERS:,} members")


def _zip(path: str, packed: int) -> Iterator[None]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    check_count(len(members))
    total = 0
    for member in members:
        check_name(member.filename.replace("\\", "/"))
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Unreasonable(f"has a member {member.filename[:100]!r} that is no file or folder")
        total += member.file_size
        check_size(total, packed)
    yield
