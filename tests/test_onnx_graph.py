"""ONNX models of all networks against NumPy in float64: odd sides, strides, both norms, negative and zero scales."""

import dataclasses

import numpy as np
import pytest
from test_folding import drawn

from wdkd import numpy_network
from wdkd.folding import fold
from wdkd.graph import named, record

ort = pytest.importorskip("onnxruntime")
onnx_graph = pytest.importorskip("wdkd.onnx_graph")


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("shape", [(9, 11, 3), (16, 16, 1)])
@pytest.mark.parametrize("name", ["cnn", "whitened_cnn", "resnet8", "wrn_10_1"])
def test_onnxruntime_computes_what_the_network_is_defined_as(name, norm, shape):
    model, variables, x = drawn(name, norm, shape)
    if norm == "batch":
        variables["params"]["Norm_1"]["BatchNorm_0"]["scale"][0] = 0
    exact = {key: np.asarray(leaf, np.float64) for key, leaf in named(variables).items()}
    nodes = [dataclasses.asdict(node) for node in record(model, variables, shape).nodes]
    expected = numpy_network.run(nodes, exact, x.astype(np.float64))
    folded, fewer = fold(model, variables, shape)
    made = onnx_graph.to_onnx(record(folded, fewer, shape), named(fewer), {"key": "väl\nue"})
    session = ort.InferenceSession(made.SerializeToString())
    for n in (1, 3):
        logits, probabilities = session.run(None, {"pixels": x[:n].transpose(0, 3, 1, 2)})
        assert np.abs(logits - expected[:n]).max() <= 2e-6 * np.abs(expected).max()
        np.testing.assert_allclose(probabilities, numpy_network.softmax(expected[:n]), atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map == {"key": "väl\nue"}


def test_biases_go_into_convolutions_that_nothing_else_reads():
    """All of a network without residual sums; of resnet8 too, whose shortcuts are added to what has its bias already."""
    for name, adds in (("cnn", 0), ("resnet8", 3)):
        model, variables, _ = drawn(name, "batch", (16, 16, 3))
        for norm in variables["params"]:
            if norm.startswith("Norm"):
                scale = variables["params"][norm]["BatchNorm_0"]["scale"]
                scale[:] = np.abs(scale) + 0.1
        folded, fewer = fold(model, variables, (16, 16, 3))
        made = onnx_graph.to_onnx(record(folded, fewer, (16, 16, 3)), named(fewer), {})
        kinds = [node.op_type for node in made.graph.node]
        assert kinds.count("Add") == adds and "Mul" not in kinds
        assert all(len(node.input) == 3 for node in made.graph.node if node.op_type in ("Conv", "Gemm"))
