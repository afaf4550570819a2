"""Which images a folder lists, as which classes; and what a folder must not be like."""

import os
import unicodedata

import pytest

from wdkd import folder
from wdkd.errors import UsageError
from wdkd.folder import list_folder


def made(root, *names):
    """Files of one byte at paths below a folder; what ends in / is a folder."""
    root.mkdir(exist_ok=True)
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    return root


def listed(root):
    found = list_folder(root)
    return found.class_names, {f.name: f.label for f in found.train}, {f.name: f.label for f in found.test}


def refused(root):
    with pytest.raises(UsageError) as caught:
        list_folder(root)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 900 and "; " in text
    return text.replace(str(root), "DIR")


# --- what is found ------------------------------------------------------------------------------------------------------


def test_classes_are_folders_and_images_are_known_by_suffix(tmp_path):
    root = made(tmp_path / "p", "dog/b.PNG", "dog/a.jpeg", "cat/1.jpg", "cat/2.webp", "cat/3.bmp", "cat/notes.txt", "cat/4.gif", "README")
    assert listed(root) == (
        ("cat", "dog"),
        {"cat/1.jpg": 0, "cat/2.webp": 0, "cat/3.bmp": 0, "dog/a.jpeg": 1, "dog/b.PNG": 1},
        {},
    )
    assert list_folder(root).left_out == ("1 files of type without suffix", "1 files of type .gif", "1 files of type .txt")
    assert list_folder(root).labelled


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    root = made(tmp_path / "p", "cat/1.png", "cat/.2.png", "cat/._1.png", "dog/1.png", ".git/a.png", ".DS_Store", "cat/.hidden/1.png")
    assert listed(root)[:2] == (("cat", "dog"), {"cat/1.png": 0, "dog/1.png": 1})
    assert list_folder(root).left_out == ()


def test_a_test_folder_and_a_train_folder(tmp_path):
    plain = made(tmp_path / "plain", "cat/1.png", "dog/1.png", "test/cat/2.png", "test/dog/3.png")
    split = made(tmp_path / "split", "Train/cat/1.png", "Train/dog/1.png", "Test/cat/2.png", "Test/dog/3.png", "val/cat/9.png")
    assert listed(plain) == (("cat", "dog"), {"cat/1.png": 0, "dog/1.png": 1}, {"test/cat/2.png": 0, "test/dog/3.png": 1})
    assert listed(split) == (("cat", "dog"), {"Train/cat/1.png": 0, "Train/dog/1.png": 1}, {"Test/cat/2.png": 0, "Test/dog/3.png": 1})
    assert list_folder(split).left_out == ("val/",)


def test_train_beside_other_classes_is_one_of_them(tmp_path):
    assert listed(made(tmp_path / "p", "bus/1.png", "train/1.png", "test/bus/1.png", "test/train/2.png"))[0] == ("bus", "train")


def test_images_directly_inside_have_no_class(tmp_path):
    root = made(tmp_path / "p", "b.png", "a.jpg", "list.csv")
    assert listed(root) == ((), {"a.jpg": -1, "b.png": -1}, {}) and not list_folder(root).labelled
    made(root, "test/x/1.png", "test/y/1.png")
    assert listed(root) == (("x", "y"), {"a.jpg": -1, "b.png": -1}, {"test/x/1.png": 0, "test/y/1.png": 1})
    assert listed(made(tmp_path / "q", "train/1.png", "test/x/1.png", "test/y/1.png"))[1] == {"train/1.png": -1}


def test_names_in_any_language_are_sorted_in_composed_form(tmp_path):
    names = ["кот", "犬", "Äpfel", "qué", "می‌خواهم", "🐈", "zebra", " a b "]
    root = made(tmp_path / "p", *(f"{unicodedata.normalize('NFD', name)}/Bild ä.png" for name in names))
    assert listed(root)[0] == tuple(sorted(unicodedata.normalize("NFC", name).strip() for name in names))


def test_links_are_followed_inside_of_the_folder(tmp_path):
    root = made(tmp_path / "p", "cat/1.png", "dog/1.png")
    (root / "dog" / "2.png").symlink_to("../cat/1.png")
    (tmp_path / "link").symlink_to(root)
    assert listed(tmp_path / "link")[1] == {"cat/1.png": 0, "dog/1.png": 1, "dog/2.png": 1}


def test_the_digest_is_of_names_sizes_and_times_and_not_of_the_place(tmp_path):
    root = made(tmp_path / "p", "cat/1.png", "dog/1.png")
    digests = [list_folder(root).digest]
    os.utime(root / "cat" / "1.png", ns=(1, 1))
    digests.append(list_folder(root).digest)
    (root / "cat" / "1.png").write_bytes(b"xy")
    os.utime(root / "cat" / "1.png", ns=(1, 1))
    digests.append(list_folder(root).digest)
    (root / "cat").rename(root / "cow")
    digests.append(list_folder(root).digest)
    made(root, "test/cow/1.png", "test/dog/1.png")
    digests.append(list_folder(root).digest)
    assert len(set(digests)) == 5
    root.rename(tmp_path / "q")
    assert list_folder(tmp_path / "q").digest == digests[-1]


