"""A folder of images as a data set: prepared once, found again, and trained on as any other."""

import dataclasses
import io
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import method_config
from PIL import Image
from sklearn.datasets import load_digits

from wdkd import prepared_folder
from wdkd.config import DataConfig
from wdkd.data import few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_checkpoint
from wdkd.report import main_report
from wdkd.result import results_path, write_result
from wdkd.run_directory import read_run, read_teacher, read_trained
from wdkd.teacher import inference
from wdkd.train import run
from wdkd.verify import verify

DIGITS = load_digits()
PIXELS = np.rint(DIGITS.images * (255 / 16)).astype(np.uint8)[..., None]
TRAIN, TEST = np.arange(120), np.arange(200, 260)


def write(root, labelled=True, tested=True):
    """Digits as PNG files; without classes, they are in the same order."""
    for rows, place in ((TRAIN, ""), (TEST, "test")) if tested else ((TRAIN, ""),):
        for row in rows:
            label = DIGITS.target[row]
            path = root / place / (f"{label}/{row:04}.png" if labelled or place else f"{label}-{row:04}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[row, ..., 0]).save(path)
    return root


def by_class(rows):
    return rows[np.argsort(DIGITS.target[rows], kind="stable")]


def data(folder, **edits):
    options = {"name": "folder", "folder": str(folder), "image_size": (8,), "validation_size": 0, "n_per_class": None}
    return DataConfig(**options | edits)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WDKD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def equal(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("train_images", "train_labels", "test_images", "test_labels")
    )


# --- prepared -----------------------------------------------------------------------------------------------------------


def test_a_folders_images_are_those_in_its_files(tmp_path):
    dataset = load_dataset(data(write(tmp_path / "my digits")))
    assert (dataset.name, dataset.class_names) == ("my-digits", tuple("0123456789"))
    np.testing.assert_array_equal(dataset.train_images, PIXELS[by_class(TRAIN)])
    np.testing.assert_array_equal(dataset.train_labels, DIGITS.target[by_class(TRAIN)])
    np.testing.assert_array_equal(dataset.test_images, PIXELS[by_class(TEST)])
    np.testing.assert_array_equal(dataset.test_labels, DIGITS.target[by_class(TEST)])


def test_it_is_read_once_wherever_it_is_and_again_when_it_changes(tmp_path, monkeypatch):
    folder, reads, read_contents = write(tmp_path / "a", tested=False), [], prepared_folder.read_contents

    def counted(*arguments):
        reads.append(arguments)
        return read_contents(*arguments)

    monkeypatch.setattr(prepared_folder, "read_contents", counted)
    first = load_dataset(data(folder))
    folder = folder.rename(tmp_path / "b")
    assert equal(load_dataset(data(folder)), first) and len(reads) == 1
    Image.fromarray(PIXELS[500, ..., 0]).save(folder / "0" / "new.png")
    more = load_dataset(data(folder))
    assert len(more.train_labels) + len(more.test_labels) == 121 and len(reads) == 2
    load_dataset(data(folder, channels=3))
    load_dataset(data(folder, image_size=(8, 10)))
    load_dataset(data(folder, test_share=0.3))
    assert len(reads) == 5


def test_what_takes_long_is_announced_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepared_folder, "MANY", 180)
    folder = write(tmp_path / "p")
    for _ in range(2):
        load_dataset(data(folder))
    line = "note: p: 180 images are read and prepared; the next start takes them from the cache\n"
    assert capsys.readouterr().err == line


def test_what_is_to_be_said_is_said_each_time(tmp_path, capsys):
    folder = write(tmp_path / "p", tested=False)
    (folder / "0" / "broken.png").write_bytes(b"x")
    for _ in range(2):
        load_dataset(data(folder))
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("note: p: 1 of 121 images cannot be read: 0/broken.png (it is no PNG, JPEG, WebP or BMP image); they")
        assert "images (about" in lines[1] and len(lines) == 2
    with pytest.raises(UsageError, match="p: 1 of 121 images cannot be read: .*; that is more than data.max_unreadable, 0.005 of all"):
        load_dataset(data(folder, max_unreadable=0.005))


