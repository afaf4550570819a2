"""A recorded graph as an ONNX model: operators that phones' runtimes fuse and onnxruntime's quantiser knows, in their layout, NCHW."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from wdkd.graph import PIXELS, Graph, Node

OPSET, IR_VERSION = 17, 8
"""Read by runtimes from 2022 on. Nothing newer is needed: group norm is an operator from opset 21 on, but no runtime for phones has it."""
LOGITS, PROBABILITIES = "logits", "probabilities"
BATCH = "batch"
"""Name of the first axis of input and outputs, of any length."""


def to_onnx(graph: Graph, values: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The model: pixels (batch, C, H, W) float32 in [0, 1] -> logits and probabilities (batch, classes).

    Args:
      values: of the graph's parameters, by name.
      metadata: what its file says about it, as texts.
    """
    nodes, values = merge(graph, values)
    writer = _Writer(values)
    for node in nodes:
        writer.add(node)
    writer.nodes[-1].output[0] = LOGITS
    writer.nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=-1))
    height, width, channels = graph.image_shape
    classes = graph.nodes[-1].shape[-1]
    drawn = helper.make_graph(
        writer.nodes,
        "wdkd",
        [helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, [BATCH, channels, height, width])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, classes]) for name in (LOGITS, PROBABILITIES)],
        list(writer.initializers.values()),
    )
    model = helper.make_model(drawn, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="wdkd")
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model


def merge(graph: Graph, values: Mapping[str, np.ndarray]) -> tuple[list[Node], dict[str, np.ndarray]]:
    """The graph's nodes with what is added to a convolution, or to the maximum of one, or to a product, as its third input, its bias.

    max(conv) + b = max(conv + b). Products with ones, which `folding` leaves where no scale is negative, are left out.
    """
    nodes: dict[str, Node] = {}
    same: dict[str, str] = {}
    uses = [name for node in graph.nodes for name in node.inputs]
    for node in graph.nodes:
        inputs = tuple(same.get(name, name) for name in node.inputs)
        if node.op == "mul" and inputs[1] in values and (np.asarray(values[inputs[1]]) == 1).all():
            same[node.output] = inputs[0]
        elif (target := _takes_bias(node, inputs, nodes, uses, values)) is not None:
            nodes[target.output] = dataclasses.replace(target, inputs=(*target.inputs, inputs[1]))
            same[node.output] = inputs[0]
        else:
            nodes[node.output] = dataclasses.replace(node, inputs=inputs)
    used = {name for node in nodes.values() for name in node.inputs}
    return list(nodes.values()), {name: np.asarray(value, np.float32) for name, value in values.items() if name in used}


def _takes_bias(
    node: Node, inputs: Sequence[str], nodes: Mapping[str, Node], uses: Sequence[str], values: Mapping[str, np.ndarray]
) -> Node | None:
    """The node that can add what `node` adds, or None."""
    if node.op != "add" or inputs[1] not in values:
        return None
    # What is used once more than here has to stay without the bias.
    target = nodes[inputs[0]]
    alone = uses.count(node.inputs[0]) == 1
    if target.op == "max_pool":
        alone = alone and uses.count(target.inputs[0]) == 1
        target = nodes[target.inputs[0]]
    return target if alone and target.op in ("conv", "dense") and len(target.inputs) == 2 else None


class _Writer:
    """ONNX nodes and initializers, one recorded node after the other."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self.values = values
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def add(self, node: Node) -> None:
        getattr(self, f"_{node.op}", self._elementwise)(node)
        self.shapes[node.output] = node.shape

    def _emit(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def _per_channel(self, name: str, rank: int) -> str:
        """A parameter (c,) as what is added to, or multiplied with, a value of `rank` axes besides the batch."""
        return self._constant(name, self.values[name].reshape(-1, *(1,) * (rank - 1)))

    def _elementwise(self, node: Node) -> None:
        inputs = [self._per_channel(name, len(node.shape)) if name in self.values else name for name in node.inputs]
        self._emit({"sub": "Sub", "div": "Div", "add": "Add", "mul": "Mul", "relu": "Relu"}[node.op], inputs, node.output)

    def _conv(self, node: Node) -> None:
        pixels, kernel, *bias = node.inputs
        names = [self._constant(kernel, self.values[kernel].transpose(3, 2, 0, 1)), *(self._constant(b, self.values[b]) for b in bias)]
        (top, bottom), (left, right) = node.attributes["padding"]
        window = list(self.values[kernel].shape[:2])
        attributes = {"strides": node.attributes["strides"], "pads": [top, left, bottom, right], "kernel_shape": window}
        self._emit("Conv", [pixels, *names], node.output, **attributes)

    def _max_pool(self, node: Node) -> None:
        # Where a side is odd, its last window lies half on what no maximum is: on the network's copy of the edge, or here on nothing.
        after = [2 * out - side for side, out in zip(self.shapes[node.inputs[0]][:2], node.shape[:2], strict=True)]
        self._emit("MaxPool", node.inputs, node.output, kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, *after])

    def _group_norm(self, node: Node) -> None:
        """Groups as the channels of an instance norm; then each channel's own scale and bias."""
        x, scale, bias = node.inputs
        height, width, channels = node.shape
        groups, name = node.attributes["groups"], node.output
        apart = self._constant(f"{name}.groups", np.asarray([0, groups, -1], np.int64))
        back = self._constant(f"{name}.channels", np.asarray([0, channels, height, width], np.int64))
        plain = [
            self._constant(f"ones_{groups}", np.ones(groups, np.float32)),
            self._constant(f"zeros_{groups}", np.zeros(groups, np.float32)),
        ]
        self._emit("Reshape", [x, apart], f"{name}.apart")
        self._emit("InstanceNormalization", [f"{name}.apart", *plain], f"{name}.normal", epsilon=node.attributes["epsilon"])
        self._emit("Reshape", [f"{name}.normal", back], f"{name}.back")
        self._emit("Mul", [f"{name}.back", self._per_channel(scale, 3)], f"{name}.scaled")
        self._emit("Add", [f"{name}.scaled", self._per_channel(bias, 3)], name)

    def _batch_norm(self, node: Node) -> None:
        x, *arrays = node.inputs
        names = [self._constant(name, self.values[name]) for name in arrays]
        self._emit("BatchNormalization", [x, *names], node.output, epsilon=node.attributes["epsilon"])

    def _mean(self, node: Node) -> None:
        self._emit("GlobalAveragePool", node.inputs, f"{node.output}.pooled")
        self._emit("Flatten", [f"{node.output}.pooled"], node.output, axis=1)

    def _dense(self, node: Node) -> None:
        x, *arrays = node.inputs
        self._emit("Gemm", [x, *(self._constant(name, self.values[name]) for name in arrays)], node.output)
