"""Latency is of one image on one thread, network by network in turn; the table says it in aligned columns."""

import numpy as np
import pytest

from wdkd.latency import Cost, Timed, single_image, table
from wdkd.timing import Spread

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def repeated_convolution(times):
    """An ONNX model of so many equal convolutions of (1, 8, 16, 16)."""
    kernel = onnx.numpy_helper.from_array(np.full((8, 8, 3, 3), 0.01, np.float32), "k")
    names = ["pixels", *(f"c{i}" for i in range(times - 1)), "logits"]
    nodes = [onnx.helper.make_node("Conv", [a, "k"], [b], pads=[1, 1, 1, 1]) for a, b in zip(names, names[1:], strict=False)]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8, 16, 16]) for name in ("pixels", "logits")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [kernel])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def test_a_network_of_eight_times_the_work_takes_longer():
    cases = {name: Timed(repeated_convolution(times), "pixels", (1, 8, 16, 16)) for name, times in (("small", 2), ("large", 16))}
    found = single_image(cases, rounds=21, show=False)
    assert 2 * found["small"].median < found["large"].median
    assert all(0 < each.lower <= each.median <= each.upper for each in found.values())


def test_the_table():
    costs = [
        Cost("student", "cnn", 1234, 5_600_000, 7_890, 0.5, Spread(0.123, 0.1, 0.2)),
        Cost("teacher", "cnn", 1_000_000, 150_000_000, 4_000_000, None, None),
        Cost("code", "module:function", 100, None, None, None, None),
    ]
    assert table(costs) == [
        "         parameters  MFLOPs      file  accuracy     one image, one core",
        "student       1,234     5.6      8 kB    50.00%  0.12 ms (0.10 to 0.20)",
        "teacher   1,000,000   150.0  4,000 kB         -                       -",
        "code            100       -         -         -                       -",
    ]