def test_too_many_broken_files_leave_nothing_behind(tmp_path, cache):
    folder = write(tmp_path / "p", tested=False)
    for row in TRAIN[:20]:
        (folder / str(DIGITS.target[row]) / f"{row:04}.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="20 of 120 images cannot be read"):
        load_dataset(data(folder))
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_what_was_prepared_and_is_damaged_is_made_again(tmp_path, cache, capsys):
    folder = write(tmp_path / "p")
    first = load_dataset(data(folder))
    for pattern in ("folder.json", "dataset_info.json", "*array_record*"):
        (damaged,) = cache.glob(f"folders/*/1.0.0/{pattern}") if "*" not in pattern else [next(cache.glob(f"folders/*/1.0.0/{pattern}"))]
        damaged.write_bytes(b"x" * 50)
        shutil.rmtree(cache / "arrays")
        assert equal(load_dataset(data(folder)), first)
    assert "are damaged" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WDKD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert len(load_dataset(data(write(tmp_path / "p"))).train_labels) == 120


def test_of_a_folder_that_is_gone_what_was_prepared_last_is_used(tmp_path, capsys):
    folder = write(tmp_path / "p")
    first = load_dataset(data(folder))
    folder.rename(tmp_path / "q")
    assert equal(load_dataset(data(folder)), first)
    assert f"{folder} is no longer there; the images that were prepared from it last are used" in capsys.readouterr().err
    with pytest.raises(UsageError, match="p does not exist, or cannot be reached; give the folder that has one folder for each class"):
        load_dataset(data(folder, channels=3))


# --- trained on ---------------------------------------------------------------------------------------------------------


class Same(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The same images as a user's own TFDS set."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image, label = tfds.features.Image(shape=(8, 8, 1)), tfds.features.ClassLabel(names=list("0123456789"))
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label}), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(by_class(TRAIN)), "test": self._generate_examples(by_class(TEST))}

    def _generate_examples(self, rows):
        for key, row in enumerate(rows):
            file = io.BytesIO()
            Image.fromarray(PIXELS[row, ..., 0]).save(file, format="png")
            yield key, {"image": io.BytesIO(file.getvalue()), "label": int(DIGITS.target[row])}


def config(teacher, dataset, method="kd", **edits):
    return dataclasses.replace(method_config(method, teacher, **edits), data=dataset)


@pytest.fixture(scope="module")
def labelled(teacher_run, tmp_path_factory):
    """(folder, directory, result) of a student from a folder with classes and a test folder."""
    base = tmp_path_factory.mktemp("labelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WDKD_CACHE_DIR", str(base / "cache"))
        folder = write(base / "photos")
        return folder, base / "run", run(config(teacher_run[0], data(folder)), base / "run", show_progress=False)


