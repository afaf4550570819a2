"""Any teacher, all the way: runs with ONNX files, Python code, recorded outputs and shipped names, and what their results say."""

import dataclasses
import json
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import tiny

from wdkd import command_line
from wdkd.config import STUDENTS
from wdkd.data import few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_checkpoint
from wdkd.export import export_run
from wdkd.exported import read_exported
from wdkd.methods import Reads
from wdkd.predict import predict, read_judge, read_judge_as_in
from wdkd.recording import describe
from wdkd.run_directory import read_run, read_teacher
from wdkd.steps import pixels
from wdkd.teacher_cache import contents
from wdkd.teacher_loading import reader, shape_of
from wdkd.teacher_source import SHIPPED, find_source
from wdkd.train import run


@pytest.fixture(scope="module")
def digits():
    return load_dataset(tiny().data)


@pytest.fixture(scope="module")
def onnx_file(digits, tmp_path_factory):
    """Ridge regression on the digits, as a network on 1×8×8 with a softmax, its classes in reverse order."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("jaxonnxruntime")
    x = digits.train_images.reshape(len(digits.train_labels), -1) / 255
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    weights = np.linalg.solve(x.T @ x + np.eye(65), x.T @ np.eye(10)[digits.train_labels])[:, ::-1].astype(np.float32) * 8
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Flatten", ["x"], ["f"]),
            onnx.helper.make_node("Gemm", ["f", "w", "b"], ["g"]),
            onnx.helper.make_node("Softmax", ["g"], ["y"]),
        ],
        "ridge",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 1, 8, 8))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 10))],
        [onnx.numpy_helper.from_array(weights[:-1], "w"), onnx.numpy_helper.from_array(weights[-1], "b")],
    )
    path = tmp_path_factory.mktemp("onnx") / "ridge.onnx"
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10).SerializeToString())
    return path


def with_onnx(path, **edits):
    return tiny(teacher=str(path), teacher_input__outputs="probabilities", teacher_input__classes=tuple("9876543210"), **edits)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def close(first, second, rtol):
    """Whether two runs went the same way, to the last step."""
    ours, theirs = ([line["objective"] for line in metrics(directory)] for directory in (first, second))
    np.testing.assert_allclose(ours, theirs, rtol=rtol)


# --- ONNX ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wdkd_run(onnx_file, tmp_path_factory):
    """(directory, result) of a student of the ONNX teacher, that runs in every step."""
    directory = tmp_path_factory.mktemp("students") / "wdkd"
    return directory, run(with_onnx(onnx_file, method__name="wdkd", cache__mode="off"), directory, show_progress=False)


def test_a_student_of_an_onnx_teacher_says_whose_it_is(wdkd_run, onnx_file, digits):
    directory, result = wdkd_run
    assert result.teacher_path == str(onnx_file) and len(result.teacher_hash) == 64 and result.through_teacher
    assert read_run(directory).teacher_directory == str(onnx_file) and read_run(directory).teacher_hash == result.teacher_hash
    assert 0.85 < result.teacher_accuracy == result.evaluation.teacher_accuracy < 1
    assert 0 <= result.evaluation.agreement <= 1
    again = evaluate_checkpoint(directory)
    assert again.evaluation == result.evaluation and again.teacher_hash == result.teacher_hash


def test_recorded_it_is_the_live_one(wdkd_run, onnx_file, tmp_path):
    recorded = run(with_onnx(onnx_file, method__name="wdkd", cache__mode="on"), tmp_path / "recorded", show_progress=False)
    assert recorded.teacher_cached and not wdkd_run[1].teacher_cached
    close(tmp_path / "recorded", wdkd_run[0], 1e-4)


def test_what_is_recorded_of_it_is_not_taken_for_that_of_another_reading(onnx_file, digits):
    config = with_onnx(onnx_file, method__name="kd")
    split = few_shot_split(digits, config.data, config.seed)
    read = reader(str(onnx_file), find_source(str(onnx_file)), **shape_of(split, 1))

    def described(**edits):
        teacher = read(with_onnx(onnx_file, **edits).teacher_input)
        return describe(config, contents(Reads(), len(split.train_labels), teacher, "float32"), teacher, split)

    assert described() == described() != described(teacher_input__mean=(0.01,))


def test_its_jacobian_is_matched_by_sobolev(onnx_file, tmp_path):
    result = run(with_onnx(onnx_file, method__name="sobolev", train__steps=2, cache__mode="off"), tmp_path / "sobolev", show_progress=False)
    assert result.status == "complete"


def test_its_row_is_beside_its_students_in_the_table_of_costs(wdkd_run, onnx_file, tmp_path, capsys):
    directory, result = wdkd_run
    report = export_run(directory, "onnx", tmp_path / "student.onnx", show=False)
    student, teacher = report.costs
    assert (student.name, teacher.name, teacher.model) == ("student", "teacher", "ridge.onnx")
    assert (teacher.parameters, teacher.bytes, teacher.accuracy) == (650, onnx_file.stat().st_size, result.teacher_accuracy)
    assert 2 * 640 <= teacher.flops < 4 * 640 and teacher.milliseconds.median > 0
    moved = tmp_path / "moved.onnx"
    with pytest.raises(UsageError, match="does not exist; give an .onnx file"):
        export_run(directory, "onnx", tmp_path / "again.onnx", teacher=str(moved), show=False)
    moved.write_bytes(onnx_file.read_bytes())
    again = export_run(directory, "onnx", tmp_path / "again.onnx", teacher=str(moved), show=False)
    assert again.costs[1].model == "moved.onnx" and capsys.readouterr().err == ""


def test_a_prediction_asks_it_as_training_did(wdkd_run, onnx_file, digits, tmp_path):
    """Beside onnxruntime, whose first output is of class 9."""
    import onnxruntime

    directory, _ = wdkd_run
    export_run(directory, "safetensors", tmp_path / "student", show=False)
    student = read_exported(tmp_path / "student")
    for index in range(8):
        PIL.Image.fromarray(digits.test_images[index][..., 0]).save(tmp_path / f"{index}.png")
    session = onnxruntime.InferenceSession(str(onnx_file))
    images = (digits.test_images[:8, None, :, :, 0] / np.float32(255)).astype(np.float32)
    expected = ["9876543210"[session.run(None, {"x": image[None]})[0].argmax()] for image in images]
    for given in (None, str(onnx_file)):
        found = list(predict(student, sorted(tmp_path.glob("*.png")), read_judge_as_in(directory, given, student)))
        assert [one.teacher for one in found] == expected
        assert [one.agrees for one in found] == [one.label == name for one, name in zip(found, expected, strict=True)]


def test_who_cannot_be_asked_is_said(wdkd_run, onnx_file, tmp_path):
    directory, _ = wdkd_run
    export_run(directory, "safetensors", tmp_path / "student", show=False)
    student = read_exported(tmp_path / "student")
    with pytest.raises(UsageError, match="for any other teacher, give the student's run to --run too"):
        read_judge(onnx_file, student)
    with pytest.raises(UsageError, match="the outputs alone are known; give one that can be asked to --teacher"):
        read_judge_as_in(directory, "said.npz", student)
    config = tmp_path / "run" / "config.json"
    config.parent.mkdir()
    values = json.loads((directory / "config.json").read_text())
    for stored, words in (
        ("code:teacher", "teacher code:teacher is Python code, which is called only if --teacher names it"),
        (str(tmp_path / "gone.onnx"), "gone.onnx is no longer there; give --teacher"),
        (None, "has no teacher; leave --run out"),
    ):
        config.write_text(json.dumps({**values, "teacher_directory": stored}))
        with pytest.raises(UsageError, match=words):
            read_judge_as_in(config.parent, None, student)


def test_another_file_in_its_place_is_refused_on_resume(wdkd_run, onnx_file):
    directory, _ = wdkd_run
    (directory / "result.json").rename(directory / "kept")
    content = onnx_file.read_bytes()
    try:
        import onnx

        model = onnx.load_model_from_string(content)
        model.doc_string = "another"
        onnx_file.write_bytes(model.SerializeToString())
        with pytest.raises(UsageError, match="began with another teacher than is now at .*ridge.onnx"):
            run(with_onnx(onnx_file, method__name="wdkd", cache__mode="off"), directory, show_progress=False)
    finally:
        onnx_file.write_bytes(content)
        (directory / "kept").rename(directory / "result.json")


def test_the_wrong_order_of_classes_stops_the_run_before_anything_is_written(onnx_file, tmp_path):
    config = tiny(teacher=str(onnx_file), teacher_input__outputs="probabilities", method__name="kd")
    with pytest.raises(UsageError, match="is at chance: .*in the order 9 8 7 6 5 4 3 2 1 0"):
        run(config, tmp_path / "student", show_progress=False)
    assert not (tmp_path / "student" / "config.json").exists()


def test_without_the_extra_it_says_how_to_install_it(onnx_file, monkeypatch, digits):
    monkeypatch.setitem(sys.modules, "wdkd.onnx_teacher", None)
    split = few_shot_split(digits, tiny().data, 0)
    with pytest.raises(UsageError, match=r"is an ONNX file, and .* is not installed; pip install 'wdkd\[onnx\]'"):
        reader(str(onnx_file), find_source(str(onnx_file)), **shape_of(split, 1))


def test_the_command_line_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    words = "distill.py --preset digits --method.name fitnet --teacher net.onnx --teacher-input.mean 0.485 0.456 0.406 --workdir"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        command_line.train(STUDENTS, description=None)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: method 'fitnet' matches hidden features, and of teacher net.onnx the outputs alone are known")


# --- the same network as a run, as code and as outputs ------------------------------------------------------------------------


CODE = """
from wdkd.run_directory import read_teacher

