"""Reading exports: what is none, or is damaged, is refused in one line, whatever it is."""

import json
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdkd import steps
from wdkd.errors import UsageError
from wdkd.exported import Description, describe, pixels, read_exported

safetensors = pytest.importorskip("safetensors.numpy")
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

DESCRIPTION = Description(
    version=1,
    class_names=["a", "ü"],
    input="words",
    layout="NHWC",
    image_shape=[8, 8, 1],
    mean=[0.5],
    std=[0.25],
    precision="float32",
    model="none",
    parameters=3,
    parameter_hash="0",
    dataset="none",
    accuracy=0.5,
    test_images=2,
)
NODES = [
    {"op": "sub", "inputs": ["pixels", "mean"], "output": "s", "attributes": {}},
    {"op": "mean", "inputs": ["s"], "output": "m", "attributes": {}},
    {"op": "dense", "inputs": ["m", "kernel"], "output": "logits", "attributes": {}},
]
VALUES = {"mean": np.array([0.5], np.float32), "kernel": np.array([[1.0, 2.0]], np.float32)}


def safetensors_file(path, values=VALUES, nodes=NODES, **changes):
    texts = {**DESCRIPTION.texts(), "graph": json.dumps(nodes), **changes}
    path.write_bytes(safetensors.save(values, {name: text for name, text in texts.items() if text is not None}))
    return path


def onnx_file(path, inputs=("pixels",), outputs=("logits", "probabilities"), metadata=None, shape=("batch", 1, 8, 8)):
    """The mean of all pixels and itself, twice."""
    make = onnx.helper.make_node
    nodes = [make("GlobalAveragePool", [inputs[0]], ["m"]), make("Flatten", ["m"], ["f"])]
    nodes += [make("Concat", ["f", "f"], [name], axis=1) for name in outputs]
    information = onnx.helper.make_tensor_value_info
    ins = [information(name, onnx.TensorProto.FLOAT, shape) for name in inputs]
    outs = [information(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in outputs]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", ins, outs), opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.helper.set_model_props(model, DESCRIPTION.texts() if metadata is None else metadata)
    path.write_bytes(model.SerializeToString())
    return path


def refused(path, *words):
    with pytest.raises(UsageError) as caught:
        read_exported(path)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 700 and str(path) in text and all(word in text for word in words), text


def test_a_file_is_read_whatever_it_is_called(tmp_path):
    x = np.random.default_rng(0).uniform(size=(300, 8, 8, 1)).astype(np.float32)
    expected = (x - 0.5).mean((1, 2)) * [[1, 2]]
    exported = read_exported(safetensors_file(tmp_path / "a.onnx"))
    assert (exported.format, exported.description) == ("safetensors", DESCRIPTION)
    logits, probabilities = exported(x)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    np.testing.assert_allclose(probabilities, np.exp(expected) / np.exp(expected).sum(-1, keepdims=True), atol=1e-6)
    exported = read_exported(onnx_file(tmp_path / "b.png"))
    assert exported.format == "onnx" and exported.description.class_names == ["a", "ü"]
    np.testing.assert_allclose(exported(x)[0], x.mean((1, 2)).repeat(2, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "2"}, "version is 2; it must be 1"),
        ({"version": None}, "not those of an export"),
        ({"class_names": '["a"]'}, "for two images and 1 classes"),
        ({"class_names": "[]"}, "class_names"),
        ({"class_names": "[1, 2]"}, "class_names"),
        ({"image_shape": "[8, 8]"}, "image_shape"),
        ({"image_shape": "[100000, 8, 1]"}, "image_shape"),
        ({"image_shape": "[8, 8, 3]"}, "for two images and 2 classes"),
        ({"accuracy": "7"}, "accuracy is 7"),
        ({"accuracy": "NaN"}, "accuracy"),
        ({"layout": '"CHWN"'}, "layout"),
        ({"mean": "{"}, "damaged"),
        ({"std": None}, "lacks the field 'std'"),
        ({"graph": "[]"}, "damaged"),
        ({"graph": None}, "graph"),
        ({"nodes": [{**NODES[0], "op": "eval"}]}, "eval"),
        ({"nodes": [{**NODES[0], "inputs": ["pixels", "other"]}]}, "other"),
        ({"nodes": NODES[:1]}, "for two images and 2 classes"),
        ({"nodes": [{**NODES[0], "attributes": {"x": 1}}]}, "damaged"),
        ({"values": {"mean": VALUES["mean"] * np.nan, "kernel": VALUES["kernel"]}}, "not finite"),
    ],
)
def test_a_safetensors_file_that_is_no_export_is_refused(change, words, tmp_path):
    if change == {"image_shape": "[8, 8, 3]"}:  # Three channels less a mean are three, times a kernel for one.
        words = "damaged"
    refused(safetensors_file(tmp_path / "a", **change), words)


def test_an_onnx_file_that_is_no_export_is_refused(tmp_path):
    refused(onnx_file(tmp_path / "a", metadata={}), "not those of an export")
    refused(onnx_file(tmp_path / "b", inputs=("image",)), "no export of wdkd")
    refused(onnx_file(tmp_path / "c", outputs=("logits",)), "no export of wdkd")
    refused(onnx_file(tmp_path / "d", shape=(1, 1, 8, 8)), "no export of wdkd")
    whole = onnx_file(tmp_path / "e").read_bytes()
    (tmp_path / "e").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "e", "no export of wdkd, or damaged")


def test_other_files_are_refused(tmp_path):
    refused(tmp_path / "missing", "does not exist; give a file that launch/export.py wrote")
    refused(tmp_path, "cannot be read")
    for name, content in {"empty": b"", "text": b"hello", "png": b"\x89PNG\r\n\x1a\n" + bytes(99), "zip": b"PK\3\4" + bytes(99)}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "no export of wdkd, or damaged")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("thesis.tex", "chapter 1")
    refused(tmp_path / "other.zip", "model.jax_export")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.jax_export", bytes(10**6))
        archive.writestr("metadata.json", "{}")
    refused(tmp_path / "bomb.zip", "compressed")
    with zipfile.ZipFile(tmp_path / "no.zip", "w") as archive:
        archive.writestr("model.jax_export", bytes(100))
        archive.writestr("metadata.json", json.dumps(DESCRIPTION.texts()))
    refused(tmp_path / "no.zip", "damaged")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_safetensors_file_with_a_damaged_byte_is_read_or_refused(data):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = safetensors_file(Path(folder) / "a")
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            read_exported(path)
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 700


def test_a_header_that_is_longer_than_the_file_is_no_safetensors(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(tmp_path / "a", "no export of wdkd, or damaged")


def test_texts_and_back():
    assert describe(DESCRIPTION.texts()) == DESCRIPTION
    assert describe({**DESCRIPTION.texts(), "more": "kept by others"}) == DESCRIPTION


def test_pixels_are_those_that_networks_were_trained_on():
    """Beside division in float64, and beside the training step's own."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    found = pixels(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.astype(np.float64) / 255, rtol=1e-7)
    np.testing.assert_allclose(found, steps.pixels(images), rtol=1e-7)