def test_a_distillation_ends_as_from_the_same_images_in_a_tfds_set(labelled, teacher_run, tmp_path):
    Same(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    same = DataConfig(name="same", data_dir=str(tmp_path / "tfds"), validation_size=0, n_per_class=None)
    result = run(config(teacher_run[0], same), tmp_path / "run", show_progress=False)
    _, _, found = labelled
    assert found.dataset == "photos" and found.train_size == 120
    for name in ("evaluation", "parameter_hash", "subset_hash", "parameters"):
        assert getattr(found, name) == getattr(result, name), name


def test_labels_are_not_needed_to_learn_from_a_teacher(labelled, teacher_run, tmp_path):
    folder = write(tmp_path / "p", labelled=False)
    result = run(config(teacher_run[0], data(folder)), tmp_path / "run", show_progress=False)
    assert result.parameter_hash == labelled[2].parameter_hash and result.evaluation == labelled[2].evaluation


def test_without_any_labels_agreement_is_what_is_known(teacher_run, tmp_path):
    folder = write(tmp_path / "p", labelled=False, tested=False)
    asked, directory = config(teacher_run[0], data(folder)), tmp_path / "run"
    result = run(asked, directory, show_progress=False)
    found = result.evaluation
    assert (found.accuracy, found.ece, found.confusion, found.per_class_accuracy) == (None, None, [], [])
    assert found.class_names == [str(number) for number in range(10)]
    held = load_dataset(asked.data).test_images
    student, teacher = read_trained(directory), read_teacher(teacher_run[0])
    x = held.astype(np.float32) / 255
    said = [
        np.argmax(apply(v, x).logits, -1)
        for apply, v in ((inference(student.model), student.variables), (teacher.apply, teacher.variables))
    ]
    assert found.count == len(held) and found.agreement == pytest.approx(np.mean(said[0] == said[1]))
    assert run(asked, directory, show_progress=False) == result  # As it is read from its file.
    assert evaluate_checkpoint(directory).evaluation == found
    write_result(results_path(tmp_path / "results", result), result)
    with pytest.raises(
        UsageError, match="none usable .*its images have no labels, so there is no accuracy, but agreement with the teacher of"
    ):
        main_report(tmp_path / "results")
    shutil.copytree(directory, tmp_path / "alone")
    stored = (tmp_path / "alone" / "config.json").read_text()
    (tmp_path / "alone" / "config.json").write_text(stored.replace(str(teacher_run[0]), str(tmp_path / "missing")))
    with pytest.raises(UsageError, match="images have no labels, so agreement with a teacher is all that can be measured; give --teacher"):
        evaluate_checkpoint(tmp_path / "alone")


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"method": "ce"}, "method 'ce' learns from labels, and the training images of p have none; put them into"),
        ({"method__loss": "ce"}, "method.loss 'ce' learns from labels"),
        ({"method": "ab", "method__loss": "ce"}, "method.loss 'ce' learns from labels"),
    ],
)
def test_methods_that_need_labels_are_refused_without(teacher_run, tmp_path, edits, words):
    folder = write(tmp_path / "p", labelled=False, tested=False)
    with pytest.raises(UsageError, match=words):
        run(config(teacher_run[0], data(folder), **edits), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json"))


def test_a_teacher_of_another_shape_is_refused_with_the_options_that_give_it(teacher_run, tmp_path):
    folder = write(tmp_path / "p")
    for edits in ({"image_size": (16,)}, {"channels": 3}):
        with pytest.raises(UsageError, match="takes 8×8×1 images and the data has .*; give --data.image-size 8 8 --data.channels 1"):
            run(config(teacher_run[0], data(folder, **edits)), tmp_path / "run", show_progress=False)


def test_a_number_for_each_class_is_refused_where_there_are_none(tmp_path):
    asked = data(write(tmp_path / "p", labelled=False, tested=False), n_per_class=5)
    with pytest.raises(
        UsageError, match="data.n_per_class is 5, but the training images of p have no classes; use --data.n-per-class None"
    ):
        few_shot_split(load_dataset(asked), asked, 0)
    aside = few_shot_split(
        load_dataset(asked), dataclasses.replace(asked, n_per_class=None, validation_size=7, evaluate_on="validation"), 0
    )
    assert len(aside.evaluation_labels) == 7 and not aside.evaluation_labelled and not aside.train_labelled


def test_a_run_is_evaluated_where_its_folder_is_gone_or_has_moved(labelled, tmp_path, capsys, monkeypatch):
    folder, directory, result = labelled
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    away = folder.rename(tmp_path / "away")
    try:
        with pytest.raises(UsageError, match="photos does not exist, or cannot be reached"):  # Nothing was prepared in this cache.
            evaluate_checkpoint(directory)
        found = evaluate_checkpoint(directory, folder=str(moved))
        assert found.evaluation == result.evaluation and found.dataset == "photos"
        monkeypatch.setenv("WDKD_CACHE_DIR", str(folder.parent / "cache"))
        capsys.readouterr()
        assert evaluate_checkpoint(directory).evaluation == result.evaluation
        assert "photos is no longer there; the images that were prepared from it last are used" in capsys.readouterr().err
        assert not [finding for finding in verify(directory) if finding.problem]
    finally:
        away.rename(folder)
    assert read_run(directory).data_folder == str(folder)
    shutil.rmtree(moved / "9")
    shutil.rmtree(moved / "test" / "9")
    with pytest.raises(UsageError, match="was trained on other images or classes than elsewhere has in .*elsewhere; restore that data set"):
        evaluate_checkpoint(directory, folder=str(moved))


def test_a_folder_is_for_runs_that_have_one(teacher_run):
    with pytest.raises(UsageError, match="was trained on the data set digits, not on a folder; leave --folder out"):
        evaluate_checkpoint(teacher_run[0], folder="photos")
