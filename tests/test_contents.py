"""The images of a folder as arrays: broken ones, held-out ones, grey ones, and a folder that changes while it is read."""

import itertools

import numpy as np
import pytest
from PIL import Image

from wdkd import contents
from wdkd.contents import read_contents
from wdkd.errors import UsageError
from wdkd.folder import list_folder
from wdkd.subset import held_out


def pixels(seed, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (9, 8, channels), dtype=np.uint8)


def folder_of(root, counts, channels=3, suffix="png"):
    """A folder of `counts` {place: images}, each image known by its number."""
    numbers = itertools.count()
    for place, count in counts.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for _, number in zip(range(count), numbers, strict=False):
            image = pixels(number, channels)
            Image.fromarray(image[..., 0] if channels == 1 else image).save(root / place / f"{number:03}.{suffix}")
    return root


def read(root, channels=None, share=0.25):
    return read_contents(list_folder(root), (9, 8), channels, share)


def refused(root, **options):
    with pytest.raises(UsageError) as caught:
        read(root, **options)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    return str(caught.value).replace(str(root), "DIR")


def test_images_come_by_class_and_name_with_their_labels(tmp_path):
    found = read(folder_of(tmp_path / "p", {"dog": 2, "cat": 3, "test/cat": 1, "test/dog": 2}))
    assert found.class_names == ("cat", "dog")
    np.testing.assert_array_equal(found.train_images, [pixels(number) for number in (2, 3, 4, 0, 1)])
    np.testing.assert_array_equal(found.train_labels, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(found.test_images, [pixels(number) for number in (5, 6, 7)])
    np.testing.assert_array_equal(found.test_labels, [0, 1, 1])
    assert (found.facts.train, found.facts.test, found.facts.held_out, found.facts.remarks()) == ([3, 2], [1, 2], 0, [])


def test_images_that_are_all_grey_have_one_channel_unless_asked_otherwise(tmp_path):
    root = folder_of(tmp_path / "p", {"cat": 3, "dog": 3}, channels=1)
    assert read(root).train_images.shape[1:] == (9, 8, 1)
    assert read(root, channels=3).train_images.shape[1:] == (9, 8, 3)
    Image.fromarray(pixels(0, 1).repeat(3, -1)).save(root / "cat" / "rgb.png")
    assert read(root).train_images.shape[1:] == (9, 8, 1)
    folder_of(root, {"cat": 1})
    assert read(root).train_images.shape[1:] == (9, 8, 3)
    assert read(root, channels=1).train_images.shape[1:] == (9, 8, 1)


def test_without_a_test_folder_a_share_of_each_class_is_held_out(tmp_path):
    root = folder_of(tmp_path / "p", {"cat": 40, "dog": 4})
    found = read(root)
    together = np.concatenate([found.train_images, found.test_images])
    assert sorted(image.tobytes() for image in together) == sorted(pixels(number).tobytes() for number in range(44))
    assert min(found.facts.train + found.facts.test) > 0 and found.facts.held_out == len(found.test_images)
    expected = held_out(
        [f"cat/{i:03}.png" for i in range(40)] + [f"dog/{i:03}.png" for i in range(40, 44)], np.repeat([0, 1], [40, 4]), 0.25
    )
    np.testing.assert_array_equal(found.test_images, [pixels(number) for number in np.flatnonzero(expected)])
    (line,) = found.facts.remarks()
    assert line.startswith(f"no test folder: {expected.sum()} of 44 images (about ") and "held out for evaluation" in line


def test_what_cannot_be_read_is_left_out_and_named(tmp_path):
    root = folder_of(tmp_path / "p", {"cat": 12, "dog": 13, "test/cat": 1, "test/dog": 1})
    for number in range(11):
        (root / "cat" / f"{number:03}.png").write_bytes(b"broken")
    found = read(root)
    np.testing.assert_array_equal(found.train_images[0], pixels(11))
    assert (found.facts.train, found.facts.unreadable, len(found.facts.first_unreadable)) == ([1, 13], 11, 10)
    (line,) = found.facts.remarks()
    assert line.startswith("11 of 27 images cannot be read: cat/000.png (it is no PNG, JPEG, WebP or BMP image), cat/001.png")
    assert line.endswith("cat/009.png (it is no PNG, JPEG, WebP or BMP image) and 1 more; they are left out")
    found.facts.check("p", 0.41)
    with pytest.raises(
        UsageError, match="^p: 11 of 27 images cannot be read: .*; that is more than data.max_unreadable, 0.4 of all: restore"
    ):
        found.facts.check("p", 0.4)
    (root / "cat" / "011.png").write_bytes(b"broken")
    assert "DIR has no image of class 'cat' left to train on (12 cannot be read, first cat/000.png (it is no" in refused(root)


def test_animated_images_and_other_files_are_counted(tmp_path):
    root = folder_of(tmp_path / "p", {"cat": 3, "dog": 3, "test/cat": 1, "test/dog": 1})
    frames = [Image.fromarray(pixels(seed)) for seed in (50, 51)]
    frames[0].save(root / "cat" / "999.png", save_all=True, append_images=frames[1:])
    (root / "cat" / "a.heic").write_bytes(b"x")
    found = read(root)
    np.testing.assert_array_equal(found.train_images[3], pixels(50))
    assert found.facts.remarks() == ["of 1 animated images the first frame is taken", "left out: 1 files of type .heic"]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"cat": 5, "dog": 1}, "DIR has no image of class 'dog' left to evaluate on; there must be at least 2, or a test folder: add some"),
        ({"": 1}, "DIR has no image left to evaluate on; there must be at least 2"),
    ],
)
def test_too_few_to_hold_some_out_are_refused(tmp_path, counts, words):
    assert words in refused(folder_of(tmp_path / "p", counts))


def test_images_without_labels(tmp_path):
    found = read(folder_of(tmp_path / "p", {"": 30}))
    assert set(found.train_labels) == set(found.test_labels) == {-1} and found.class_names == ()
    assert found.facts.train == [len(found.train_images)] and not found.facts.train_labelled and not found.facts.test_labelled
    assert any("accuracy is not known" in line for line in found.facts.remarks())
    found = read(folder_of(tmp_path / "q", {"": 3, "test/a": 1, "test/b": 2}))
    assert set(found.train_labels) == {-1} and found.test_labels.tolist() == [0, 1, 1] and found.class_names == ("a", "b")
    assert found.facts.test_labelled and found.facts.test == [1, 2]


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    root, read_image = folder_of(tmp_path / "p", {"cat": 3, "dog": 3}), contents.read_image

    def meanwhile(path, *options):
        (root / "dog" / "005.png").unlink(missing_ok=True)
        return read_image(path, *options)

    monkeypatch.setattr(contents, "read_image", meanwhile)
    assert refused(root) == "DIR has changed while it was read; wait until it does not, then the same command goes on"


def test_more_than_fits_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "p", {"cat": 3, "dog": 3})
    monkeypatch.setattr(contents, "MAX_BYTES", 6 * 9 * 8 * 3)
    read(root)
    monkeypatch.setattr(contents, "MAX_BYTES", 6 * 9 * 8 * 3 - 1)
    assert "DIR has 6 images, 0.0 GiB as 9x8x3; at most 0 GiB fit: give a smaller --data.image-size" in refused(root)
