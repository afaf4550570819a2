"""An ONNX file is read whole, with what lies beside it, or it is said in a line what is wrong with it."""

import hashlib
import os

import numpy as np
import pytest

from wdkd.errors import UsageError

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from wdkd import onnx_file  # noqa: E402
from wdkd.onnx_file import read_onnx  # noqa: E402

KERNEL = np.arange(12, dtype=np.float32).reshape(4, 3)


def linear():
    """y = x w, on vectors of 4 numbers."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("b", 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("b", 3))],
        [numpy_helper.from_array(KERNEL, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def refused(path, words):
    with pytest.raises(UsageError) as caught:
        read_onnx(path)
    text = str(caught.value)
    assert words in text and text.isprintable() and len(text) < 900, text


def test_the_hash_is_of_the_files_bytes_and_then_of_those_beside_it(tmp_path):
    path, beside = tmp_path / "net.onnx", tmp_path / "net.data"
    path.write_bytes(linear().SerializeToString())
    assert read_onnx(path).hash == hashlib.sha256(path.read_bytes()).hexdigest()
    onnx.save_model(linear(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    file = read_onnx(path)
    assert file.hash == hashlib.sha256(path.read_bytes() + beside.read_bytes()).hexdigest() and file.path == path
    np.testing.assert_array_equal(numpy_helper.to_array(file.model.graph.initializer[0]), KERNEL)


def test_the_limit_is_of_all_files_together(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    onnx.save_model(linear(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    monkeypatch.setattr(onnx_file, "LIMIT", path.stat().st_size + 10)
    refused(path, "net.data has 48 bytes; at most 10 are read")


def test_functions_of_the_file_are_written_out(tmp_path):
    model = linear()
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(helper.make_function("local", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node[0].output[0] = "z"
    model.graph.node.append(helper.make_node("Twice", ["z"], ["y"], domain="local"))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert [node.op_type for node in read_onnx(tmp_path / "net.onnx").model.graph.node] == ["MatMul", "Add"]


def test_what_is_no_file_or_no_onnx_is_said(tmp_path):
    path = tmp_path / "net.onnx"
    refused(path, "does not exist; give an .onnx file")
    good = linear().SerializeToString()
    for content in (b"", b"hello, this is no network", b"\x89PNG\r\n\x1a\n" + bytes(100), good[: len(good) // 2], good[:-1]):
        path.write_bytes(content)
        refused(path, "is no ONNX file or is truncated")
    with path.open("wb") as file:
        os.truncate(file.fileno(), 3 << 30)
    refused(path, "has 3,221,225,472 bytes; at most 2,147,483,647 are read")
    path.unlink()
    path.mkdir()
    refused(path, "cannot be read: Is a directory")


def test_parameters_of_another_size_or_place_are_refused(tmp_path):
    model = linear()
    model.graph.initializer[0].dims[0] = 7
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "net.onnx", "is damaged or no valid ONNX")
    for place in ("../secret", "/etc/passwd"):
        model = linear()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)
        (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
        refused(tmp_path / "net.onnx", "keeps its parameters outside of its folder")
