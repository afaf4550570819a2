"""Archives that would fill the disk or the memory, or write elsewhere, are named in a line; honest ones pass."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import stat
import tarfile
import time
import zipfile
import zlib

import pytest

from wdkd.archives import check_folder, check_published
from wdkd.errors import UsageError


def member(name, **attributes):
    found = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(found, attribute, value)
    return found


def tar(*members, mode="w", size=100):
    """The bytes of a tar archive; files have `size` random bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for found in members:
            if found.isreg():
                found.size = size
            archive.addfile(found, io.BytesIO(random.Random(0).randbytes(size)) if found.isreg() else None)
    return buffer.getvalue()


def zipped(*names, mode=0, content=b"x" * 100):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def zeros(compressor, size=2**28 + 2**24):
    """So many zeros, compressed without ever being there."""
    parts = [compressor.compress(bytes(2**24)) for _ in range(size // 2**24)]
    return b"".join([*parts, compressor.flush()])


def gzip_bomb():
    return zeros(zlib.compressobj(1, zlib.DEFLATED, 31))


def pax_bomb():
    """A tar archive whose first header says that a gigabyte of names follows; compressed, it is a megabyte."""
    head = tarfile.TarInfo("pax")
    head.type, head.size = tarfile.XHDTYPE, 2**30
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    # Less than 200 times as much comes out of it as goes in: that alone is not what stops it.
    return compressor.compress(head.tobuf(tarfile.USTAR_FORMAT) + random.Random(0).randbytes(6 * 2**20)) + zeros(compressor, 2**30)


def odd_header(*, stored, real=None):
    """A tar archive of one file that says it takes `stored` bytes there; with holes, if `real` says how many it has."""
    block = bytearray(tarfile.TarInfo("odd").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(stored, 12, tarfile.GNU_FORMAT)
    if real is not None:
        block[156:157] = tarfile.GNUTYPE_SPARSE
        block[483:495] = tarfile.itn(real, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block) + bytes(10_240)


GOOD = {
    "a.tar": tar(member("a/b"), member("a", type=tarfile.DIRTYPE), member("a/c", type=tarfile.SYMTYPE, linkname="b")),
    "up.tar": tar(member("a/b"), member("a/c/d", type=tarfile.SYMTYPE, linkname="../b"), member("e", type=tarfile.LNKTYPE, linkname="a/b")),
    "a.tar.gz": gzip.compress(tar(member("a..b"), member("..."))),
    "a.tar.xz": lzma.compress(tar(member("a"))),
    "a.tgz.bz2": bz2.compress(tar(member("a"))),
    "a.gz": gzip.compress(random.Random(0).randbytes(10**6)),
    "compressible.gz": gzip.compress(bytes(10**6)),
    "a.zip": zipped("a/b.png", "a/"),
    "a.csv": b"1,2,3\n",
    "noise": random.Random(0).randbytes(10**5),
    "empty": b"",
    "zeros": bytes(10**5),
}
OUTSIDE, NO_FILE, TOO_MUCH, DAMAGED = "outside of where it is unpacked", "that is no file", "unpacks to more than", "cannot be unpacked"
BAD = {
    "absolute.tar": (lambda: tar(member("/etc/passwd")), OUTSIDE),
    "parent.tar": (lambda: tar(member("a/../../x")), OUTSIDE),
    "parent.tar.gz": (lambda: gzip.compress(tar(member("good"), member("../x"))), OUTSIDE),
    "symlink.tar": (lambda: tar(member("a", type=tarfile.SYMTYPE, linkname="/etc")), OUTSIDE),
    "symlink-up.tar": (lambda: tar(member("a/b", type=tarfile.SYMTYPE, linkname="../../x")), OUTSIDE),
    "hardlink.tar": (lambda: tar(member("a/b", type=tarfile.LNKTYPE, linkname="../x")), OUTSIDE),
    "device.tar": (lambda: tar(member("a", type=tarfile.CHRTYPE, devmajor=1, devminor=5)), NO_FILE),
    "pipe.tar": (lambda: tar(member("a", type=tarfile.FIFOTYPE)), NO_FILE),
    "bomb.gz": (gzip_bomb, TOO_MUCH),
    "bomb.bz2": (lambda: zeros(bz2.BZ2Compressor()), TOO_MUCH),
    "bomb.xz": (lambda: zeros(lzma.LZMACompressor()), TOO_MUCH),
    "bomb.zip": (lambda: zipped("zeros", content=bytes(2**28 + 2**20)), TOO_MUCH),
    "pax.tar.gz": (pax_bomb, "MemoryError"),
    "huge.tar": (lambda: odd_header(stored=2**60), TOO_MUCH),
    "negative.tar": (lambda: odd_header(stored=-512), "of -512 bytes"),
    "hole.tar": (lambda: odd_header(stored=0, real=2**50), TOO_MUCH),
    "endless.tar": (lambda: odd_header(stored=2**60, real=0), TOO_MUCH),
    "cut.tar.gz": (lambda: gzip.compress(GOOD["noise"])[:-5000], DAMAGED),
    "flipped.gz": (lambda: flipped(gzip.compress(GOOD["noise"])), DAMAGED),
    "cut.tar": (lambda: tar(member("a"), size=10**5)[:50_000], DAMAGED),
    "slip.zip": (lambda: zipped("a/../../x"), OUTSIDE),
    "backslash.zip": (lambda: zipped("..\\x"), OUTSIDE),
    "absolute.zip": (lambda: zipped("/x"), OUTSIDE),
    "symlink.zip": (lambda: zipped("a", mode=stat.S_IFLNK | 0o777, content=b"/etc/passwd"), NO_FILE),
    "directory.zip": (lambda: damaged_directory(zipped("a", "b")), DAMAGED),
}


def flipped(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def damaged_directory(content):
    """A zip file whose list of members is random bytes."""
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    return content[:start] + random.Random(0).randbytes(end - start) + content[end:]


def test_honest_archives_and_other_files_pass(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("../a.csv")
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / "folder" / name).write_bytes(content)
    check_folder(tmp_path)


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_are_refused_in_seconds_wherever_they_are(tmp_path, name):
    make, text = BAD[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").write_bytes(GOOD["a.csv"])
    (tmp_path / "folder" / name).write_bytes(make())
    start = time.monotonic()
    with pytest.raises(UsageError, match=f"{name}' .*({text})") as caught:
        check_folder(tmp_path)
    assert time.monotonic() - start < 30
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["folder", "a.csv", name])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "a link that leads out of"),
        (lambda path: path.symlink_to("/dev/zero"), "a link that leads out of"),
        (lambda path: path.symlink_to("../outside"), "a link that leads out of"),
        (lambda path: path.symlink_to("odd"), "a link that leads out of"),
        (os.mkfifo, "neither a file nor a folder"),
    ],
)
def test_what_is_no_file_of_the_folder_is_refused(tmp_path, make, text):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "outside").write_text("")
    make(folder / "odd")
    with pytest.raises(UsageError, match=f"odd is {text}.*a folder of their own"):
        check_folder(folder)


def test_links_within_the_folder_are_not_followed_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path)
    check_folder(tmp_path)


def test_a_published_file_is_known_by_its_size_and_digest(tmp_path):
    content = {name: name.encode() * 10 for name in ("one", "two", "three")}
    published = [(len(c), hashlib.sha256(c).hexdigest()) for c in content.values()]
    for name in content:
        (tmp_path / name).write_bytes(content[name])
        check_published(tmp_path / name, published)
    (tmp_path / "one").write_bytes(b"eno" * 10)
    with pytest.raises(UsageError, match="not that of the published file"):
        check_published(tmp_path / "one", published)
    # The digest of one and the size of another are none of them.
    with pytest.raises(UsageError, match="has 30 bytes; the published file has 50"):
        check_published(tmp_path / "two", published[2:])
    with pytest.raises(UsageError, match="cannot be read"):
        check_published(tmp_path / "four", published)
