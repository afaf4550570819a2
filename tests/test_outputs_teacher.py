"""Outputs in a file are those of the images that they are said to be of, or a line says why not."""

import os

import numpy as np
import pytest

from wdkd import outputs_teacher
from wdkd.config import TeacherInputConfig
from wdkd.errors import UsageError
from wdkd.outputs_teacher import read_outputs_teacher

NAMES = ("ant", "bee", "cat")
TOTAL = 12
LOGITS = np.random.default_rng(0).normal(size=(TOTAL, 3)).astype(np.float32)
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
CHOSEN = np.array([1, 4, 7, 10])


def read(path, classes=None, indices=CHOSEN, **options):
    options = TeacherInputConfig(classes=classes, **options)
    return read_outputs_teacher(str(path), options, image_shape=(8, 8, 1), class_names=NAMES, indices=indices, total=TOTAL)


def npz(folder, **arrays):
    path = folder / "said.npz"
    np.savez(path, **arrays)
    return path


def csv(folder, rows, head="index,ant,bee,cat"):
    path = folder / "said.csv"
    path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_a_row_for_each_image_of_the_training_split(tmp_path):
    teacher = read(npz(tmp_path, logits=LOGITS))
    np.testing.assert_array_equal(teacher.outputs, LOGITS[CHOSEN])
    assert teacher.apply is None and teacher.accuracy is None and teacher.outputs.dtype == np.float32 and teacher.classes == 3
    probable = read(npz(tmp_path, probabilities=PROBABILITIES))
    np.testing.assert_allclose(softmax(probable.outputs), PROBABILITIES[CHOSEN], rtol=1e-5)
    assert probable.hash != teacher.hash


def test_rows_in_any_order_are_found_by_their_indices(tmp_path):
    rows = np.array([10, 7, 3, 1, 4])
    teacher = read(npz(tmp_path, logits=LOGITS[rows].astype(np.float64), indices=rows))
    np.testing.assert_array_equal(teacher.outputs, LOGITS[CHOSEN])
    lines = [[row, *LOGITS[row].tolist()] for row in rows]
    np.testing.assert_allclose(read(csv(tmp_path, lines)).outputs, LOGITS[CHOSEN], rtol=1e-6)


def test_columns_are_found_by_the_classes_names(tmp_path):
    order = [2, 0, 1]
    np.testing.assert_array_equal(read(npz(tmp_path, logits=LOGITS[:, order]), classes=("cat", "ant", "bee")).outputs, LOGITS[CHOSEN])
    lines = [[*PROBABILITIES[row][order].round(4).tolist(), row] for row in CHOSEN]
    found = read(csv(tmp_path, lines, head="\ufeffcat, ant ,bee,index"))
    np.testing.assert_allclose(softmax(found.outputs), PROBABILITIES[CHOSEN], atol=1e-3)


def test_a_probability_of_zero_has_a_finite_logarithm(tmp_path):
    certain = np.eye(3)[np.arange(TOTAL) % 3]
    teacher = read(npz(tmp_path, probabilities=certain))
    assert np.isfinite(teacher.outputs).all() and (teacher.outputs.argmax(1) == CHOSEN % 3).all()


