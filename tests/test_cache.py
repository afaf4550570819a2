"""Folders in the cache appear whole or not at all, what killed processes have left goes, and nothing outside is touched."""

import os
import time

import numpy as np
import pytest
from conftest import files

from wdkd.arrays import header, map_array, read_array, write_array
from wdkd.cache import ABANDONED, cache_directory, discard, publish, temporary_beside

# --- folders ------------------------------------------------------------------------------------------------------------


def leave(parent, name, age):
    """A folder that a process left there so many seconds ago."""
    folder = parent / name
    (folder / "deep").mkdir(parents=True)
    (folder / "file").write_text("half")
    for path in (folder / "file", folder / "deep", folder):
        os.utime(path, (time.time() - age,) * 2)
    return folder


def test_what_killed_processes_left_goes_after_a_day(tmp_path):
    old = leave(tmp_path, ".unfinished-old", ABANDONED + 60)
    young = leave(tmp_path, ".unfinished-young", ABANDONED - 600)
    written = leave(tmp_path, ".unfinished-written", ABANDONED + 60)
    (written / "file").write_text("more")
    os.utime(written, (0, 0))
    other = leave(tmp_path, "finished", ABANDONED + 60)
    with temporary_beside(tmp_path / "new") as temporary:
        assert temporary.is_dir() and not old.exists()
        assert young.is_dir() and written.is_dir() and other.is_dir()
    assert not temporary.exists()


def test_links_and_files_of_that_name_are_left_alone(tmp_path):
    outside = leave(tmp_path / "outside", "folder", ABANDONED + 60)
    parent = tmp_path / "cache"
    parent.mkdir()
    (parent / ".unfinished-link").symlink_to(outside)
    (parent / ".unfinished-broken").symlink_to("nowhere")
    (parent / ".unfinished-file").write_text("")
    os.utime(parent / ".unfinished-file", (0, 0))
    os.mkfifo(parent / ".unfinished-pipe")
    inside = leave(parent, ".unfinished-old", ABANDONED + 60)
    (inside / "link").symlink_to(outside)
    os.utime(inside / "link", (0, 0), follow_symlinks=False)
    os.utime(inside, (0, 0))
    before = files(tmp_path / "outside")
    with temporary_beside(parent / "new"):
        pass
    assert not inside.exists() and files(tmp_path / "outside") == before
    assert len(list(parent.iterdir())) == 4


def test_a_link_is_discarded_and_not_what_it_points_to(tmp_path):
    outside = leave(tmp_path, "outside", 0)
    (tmp_path / "link").symlink_to(outside)
    before = files(outside)
    discard(tmp_path / "link")
    assert not os.path.lexists(tmp_path / "link") and files(outside) == before
    discard(outside)
    discard(tmp_path / "nothing")
    assert not outside.exists()


def test_the_first_to_publish_stays(tmp_path):
    for text in ("first", "second"):
        with temporary_beside(tmp_path / "folder") as temporary:
            (temporary / "file").write_text(text)
            publish(temporary, tmp_path / "folder")
    assert files(tmp_path / "folder") == {"file": b"first"}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError), temporary_beside(tmp_path / "file") as temporary:
        publish(temporary, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("value", ["~nobody-of-that-name/cache", "~/x", "/tmp/x"])
def test_the_environment_says_where_whatever_it_says(monkeypatch, value):
    monkeypatch.setenv("WDKD_CACHE_DIR", value)
    assert str(cache_directory()) == os.path.expanduser(value)


# --- arrays -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.uint16])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (1, 1)])
def test_arrays_are_read_as_written_and_as_numpy_writes_them(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    write_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "numpy.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    for read in (read_array, map_array):
        found = read(tmp_path / "ours.npy", shape, np.dtype(dtype))
        assert found.dtype == dtype and found.shape == shape
        np.testing.assert_array_equal(found, array)


def test_transposed_arrays_are_written_in_their_own_order(tmp_path):
    array = np.arange(6).reshape(2, 3).T
    write_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy", (3, 2), array.dtype), array)


@pytest.mark.parametrize("read", [read_array, map_array])
def test_a_file_of_another_shape_type_or_size_is_refused_unread(tmp_path, read):
    path, expected = tmp_path / "a.npy", np.dtype(np.int32)
    good = header((4,), expected) + bytes(16)
    path.write_bytes(good)
    assert read(path, (4,), expected).shape == (4,)
    for content in (
        header((2, 2), expected) + bytes(16),
        header((4,), np.dtype(np.float32)) + bytes(16),
        header((10**15,), expected) + bytes(16),
        good[:-1],
        good + b"\0",
        good.replace(b"False", b"True "),
        good.replace(b"<i4", b"|O4"),
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.npy holds no array of shape"):
            read(path, (4,), expected)