# --- what is refused ----------------------------------------------------------------------------------------------------

TWO = ("cat/1.png", "dog/1.png")
REFUSED = {
    "nothing": ([], "DIR holds no images (png, jpg, jpeg, webp or bmp) and no folders of them; give a folder that has one folder for each"),
    "other files alone": (["a.gif"], "DIR holds no images"),
    "one class": (["cat/1.png"], "DIR has one class, 'cat'; there must be at least 2"),
    "one class and a test folder": (["cat/1.png", "test/cat/1.png"], "DIR has one class, 'cat'"),
    "an empty class": ([*TWO, "cow/", "eel/a.gif"], "DIR has no images (png, jpg, jpeg, webp or bmp) in cow, eel; add some, or delete"),
    "a folder inside a class": ([*TWO, "dog/more/2.png"], "DIR/dog/more is a folder inside a class; move its images up into dog"),
    "a class that is a file": ([*TWO, "cow"], "DIR/cow is a file where the folder of a class belongs; move it away"),
    "images beside classes": ([*TWO, "x.png", "y.png"], "DIR has 2 images beside the folders of classes, first x.png; move them"),
    "images beside train": (["train/cat/1.png", "x.png"], "DIR has images beside train/, first x.png; move them"),
    "spelled in two cases": ([*TWO, "Cat/1.png"], "DIR has two classes that differ in spelling alone, 'Cat' and 'cat'; rename or merge"),
    "spelled in two forms": (["caf\u00e9/1.png", "cafe\u0301/1.png"], r"differ in spelling alone, 'cafe\u0301' and 'caf\xe9'; rename"),
    "a name of two lines": ([*TWO, "a\nb/1.png"], r"'DIR/a\nb' is a folder whose name cannot be that of a class; rename it"),
    "a name that is no Unicode": ([*TWO, os.fsdecode(b"a\xff") + "/1.png"], r"a\udcff' is a folder whose name cannot be"),
    "a blank name": ([*TWO, "  /1.png"], "is a folder whose name cannot be that of a class"),
    "a test folder without classes": ([*TWO, "test/1.png"], "DIR/test has images of its own, first test/1.png; it must have one folder"),
    "an empty test folder": ([*TWO, "test/"], "DIR/test has no folders; it must have one folder for each class, or be moved away"),
    "a class of test alone": (
        [*TWO, "test/cat/1.png", "test/dogs/1.png"],
        "DIR/test has a class 'dogs', which training has not; did you mean 'dog'?",
    ),
    "a class without test images": (
        [*TWO, "cow/1.png", "test/cat/1.png", "test/dog/1.png"],
        "DIR/test lacks the classes cow; add them, or",
    ),
    "an empty class of test": ([*TWO, "test/cat/1.png", "test/dog/"], "DIR/test has no images (png, jpg, jpeg, webp or bmp) in dog"),
}


@pytest.mark.parametrize(("names", "words"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_makes_no_sense_is_refused(tmp_path, names, words):
    assert words in refused(made(tmp_path / "p", *names))


@pytest.mark.parametrize("target", ["../outside.png", "/etc/hostname", "missing.png", "2.png"])
def test_a_link_that_leads_out_or_nowhere_is_refused(tmp_path, target):
    made(tmp_path, "outside.png")
    root = made(tmp_path / "p", *TWO)
    (root / "dog" / "2.png").symlink_to(target)
    assert "DIR/dog/2.png is a link that leads nowhere or out of DIR; put the file itself there" in refused(root)


def test_a_link_to_a_folder_outside_is_refused(tmp_path):
    made(tmp_path / "more", "1.png")
    root = made(tmp_path / "p", *TWO)
    (root / "cow").symlink_to(tmp_path / "more")
    assert "DIR/cow is a link that leads nowhere or out of DIR" in refused(root)


def test_what_is_no_folder_is_refused(tmp_path):
    made(tmp_path, "file")
    assert refused(tmp_path / "missing") == "DIR does not exist, or cannot be reached; give the folder that has one folder for each class"
    assert refused(tmp_path / "file") == "DIR is a file; give the folder that has one folder for each class"
    (tmp_path / "loop").symlink_to("loop")
    assert "DIR does not exist, or cannot be reached" in refused(tmp_path / "loop")


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    root, scandir = made(tmp_path / "p", *TWO), os.scandir

    def denied(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # The tests may run as root, who may read everything.
    assert refused(root) == "DIR/dog cannot be read: Permission denied; restore it or its permissions"


def test_more_than_the_limits_are_refused(tmp_path, monkeypatch):
    root = made(tmp_path / "p", *TWO, "cow/1.png")
    monkeypatch.setattr(folder, "MAX_CLASSES", 2)
    assert refused(root) == "DIR has 3 classes; there must be 2 to 2"
    monkeypatch.setattr(folder, "MAX_ENTRIES", 2)
    assert refused(root) == "DIR holds more than 2 files; give a smaller folder"