BAD_NPZ = {
    "no indices": ({"logits": LOGITS[:5]}, "has 5 rows and no indices, and the training split 12 images"),
    "an image is missing": ({"logits": LOGITS[:10], "indices": np.arange(10)}, "has no row for 1 of the 4 images of this subset, first 10"),
    "an image twice": ({"logits": LOGITS, "indices": np.array([*range(11), 4])}, "has 2 rows for image 4"),
    "no such image": ({"logits": LOGITS, "indices": np.arange(12) + 1}, "has a row for image 12; the training split has images 0 to 11"),
    "a negative index": ({"logits": LOGITS, "indices": np.arange(12) - 1}, "has a row for image -1"),
    "other classes": ({"logits": np.ones((TOTAL, 4))}, "has 4 classes and the data 3"),
    "another length of indices": ({"logits": LOGITS, "indices": np.arange(5)}, "indices is int64 (5,); it must be whole numbers, one for"),
    "indices that are none": ({"logits": LOGITS, "indices": np.arange(12) + 0.5}, "indices is float64 (12,)"),
    "both": ({"logits": LOGITS, "probabilities": PROBABILITIES}, "it must have one of logits, probabilities"),
    "neither": ({"scores": LOGITS}, "has the arrays scores; it must have one of"),
    "not finite": ({"logits": np.where(np.arange(TOTAL)[:, None] == 3, np.nan, LOGITS)}, "1 of 12 rows are not finite, first row 3"),
    "no probabilities": ({"probabilities": PROBABILITIES * 2}, "12 of 12 rows are no probabilities, first row 0, which sums to 2"),
    "negative": ({"probabilities": LOGITS - LOGITS.mean(1, keepdims=True) + 1 / 3}, "rows are no probabilities"),
    "words": ({"logits": np.array([["a"] * 3] * TOTAL)}, "it must be numbers, (images, classes)"),
    "a vector": ({"logits": LOGITS[:, 0]}, "logits is float32 (12,); it must be numbers, (images, classes)"),
    "pickled": ({"logits": np.array([[{}] * 3] * TOTAL, object)}, "is no .npz file or is damaged"),
}


def refused(path, words, **options):
    with pytest.raises(UsageError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert words in text and text.isprintable() and len(text) < 900, text


@pytest.mark.parametrize("name", BAD_NPZ)
def test_outputs_that_do_not_match_the_images_are_refused(name, tmp_path):
    arrays, words = BAD_NPZ[name]
    refused(npz(tmp_path, **arrays), words)


def test_files_that_are_none_are_refused(tmp_path, monkeypatch):
    path = npz(tmp_path, logits=LOGITS)
    content = path.read_bytes()
    for wrong in (b"", b"hello", content[: len(content) // 2]):
        path.write_bytes(wrong)
        refused(path, "is no .npz file or is damaged")
    np.savez_compressed(path, logits=np.zeros((TOTAL, 3), np.float64), padding=np.zeros(10**5))
    monkeypatch.setattr(outputs_teacher, "LIMIT", 10_000)
    assert path.stat().st_size < 10_000
    refused(path, "bytes when unpacked")
    path.unlink()
    refused(path, "does not exist; give an .npz or .csv file of outputs")
    os.mkfifo(path)
    refused(path, "is no regular file")


@pytest.mark.parametrize(
    ("head", "rows", "words"),
    [
        ("ant,bee,cat", [[1, 2, 3]], "has no column 'index'; it must have 'index' and one column per class by name"),
        ("index,ant,bee", [[1, 2, 3]], "has no column for cat"),
        ("index,ant,bee,cat,dog", [[1, 2, 3, 4, 5]], "has columns of no class: dog"),
        ("index,ant,bee,cat,cat", [[1, 2, 3, 4, 5]], "has a name twice"),
        ("index,ant,bee,cat", [[1, 2, 3, 4], [4, 2, "x", 4]], "row 3 is not an index and 3 numbers: 4,2,x,4"),
        ("index,ant,bee,cat", [[1, 2, 3]], "row 2 is not an index and 3 numbers"),
        ("index,ant,bee,cat", [[1.5, 2, 3, 4]], "row 2 is not an index"),
        ("index,ant,bee,cat", [[1, 2, "nan", 4]], "rows are not finite"),
        ("index,ant,bee,cat", [], "has no row for 4 of the 4 images"),
    ],
)
def test_tables_of_another_form_are_refused(head, rows, words, tmp_path):
    refused(csv(tmp_path, rows, head), words)


def test_tables_that_are_none_are_refused(tmp_path):
    path = tmp_path / "said.csv"
    for content in (b"", b"\xff\xfe\x00\x01"):
        path.write_bytes(content)
        refused(path, "is no .csv file")
    refused(csv(tmp_path, [[1, 2, 3, 4]]), "teacher_input.classes is given, but the columns", classes=("cat", "ant", "bee"))
    refused(npz(tmp_path, logits=LOGITS), "teacher_input.classes lacks 'cat'", classes=("ant", "bee", "dog"))
