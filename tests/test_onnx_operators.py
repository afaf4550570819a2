"""Every operator that is added to jaxonnxruntime gives what onnxruntime gives, and what nobody can run is named."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("jaxonnxruntime")

from jaxonnxruntime.call_onnx import call_onnx_model  # noqa: E402
from jaxonnxruntime.config_class import jaxort_only_allow_initializers_as_static_args as static_initializers_only  # noqa: E402
from jaxonnxruntime.onnx_ops.conv import Conv  # noqa: E402
from onnx import helper  # noqa: E402

from wdkd.onnx_operators import OPERATORS, missing  # noqa: E402

X = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32) * 2
PER_CHANNEL = [np.array([0.5, 1.0, -1.5, 2.0], np.float32), np.array([0.1, 0.0, -0.2, 0.3], np.float32)]
PER_GROUP = [np.array([0.5, -1.5], np.float32), np.array([0.1, 0.3], np.float32)]
AXES = [np.array([2, 3])]
CASES = {
    "HardSigmoid": [([], {}, 20), ([], {"alpha": 1 / 6, "beta": 0.4}, 22)],
    "HardSwish": [([], {}, 14), ([], {}, 22)],
    "Clip": [
        ([], {"min": -1.0, "max": 0.5}, 6),
        ([np.float32(-1), np.float32(0.5)], {}, 11),
        ([np.float32(-1), np.float32(0.5)], {}, 13),
        ([None, np.float32(0.5)], {}, 13),
        ([np.float32(0)], {}, 12),
    ],
    "Elu": [([], {"alpha": 0.7}, 20)],
    "Celu": [([], {"alpha": 0.7}, 20)],
    "Gelu": [([], {}, 20), ([], {"approximate": "tanh"}, 20)],
    "Mish": [([], {}, 20)],
    "Softsign": [([], {}, 20)],
    "GlobalMaxPool": [([], {}, 20)],
    "MaxPool": [
        ([], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 12),
        ([], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}, 22),
        ([], {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [0, 1, 0, 1], "ceil_mode": 1}, 12),
        ([], {"kernel_shape": [2, 3], "dilations": [1, 2]}, 11),
        ([], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, 12),
        ([], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"}, 12),
    ],
    "LayerNormalization": [
        ([np.linspace(0.5, 2, 5, dtype=np.float32), np.linspace(-1, 1, 5, dtype=np.float32)], {"epsilon": 1e-3}, 17),
        ([np.linspace(0.5, 2, 15, dtype=np.float32).reshape(3, 5)], {"axis": 2}, 17),
    ],
    "InstanceNormalization": [(PER_CHANNEL, {"epsilon": 1e-3}, 20)],
    "GroupNormalization": [(PER_CHANNEL, {"num_groups": 2, "epsilon": 1e-3}, 21), (PER_GROUP, {"num_groups": 2}, 18)],
    "ReduceL2": [(AXES, {}, 18), ([], {"axes": [1], "keepdims": 0}, 13), ([], {}, 18)],
    "ReduceL1": [(AXES, {"keepdims": 0}, 18)],
    "ReduceMin": [(AXES, {}, 18)],
    "ReduceProd": [(AXES, {}, 18)],
    "Floor": [([], {}, 20)],
    "Round": [([], {}, 20)],
    "Sign": [([], {}, 20)],
    "Greater": [([np.float32(0.3)], {}, 20)],
    "GreaterOrEqual": [([X[0, 0, 0]], {}, 20)],
    "Tile": [([np.array([1, 2, 1, 3])], {}, 20)],
    "Mean": [([X[:1], X[1:]], {}, 20)],
}


def model_of(operator, inputs, attributes, opset, domain=""):
    """A model of one operator on x and constants; None leaves an input out."""
    arrays = {f"c{i}": value for i, value in enumerate(inputs) if value is not None}
    names = ["x", *("" if value is None else f"c{i}" for i, value in enumerate(inputs))]
    node = helper.make_node(operator, names, ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, X.shape)],
        [helper.make_empty_tensor_value_info("y")],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def by_onnxruntime(model):
    kind = onnx.TensorProto.BOOL if model.graph.node[0].op_type.startswith("Greater") else onnx.TensorProto.FLOAT
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    typed.graph.output[0].type.tensor_type.elem_type = kind
    return ort.InferenceSession(typed.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


def by_jax(model):
    with static_initializers_only(False):
        function, variables = call_onnx_model(model, [X])
        return np.asarray(function(variables, [X])[0])


def test_every_operator_has_a_case():
    assert set(CASES) == set(OPERATORS)


@pytest.mark.parametrize(("operator", "case"), [(name, case) for name, cases in CASES.items() for case in range(len(cases))])
def test_an_operator_gives_what_onnxruntime_gives(operator, case):
    inputs, attributes, opset = CASES[operator][case]
    model = model_of(operator, inputs, attributes, opset)
    assert missing(model.graph.node, opset) == []
    expected = by_onnxruntime(model)
    assert by_jax(model).shape == expected.shape
    np.testing.assert_allclose(by_jax(model), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("opset", [13, 17, 20, 22, 23])
def test_operators_that_later_opsets_changed_in_their_types_alone_are_run_in_the_form_that_is_known(opset):
    kernel = np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    cases = [
        ("Conv", [kernel], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [1, 2]}),
        ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("GlobalAveragePool", [], {}),
        ("Flatten", [], {}),
        ("Reshape", [np.array([0, -1])], {}),
        ("Transpose", [], {"perm": [0, 2, 3, 1]}),
    ]
    for operator, inputs, attributes in cases:
        model = model_of(operator, inputs, attributes, opset)
        assert missing(model.graph.node, opset) == [], operator
        np.testing.assert_allclose(by_jax(model), by_onnxruntime(model), rtol=1e-4, atol=1e-4, err_msg=operator)


def test_a_form_that_differs_in_more_than_types_is_not_taken():
    # Conv of opset 22 has the attributes of 11's.
    assert missing([helper.make_node("Conv", ["x", "w"], ["y"])], 22) == []
    assert hasattr(Conv, "version_22") and Conv.version_22.__func__ is Conv.version_11.__func__
    # Opset 24 gave Cast an attribute.
    node = helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT)
    assert missing([node], 19) == [] and missing([node], 24) == ["Cast"]


def test_what_cannot_be_run_is_named_once_and_in_order():
    nodes = [
        helper.make_node("Resize", ["x"], ["a"]),
        helper.make_node("FusedConv", ["a"], ["b"], domain="com.microsoft"),
        helper.make_node("Resize", ["b"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("If", ["d"], ["e"], then_branch=helper.make_graph([], "g", [], [])),
        helper.make_node("HardSwish", ["e"], ["f"]),
        helper.make_node("Abs", ["f"], ["y"], domain="ai.onnx"),
    ]
    assert missing(nodes, 20) == ["If", "Resize", "com.microsoft.FusedConv"]
