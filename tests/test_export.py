"""Exports say what the checkpoint says, in processes that have nothing of this project; what does not is not written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import files

from wdkd import export_formats, numpy_network
from wdkd.errors import UsageError
from wdkd.export import checkpoint_logits, export_run, finished_split, pixels, read_finished
from wdkd.exported import read_exported

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")
pytest.importorskip("flatbuffers")

ROOT = Path(__file__).parents[1]
FORMATS = ("onnx", "stablehlo", "safetensors")
BATCHES = (1, 3, 64)


@pytest.fixture(scope="module")
def exports(teacher_run, finished_run, tmp_path_factory):
    """{name: (run's directory, file, report)}: batch norm as ONNX with int8, group norm in all formats."""
    folder = tmp_path_factory.mktemp("exports")
    student = finished_run("kd")[0]
    made = {"batch": (teacher_run[0], folder / "batch.onnx", True)}
    made |= {format: (student, folder / f"student.{format}", format == "onnx") for format in FORMATS}
    return {name: (run, out, export_run(run, out.suffix[1:], out, int8=int8, show=False)) for name, (run, out, int8) in made.items()}


@pytest.fixture(scope="module")
def said(exports):
    """{run: (split, logits of its checkpoint)}."""
    found = {}
    for run, _, _ in exports.values():
        if run not in found:
            trained = read_finished(run)
            split = finished_split(trained, run, None)
            found[run] = split, checkpoint_logits(trained, split.evaluation_images, show=False)
    return found


# --- in a process without the project ---------------------------------------------------------------------------------

ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(path)
metadata = session.get_modelmeta().custom_metadata_map
def run(x): return session.run(["logits", "probabilities"], {"pixels": x.transpose(0, 3, 1, 2)})
"""
STABLEHLO = """
import zipfile
from jax import export
archive = zipfile.ZipFile(path)
metadata = json.loads(archive.read("metadata.json"))
call = export.deserialize(bytearray(archive.read("model.jax_export"))).call
def run(x): return call(x)
"""
SAFETENSORS = """
import runpy, safetensors
reader = runpy.run_path(sys.argv[4])
with safetensors.safe_open(path, "numpy") as file:
    metadata = file.metadata()
    values = {name: file.get_tensor(name) for name in file.keys()}
def run(x):
    logits = reader["run"](json.loads(metadata["graph"]), values, x)
    return logits, reader["softmax"](logits)
"""
APART = """
import sys, json
import numpy as np
path, images, out = sys.argv[1:4]
for name in {absent}:
    sys.modules[name] = None
{reader}
x = np.load(images)
assert metadata["layout"] == '"{layout}"' and len(json.loads(metadata["class_names"])) == 10
assert json.loads(metadata["image_shape"]) == [8, 8, 1]
np.savez(out, **{{f"{{kind}}{{n}}": value for n in {batches} for kind, value in zip(("logits", "probabilities"), run(x[:n]))}})
"""
ABSENT = {"onnx": ("wdkd", "jax", "flax", "onnx"), "stablehlo": ("wdkd", "flax", "orbax"), "safetensors": ("wdkd", "jax", "flax")}
READERS = {"onnx": ONNX, "stablehlo": STABLEHLO, "safetensors": SAFETENSORS}


@pytest.mark.parametrize("name", ["batch", *FORMATS])
def test_a_process_without_the_project_computes_the_checkpoints_logits(name, exports, said, tmp_path):
    run, path, _ = exports[name]
    split, logits = said[run]
    format = path.suffix[1:]
    np.save(tmp_path / "x.npy", pixels(split.evaluation_images[:64]))
    layout = "NCHW" if format == "onnx" else "NHWC"
    script = APART.format(absent=ABSENT[format], reader=READERS[format], layout=layout, batches=BATCHES)
    command = [sys.executable, "-I", "-c", script, path, tmp_path / "x.npy", tmp_path / "out.npz", ROOT / "wdkd" / "numpy_network.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as out:
        for n in BATCHES:
            assert np.abs(out[f"logits{n}"] - logits[:n]).max() <= 1e-5
            exact = numpy_network.softmax(logits[:n].astype(np.float64))
            assert np.abs(out[f"probabilities{n}"] - exact).max() <= 1e-5


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_report_has_what_was_verified(exports, said):
    for name, (run, path, report) in exports.items():
        split, logits = said[run]
        found = report.verified[0]
        count = min(256, len(logits)) if name == "safetensors" else len(logits)
        right = (logits.argmax(-1) == split.evaluation_labels)[:count].mean()
        assert (found.images, found.accuracy, found.checkpoint_accuracy, found.changed) == (count, right, right, 0)
        assert 0 <= found.max_difference <= 1e-5
        written = json.loads(path.with_name(f"{path.name}.json").read_text())
        assert written["verified"][0]["max_difference"] == found.max_difference


def test_the_table_has_a_row_for_each_file_and_the_teacher(exports):
    _, path, report = exports["onnx"]
    rows = {cost.name: cost for cost in report.costs}
    assert list(rows) == ["student", "student int8", "teacher"]
    assert rows["student"].bytes == path.stat().st_size
    assert rows["student int8"].bytes == path.with_name("student.int8.onnx").stat().st_size
    assert rows["student"].parameters == rows["teacher"].parameters == 4782
    assert all(0 < cost.milliseconds.lower <= cost.milliseconds.median <= cost.milliseconds.upper for cost in rows.values())


def test_operators_are_those_that_runtimes_fuse(exports):
    """Of batch norm nothing is left; biases are the convolutions' own; every normalisation of a group is five standard operators."""
    kinds = [node.op_type for node in onnx.load(exports["batch"][1]).graph.node]
    assert {"Sub", "Div", "Conv", "MaxPool", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Softmax"} == set(kinds)
    assert kinds.count("Conv") == 6
    grouped = [node.op_type for node in onnx.load(exports["onnx"][1]).graph.node]
    assert set(grouped) - set(kinds) == {"Reshape", "InstanceNormalization", "Mul", "Add"}


@pytest.mark.parametrize("name", ["batch", "onnx"])
def test_int8_is_near_its_float32(name, exports, said):
    run, path, report = exports[name]
    _, logits = said[run]
    small = path.with_name(f"{path.stem}.int8.onnx")
    exported = read_exported(small)
    assert exported.description.precision == "int8" and report.verified[1].file == small.name
    weights = {tensor.data_type for tensor in onnx.load(small).graph.initializer if len(tensor.dims) == 4}
    assert onnx.TensorProto.INT8 in weights
    found, _ = exported(pixels(said[run][0].evaluation_images[:200]))
    spread = logits[:200] - logits[:200].mean(-1, keepdims=True)
    assert np.square(found - logits[:200]).mean() < 0.1 * np.square(spread).mean()
    assert report.verified[1].max_difference > report.verified[0].max_difference


def test_safetensors_has_the_checkpoints_own_arrays(exports):
    from safetensors.numpy import load_file

    run, path, _ = exports["safetensors"]
    variables = read_finished(run).variables
    stored = load_file(path)
    assert (stored["params.Conv_0.kernel"] == variables["params"]["Conv_0"]["kernel"]).all()
    assert stored["params.Norm_5.GroupNorm_0.bias"].dtype == np.float32
    assert sum(value.size for name, value in stored.items() if name.startswith("params")) == 4782


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(words, *arguments, **options):
    with pytest.raises(UsageError) as caught:
        export_run(*arguments, show=False, **options)
    text = str(caught.value)
    assert words in text and text.isprintable() and len(text) < 600, text


def test_what_is_there_is_not_overwritten(exports, teacher_run, tmp_path):
    for name in ("a.onnx", "a.onnx.json", "a.int8.onnx"):
        place = tmp_path / name[2:]
        place.mkdir()
        (place / name).write_text("mine")
        refused(f"{name} is there already; give another --out", teacher_run[0], "onnx", place / "a.onnx", int8=True)
        assert files(place) == {name: b"mine"}


def test_an_output_that_cannot_be_written_is_refused(teacher_run, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot write", teacher_run[0], "onnx", tmp_path / "file" / "a.onnx")
    refused("cannot write", teacher_run[0], "onnx", "/proc/wdkd/a.onnx")


def test_a_teacher_that_is_gone_is_left_out_of_the_table(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run("kd")[0], tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "teacher_directory": str(tmp_path / "gone")}))
    refused(f"{tmp_path / 'no'} is not a directory", tmp_path / "run", "onnx", tmp_path / "a.onnx", teacher=str(tmp_path / "no"))
    report = export_run(tmp_path / "run", "onnx", tmp_path / "a.onnx", show=False)
    assert [cost.name for cost in report.costs] == ["student"]
    assert f"note: the teacher is not in the table: the teacher {tmp_path / 'gone'} is no longer there" in capsys.readouterr().err


def test_int8_is_for_onnx(teacher_run, tmp_path):
    refused("--int8 is for --format onnx", teacher_run[0], "stablehlo", tmp_path / "a", int8=True)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda d: (d / "result.json").unlink(), "is not finished (no result.json)"),
        (lambda d: (d / "result.json").write_text("{}"), "lacks the field"),
        (lambda d: shutil.rmtree(d / "checkpoints" / "24"), "is not of step 22, the newest checkpoint that verifies"),
        (lambda d: shutil.rmtree(d / "checkpoints"), "is not a directory of checkpoints"),
        (lambda d: (d / "config.json").unlink(), "holds no run"),
    ],
    ids=["unfinished", "damaged result", "no newest checkpoint", "no checkpoints", "no run"],
)
def test_a_run_that_is_not_finished_or_damaged_is_refused(harm, words, teacher_run, tmp_path):
    shutil.copytree(teacher_run[0], tmp_path / "run")
    harm(tmp_path / "run")
    refused(words, tmp_path / "run", "onnx", tmp_path / "a.onnx")
    assert not list(tmp_path.glob("*onnx*")) and not list(tmp_path.glob(".*"))


def test_a_network_that_is_written_wrong_is_not_published(teacher_run, tmp_path, monkeypatch):
    """One kernel is off by a thousandth."""

    def write_wrong(trained, description):
        params = {**trained.variables["params"], "Conv_3": {"kernel": trained.variables["params"]["Conv_3"]["kernel"] * 1.001}}
        changed = type(trained)(**{**vars(trained), "variables": {**trained.variables, "params": params}})
        return export_formats.to_onnx(changed, description)

    monkeypatch.setitem(export_formats.WRITERS, "onnx", write_wrong)
    refused("its logits differ from the checkpoint's by up to", teacher_run[0], "onnx", tmp_path / "a.onnx")
    assert files(tmp_path) == {}


def test_a_package_that_is_missing_is_named_with_the_extra(teacher_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused("needs the package safetensors; pip install 'wdkd[onnx]'", teacher_run[0], "safetensors", tmp_path / "a")
    assert files(tmp_path) == {}