def teacher():
    found = read_teacher({path!r})
    return (lambda variables, x: found.apply(variables, x).logits), found.variables
"""


def test_code_that_gives_a_runs_network_teaches_as_the_run(teacher_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code_of_a_run.py").write_text(CODE.format(path=str(teacher_run[0])))
    edits = {"method__name": "kd", "cache__mode": "on"}
    ours = run(tiny(teacher="code_of_a_run:teacher", teacher_input__layout="nhwc", **edits), "code", show_progress=True)
    said = capsys.readouterr().err
    assert "teacher code_of_a_run:teacher on 200 training images: accuracy " in said
    theirs = run(tiny(teacher=str(teacher_run[0]), **edits), "run", show_progress=False)
    close(tmp_path / "code", tmp_path / "run", 1e-4)
    assert ours.teacher_accuracy == pytest.approx(theirs.teacher_accuracy, abs=2 / theirs.evaluation.count)
    assert read_run("code").teacher_directory == "code_of_a_run:teacher"
    # Code that a run's files name is not called: they may come from elsewhere.
    sys.modules.pop("code_of_a_run")
    (tmp_path / "code_of_a_run.py").write_text("raise SystemExit('called')")
    assert evaluate_checkpoint("code").evaluation.agreement is None
    assert "agreement with the teacher is not measured: the teacher code_of_a_run:teacher is Python code" in capsys.readouterr().err


def test_a_runs_export_teaches_as_the_run(teacher_run, tmp_path):
    """Of its two outputs that fit, the one that is read is called so."""
    pytest.importorskip("jaxonnxruntime")
    export_run(teacher_run[0], "onnx", tmp_path / "net.onnx", show=False)
    edits = {"method__name": "wdkd", "cache__mode": "on"}
    ours = run(tiny(teacher=str(tmp_path / "net.onnx"), **edits), tmp_path / "file", show_progress=False)
    theirs = run(tiny(teacher=str(teacher_run[0]), **edits), tmp_path / "run", show_progress=False)
    close(tmp_path / "file", tmp_path / "run", 1e-4)
    assert (ours.evaluation.accuracy, ours.teacher_accuracy) == (theirs.evaluation.accuracy, theirs.teacher_accuracy)
    edits["teacher_input__outputs"] = "probabilities"
    run(tiny(teacher=str(tmp_path / "net.onnx"), **edits), tmp_path / "probabilities", show_progress=False)
    close(tmp_path / "probabilities", tmp_path / "run", 1e-3)


def test_recorded_outputs_teach_as_the_network_that_gave_them(teacher_run, tmp_path, capsys, digits):
    config = tiny(method__name="kd")
    split = few_shot_split(digits, config.data, config.seed)
    teacher = read_teacher(teacher_run[0])
    logits = np.asarray(jax.jit(teacher.apply)(teacher.variables, pixels(split.train_images)).logits)
    np.savez(tmp_path / "said.npz", logits=logits, indices=split.train_indices)
    outputs = dataclasses.replace(config, teacher=str(tmp_path / "said.npz"))
    ours = run(outputs, tmp_path / "outputs", show_progress=True)
    assert "through_teacher is False" in capsys.readouterr().err
    assert not (tmp_path / "teacher-cache").exists(), "there is nothing to record"
    edits = {"teacher": str(teacher_run[0]), "cache": dataclasses.replace(config.cache, mode="on")}
    theirs = run(dataclasses.replace(config, **edits), tmp_path / "run", show_progress=False)
    close(tmp_path / "outputs", tmp_path / "run", 1e-4)
    assert ours.evaluation.accuracy == pytest.approx(theirs.evaluation.accuracy, abs=2 / theirs.evaluation.count)
    assert (ours.through_teacher, ours.evaluation.agreement, ours.teacher_accuracy) == (False, None, None)
    assert ours.teacher_path == str(tmp_path / "said.npz")
    assert evaluate_checkpoint(tmp_path / "outputs").evaluation == ours.evaluation
    assert f"agreement is not measured: of the teacher {tmp_path / 'said.npz'} the outputs alone" in capsys.readouterr().err


def test_outputs_are_constants_to_the_ball(teacher_run, tmp_path, digits):
    config = tiny(method__name="wdkd", train__steps=3)
    split = few_shot_split(digits, config.data, config.seed)
    teacher = read_teacher(teacher_run[0])
    logits = np.zeros((len(digits.train_labels), 10), np.float32)
    logits[split.train_indices] = jax.jit(teacher.apply)(teacher.variables, pixels(split.train_images)).logits
    np.savez(tmp_path / "said.npz", logits=logits)
    run(dataclasses.replace(config, teacher=str(tmp_path / "said.npz")), tmp_path / "outputs", show_progress=False)
    constant = dataclasses.replace(config.method, through_teacher=False)
    run(dataclasses.replace(config, teacher=str(teacher_run[0]), method=constant), tmp_path / "run", show_progress=False)
    close(tmp_path / "outputs", tmp_path / "run", 1e-5)


# --- shipped names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "accuracy"),
    [("cifar10", (32, 32, 3), 0.9101), ("fashion_mnist", (28, 28, 1), 0.9447), ("fashion_mnist_muon", (28, 28, 1), 0.9461)],
)
def test_a_shipped_name_is_its_teacher(name, shape, accuracy, tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    split = few_shot_split(digits, tiny().data, 0)
    teacher = reader(name, find_source(name), **shape_of(split, 1))(tiny().teacher_input)
    assert teacher.path == str(SHIPPED / name) and teacher.image_shape == shape and teacher.accuracy == pytest.approx(accuracy, abs=5e-5)


def test_images_without_labels_take_the_classes_of_a_teacher_from_elsewhere(onnx_file, digits, tmp_path):
    """They are in the teacher's own order, so its columns stay as they are."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        PIL.Image.fromarray(digits.train_images[index][..., 0]).save(photos / f"{index}.png")
    folder = {"data__folder": str(photos), "data__image_size": (8,), "data__validation_size": 0, "data__n_per_class": None}
    config = with_onnx(onnx_file, method__name="kd", train__steps=3, **folder)
    result = run(config, tmp_path / "run", show_progress=False)
    assert (result.evaluation.class_names, result.evaluation.accuracy) == (list("9876543210"), None)
    assert 0 <= result.evaluation.agreement <= 1
    unnamed = dataclasses.replace(config, teacher_input=dataclasses.replace(config.teacher_input, classes=None))
    with pytest.raises(UsageError, match=r"must be named; give them, or a text file of them, to --teacher-input\.classes"):
        run(unnamed, tmp_path / "other", show_progress=False)
