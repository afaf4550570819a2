"""Records become the images that the set promises, or the set is refused in one line: whatever their bytes are."""

import contextlib
import functools
import io
import os
import random
import struct
import time
import zlib

import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tiny_set import load_tiny as load
from tiny_set import refused_tiny, tiny_images

from wdkd import isolation
from wdkd.errors import UsageError

refused = functools.partial(refused_tiny, seconds=15, words="delete that folder and run python launch/prepare_data.py")


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder


def shard(folder, split="train"):
    return folder / f"tiny_set-{split}.array_record-00000-of-00001"


def rewrite(folder, change):
    """Writes the training split again, its first record changed by `change`."""
    records = ArrayRecordReader(str(shard(folder))).read_all()
    write(folder, [change(records[0]), *records[1:]])


def write(folder, records):
    writer = ArrayRecordWriter(str(shard(folder)), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def with_image(encoded):
    def change(record):
        example = tf_example_pb2.Example.FromString(record)
        example.features.feature["image"].bytes_list.value[:] = [encoded]
        return example.SerializeToString()

    return change


def with_label(*labels):
    def change(record):
        example = tf_example_pb2.Example.FromString(record)
        example.features.feature["label"].int64_list.value[:] = labels
        return example.SerializeToString()

    return change


def encoded(pixels, format, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG file of that size by its header, without any pixels."""

    def chunk(kind, content):
        return struct.pack("!I", len(content)) + kind + content + struct.pack("!I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


GHOSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 12\n%%EndComments\n(/tmp/x) (w) file\n"

IMAGES = {
    "a bomb": (png_header(60_000, 60_000), "image 0 of train is 60000x60000x3|DecompressionBomb"),
    "a smaller bomb": (png_header(9_000, 9_000), "image 0 of train is 9000x9000x3, not 12x10x3"),
    "a larger one": (png_header(10, 13), "is 13x10x3, not 12x10x3"),
    "cut short": (encoded(tiny_images((12, 10, 3), 1, 0)[0], "png")[:-200], "cannot be read"),
    "no pixels": (png_header(10, 12), "cannot be read"),
    "other channels": (encoded(tiny_images((12, 10, 4), 1, 0)[0], "png"), "is 12x10x4, not 12x10x3"),
    "noise": (random.Random(0).randbytes(500), "UnidentifiedImageError"),
    "nothing": (b"", "UnidentifiedImageError"),
    "postscript": (GHOSTSCRIPT, "UnidentifiedImageError"),
    "tiff": (encoded(tiny_images((12, 10, 3), 1, 0)[0], "tiff"), "UnidentifiedImageError"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_odd_images_are_refused(folder, name):
    image, text = IMAGES[name]
    rewrite(folder, with_image(image))
    with peak_below(200):
        assert any(part in refused(folder) for part in text.split("|"))


@contextlib.contextmanager
def peak_below(mebibytes):
    """Within, this process takes no more memory than that, beyond what it had."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # The peak so far is forgotten.
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < mebibytes * 1024


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


@pytest.mark.parametrize("format", ["png", "bmp", "gif", "jpeg"])
def test_the_formats_of_tfds_are_decoded(folder, format):
    pixels = np.full((12, 10, 3), 200, np.uint8)
    rewrite(folder, with_image(encoded(pixels if format != "gif" else pixels[..., 0], format)))
    np.testing.assert_array_equal(load(folder).train_images[0], pixels if format != "gif" else np.zeros_like(pixels))


def test_a_grey_image_among_coloured_ones_has_equal_channels(folder):
    pixels = tiny_images((12, 10), 1, 0)[0]
    rewrite(folder, with_image(encoded(pixels, "png")))
    np.testing.assert_array_equal(load(folder).train_images[0], np.stack([pixels] * 3, axis=-1))


LABELS = {"negative": [-1], "too large": [3], "beyond 32 bits": [2**40], "several": [0, 1], "none": []}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_odd_labels_are_refused(folder, labels):
    rewrite(folder, with_label(*labels))
    with pytest.raises(UsageError, match="labels from|cannot be read"):
        load(folder)


@pytest.mark.parametrize("record", [b"", b"\xff" * 1000, random.Random(0).randbytes(1000)])
def test_records_that_are_no_examples_are_refused(folder, record):
    rewrite(folder, lambda _: record)
    refused(folder)


# --- files --------------------------------------------------------------------------------------------------------------


def test_a_record_that_unpacks_to_half_a_gigabyte_is_refused(folder):
    """Its file has a few kilobytes; this process never has what is in it."""
    write(folder, [bytes(2**29)] + [b""] * 8)
    assert shard(folder).stat().st_size < 2**20
    with peak_below(300):
        text = refused(folder)
    assert "MemoryError" in text or "at most 268,435,456 are read" in text


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name), lambda path: path.mkdir()]
)
def test_what_is_no_file_is_refused_at_once(folder, make):
    shard(folder).unlink()
    make(shard(folder))
    assert "cannot be read" in refused(folder)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_files_are_refused_or_harmless(folder, seed):
    """Cut short, with flipped bits, or with random bytes in their middle."""
    draw, content = random.Random(seed), bytearray(shard(folder).read_bytes())
    place = draw.randrange(len(content))
    if seed % 3 == 0:
        del content[place:]
    elif seed % 3 == 1:
        content[place] ^= 1 << draw.randrange(8)
    else:
        content[place : place + 2000] = draw.randbytes(2000)
    shard(folder).write_bytes(content)
    try:
        np.testing.assert_array_equal(load(folder).train_images, tiny_images((12, 10, 3), 9, 9))
    except UsageError as error:
        assert "cannot be read" in str(error)


# --- the process that reads them ----------------------------------------------------------------------------------------

SCRIPTS = {
    "dies": ("import os; os.abort()", "signal 6"),
    "leaves": ("import os; os._exit(7)", "exit code 7"),
    "hangs": ("import time; time.sleep(1000)", "silent for 1 seconds"),
    "raises": ("raise OSError('a reason')", "OSError: a reason"),
    "fills the memory": ("bytes(2**33)", "MemoryError"),
    "says too much": ("yield bytes(2**29)", "at most 268,435,456 are read"),
    "writes a file": ("open('written', 'wb', 0).write(b'x')", "OSError"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_that_misbehaves_is_ended_and_told_of(monkeypatch, tmp_path, name):
    code, text = SCRIPTS[name]
    script = tmp_path / "script.py"
    script.write_text(f"def answer(question):\n    yield question\n    {code}\n    yield b'never'\n")
    monkeypatch.chdir(tmp_path)
    found, start = [], time.monotonic()
    with pytest.raises(ValueError, match=text):
        for content in isolation.answers(str(script.with_suffix("")), b"asked", silence=1 if name == "hangs" else 30):
            found.append(content)
    assert found == [b"asked"] and time.monotonic() - start < 20
    assert sum(path.stat().st_size for path in tmp_path.glob("written")) == 0


def test_a_process_ends_with_who_asked(tmp_path):
    code = "import os, time\ndef answer(question):\n    yield str(os.getpid()).encode()\n    time.sleep(1000)\n"
    (tmp_path / "script.py").write_text(code)
    messages = isolation.answers(str(tmp_path / "script"), b"")
    process = int(next(messages))
    messages.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
