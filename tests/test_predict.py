"""Predictions are the network's own, of images made to fit; what cannot be read is named, with code 2 at the end."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_command_line import call as call
from test_command_line import one_cache as one_cache
from test_command_line import refused as refused
from test_exported import safetensors_file

from wdkd.export import export_run, finished_split, pixels, read_finished
from wdkd.exported import read_exported
from wdkd.images import read_image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="module")
def student(teacher_run, tmp_path_factory):
    """(ONNX export of the tests' teacher, its split)."""
    out = tmp_path_factory.mktemp("export") / "student.onnx"
    export_run(teacher_run[0], "onnx", out, show=False)
    return out, finished_split(read_finished(teacher_run[0]), teacher_run[0], None)


@pytest.fixture
def pictures(student, tmp_path):
    """A folder of the first ten test images as PNG, one of them in a folder of its own, and a hidden file."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for index, image in enumerate(student[1].evaluation_images[:10]):
        Image.fromarray(image[..., 0]).save(folder / ("more" if index == 9 else "") / f"{index}.png")
    (folder / ".hidden.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def printed_by(monkeypatch, capsys):
    """A function that runs the script where nothing is wrong: what it prints."""

    def printed_by(*options):
        monkeypatch.setattr(sys, "argv", ["launch/predict.py", *map(str, options)])
        runpy.run_path(str(LAUNCH / "predict.py"), run_name="__main__")
        printed, errors = capsys.readouterr()
        assert errors == ""
        return printed

    return printed_by


def expected(student, count=10):
    exported = read_exported(student[0])
    _, probabilities = exported(pixels(student[1].evaluation_images[:count]))
    return probabilities, exported.description.class_names


def test_labels_and_probabilities_are_the_networks(printed_by, student, pictures):
    printed = printed_by("--model", student[0], pictures, "--json")
    found = [json.loads(line) for line in printed.splitlines()]
    assert [Path(one["path"]).name for one in found] == [f"{i}.png" for i in range(10)]
    probabilities, names = expected(student)
    for one, row in zip(found, probabilities, strict=True):
        order = np.argsort(-row)[:3]
        assert [name for name, _ in one["top"]] == [names[i] for i in order]
        np.testing.assert_allclose([p for _, p in one["top"]], row[order], atol=1e-6)
        assert (one["label"], one["probability"]) == tuple(one["top"][0])
        assert one["teacher"] is None


def test_an_image_of_another_size_is_made_to_fit(printed_by, student, tmp_path):
    """Each pixel repeated 5 times, and wider than high: what is in the middle is the image itself."""
    image = student[1].evaluation_images[0][..., 0].repeat(5, 0).repeat(5, 1)
    Image.fromarray(np.pad(image, ((0, 0), (7, 7)))).convert("RGB").save(tmp_path / "a.png")
    printed = printed_by("--model", student[0], tmp_path / "a.png", "--json")
    seen = read_image(tmp_path / "a.png", (8, 8), 1).pixels
    row = read_exported(student[0])(pixels(seen[None]))[1][0]
    assert np.corrcoef(seen.ravel(), student[1].evaluation_images[0].ravel())[0, 1] > 0.9
    assert json.loads(printed)["probability"] == pytest.approx(float(row.max()), abs=1e-6)


def test_the_teacher_is_asked_too(printed_by, student, teacher_run, pictures):
    """The teacher is the network that was exported, so it agrees; its export is taken as well."""
    for teacher in (teacher_run[0], student[0]):
        printed = printed_by("--model", student[0], pictures, "--teacher", teacher)
        lines = printed.splitlines()
        assert all(line.endswith("; the teacher agrees") for line in lines[:-1])
        assert lines[-1] == "the teacher agrees on 10 of 10 images"


def test_a_teacher_that_disagrees_is_quoted(printed_by, student, finished_run, pictures):
    printed = printed_by("--model", student[0], pictures, "--teacher", finished_run("ce")[0], "--json")
    found = [json.loads(line) for line in printed.splitlines()]
    assert all(one["agrees"] == (one["teacher"] == one["label"]) for one in found)
    assert {one["agrees"] for one in found} >= {False}


def test_a_process_needs_neither_jax_nor_flax(student, pictures):
    script = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('jax', 'flax', 'orbax', 'onnx', 'tensorflow_datasets')));"
        f"sys.argv = ['predict', '--model', {str(student[0])!r}, {str(pictures)!r}];"
        f"runpy.run_path({str(LAUNCH / 'predict.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    probabilities, names = expected(student)
    assert f"0.png: {names[probabilities[0].argmax()]} {probabilities[0].max():.1%} (" in done.stdout.splitlines()[0]


def test_what_cannot_be_read_is_named_and_the_rest_predicted(call, student, pictures):
    content = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(content[: len(content) // 2])
    (pictures / "5.png").write_text("no image")
    code, printed, errors = call("predict", "--model", student[0], pictures)
    assert code == 2 and len(printed.splitlines()) == 8
    assert errors.startswith("error: 2 of 10 images cannot be read, first ") and "3.png: " in errors and errors.count("\n") == 1


def test_bad_requests_are_refused(refused, student, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no image (.png, .jpg" in refused("predict", "--model", student[0], tmp_path / "empty")
    assert "does not exist; give image files" in refused("predict", "--model", student[0], tmp_path / "a.png")
    assert "no images are given" in refused("predict", "--model", student[0])
    assert "notes.txt: it is no PNG, JPEG" in refused("predict", "--model", student[0], pictures / "notes.txt")
    assert "--model" in refused("predict", pictures)
    assert "no export of wdkd" in refused("predict", "--model", pictures / "0.png", pictures)
    assert "holds no run" in refused("predict", "--model", student[0], pictures, "--teacher", tmp_path)


def test_a_teacher_of_other_classes_is_refused(refused, student, pictures, tmp_path):
    other = safetensors_file(tmp_path / "other")
    assert "which differ in 0, 1, 2, 3, 4" in refused("predict", "--model", student[0], pictures, "--teacher", other)
