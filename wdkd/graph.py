"""A network as a list of operations, recorded while its own definition is traced: what exports and counts are made from.

Nothing here knows an architecture. Group norm, batch norm and pooling are recorded as the modules that they are; everything else is read
from the jaxpr, so a network that does something new cannot be recorded wrongly: it is refused.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Primitive

from wdkd.errors import UsageError
from wdkd.models import apply_network

PIXELS = "pixels"
"""Name of a graph's input."""
_BATCH = 2
"""Images that are traced: any number would do."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation on a batch; images are (B, h, w, c) and kernels (h, w, in, out), as in Linen.

    sub, div, add, mul: elementwise, of two values, or of a value and a parameter (c,). relu: max(x, 0). conv: `strides`, and `padding` as
    [[top, bottom], [left, right]]. max_pool: 2x2 with stride 2, over what is there of a window. group_norm (x, scale, bias): `groups`,
    `epsilon`. batch_norm (x, scale, bias, mean, var): `epsilon`. mean: of all pixels, (B, c). dense: x @ kernel.
    """

    op: str
    inputs: tuple[str, ...]
    """Names of values, the first of which is `PIXELS` or another node's output, and of parameters."""
    output: str
    shape: tuple[int, ...]
    """Of the output, without the batch."""
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Operations in an order in which they can be done; the last one gives the logits (B, classes)."""

    image_shape: tuple[int, ...]
    """(H, W, C) of the input, pixels in [0, 1]."""
    nodes: tuple[Node, ...]
    parameters: dict[str, tuple[int, ...]]
    """Shapes by name, as `named` gives them."""


def named(variables: Any) -> dict[str, Any]:
    """The leaves of a tree of variables by their path, as params.Conv_0.kernel."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def record(model: nn.Module, variables: Any, image_shape: Sequence[int]) -> Graph:
    """The graph of a network in inference form.

    Args:
      model: as `models.create_model` or `folding.fold` makes it.
      variables: arrays or shape structs, with the statistics of the input at variables["input"].
      image_shape: (H, W, C).

    Raises:
      UsageError: for an operation that graphs do not have.
    """
    image = jax.ShapeDtypeStruct((_BATCH, *image_shape), jnp.float32)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    with nn.intercept_methods(_as_one_operation):
        closed = jax.make_jaxpr(lambda tree, x: apply_network(model, tree, x, train=False).logits)(like, image)
    recorder = _Recorder()
    parameters = named(like)
    *leaves, pixels = closed.jaxpr.invars
    recorder.known.update(zip(leaves, map(_Parameter, parameters), strict=True))
    recorder.known[pixels] = PIXELS
    recorder.walk(closed.jaxpr)
    used = {name for node in recorder.nodes for name in node.inputs}
    shapes = {name: tuple(leaf.shape) for name, leaf in parameters.items() if name in used}
    return Graph(tuple(image_shape), tuple(recorder.nodes), shapes)


# --- modules that are one operation -----------------------------------------------------------------------------------


def _operation(name: str) -> Primitive:
    """A primitive that stands in the jaxpr for a module of several; `shape` is that of its output."""
    operation = Primitive(name)
    operation.def_abstract_eval(lambda x, *_, shape, **attributes: x.update(shape=shape))
    return operation


_MAX_POOL, _GROUP_NORM, _BATCH_NORM = map(_operation, ("max_pool", "group_norm", "batch_norm"))


def _as_one_operation(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    module, method = context.module, context.method_name
    if method == "halve":
        shape = jax.eval_shape(lambda x: call(x), *args).shape
        return args[0] if shape == args[0].shape else _MAX_POOL.bind(*args, shape=shape)
    if method == "__call__" and isinstance(module, nn.GroupNorm):
        params = module.variables["params"]
        attributes = {"groups": module.num_groups, "epsilon": module.epsilon}
        return _GROUP_NORM.bind(*args, params["scale"], params["bias"], shape=args[0].shape, **attributes)
    if method == "__call__" and isinstance(module, nn.BatchNorm):
        params, statistics = module.variables["params"], module.variables["batch_stats"]
        arrays = params["scale"], params["bias"], statistics["mean"], statistics["var"]
        return _BATCH_NORM.bind(*args, *arrays, shape=args[0].shape, epsilon=module.epsilon)
    return call(*args, **kwargs)


# --- the walk ---------------------------------------------------------------------------------------------------------


class _Parameter(str):
    """Name of a parameter, whatever axes of length 1 it has been given."""


SAME = ("broadcast_in_dim", "reshape", "stop_gradient", "convert_element_type", "copy")
"""Primitives that leave a parameter what it is to an elementwise operation."""


class _Recorder:
    """Reads equations in their order; `known` maps what they are about to names."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.known: dict[Any, str] = {}

    def walk(self, jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if inner is not None:
                body = getattr(inner, "jaxpr", inner)
                self.known.update(zip(body.invars, map(self._name, equation.invars), strict=True))
                self.walk(body)
                self.known.update(zip(equation.outvars, map(self._name, body.outvars), strict=True))
            else:
                operands = [self._name(variable) for variable in equation.invars]
                (output,) = equation.outvars
                self.known[output] = self._one(name, operands, equation, tuple(output.aval.shape))

    def _name(self, variable: Any) -> Any:
        """Name of a value or parameter, or the number that a literal is."""
        return variable.val if isinstance(variable, Literal) else self.known[variable]

    def _one(self, name: str, operands: list[Any], equation: Any, shape: tuple[int, ...]) -> str:
        """Records one equation; returns the name of what it gives."""
        params = equation.params
        if name in SAME and isinstance(operands[0], _Parameter) and _is_spread(equation.invars[0].aval.shape, shape):
            return operands[0]
        if name in ("max_pool", "group_norm", "batch_norm"):
            return self._add(name, operands, shape, **{key: value for key, value in params.items() if key != "shape"})
        if name in ("add", "mul") and (isinstance(operands[0], _Parameter) or not isinstance(operands[0], str)):
            operands.reverse()
        if name == "mul" and not isinstance(operands[1], str) and operands[1] == 1:
            return operands[0]
        if name in ("add", "mul", "sub", "div") and all(isinstance(operand, str) for operand in operands):
            return self._add(name, operands, shape)
        if name == "max" and not isinstance(operands[1], str) and operands[1] == 0:
            return self._add("relu", operands[:1], shape)
        if name == "conv_general_dilated" and _is_plain(params):
            padding = [list(map(int, pair)) for pair in params["padding"]]
            return self._add("conv", operands, shape, strides=list(params["window_strides"]), padding=padding)
        if name == "dot_general" and params["dimension_numbers"] == (((1,), (0,)), ((), ())):
            return self._add("dense", operands, shape)
        if name == "reduce_sum" and tuple(params["axes"]) == (1, 2):
            return self._add("sum", operands, shape, count=math.prod(equation.invars[0].aval.shape[1:3]))
        if name == "div" and self._is_mean(*operands):
            last = self.nodes.pop()
            return self._add("mean", list(last.inputs), shape)
        raise UsageError(f"the network uses {equation.primitive.name!r} in a way that no graph has; add it to wdkd/graph.py")

    def _is_mean(self, value: Any, divisor: Any) -> bool:
        last = self.nodes[-1]
        return last.op == "sum" and value == last.output and not isinstance(divisor, str) and divisor == last.attributes["count"]

    def _add(self, op: str, inputs: Sequence[str], shape: tuple[int, ...], **attributes: Any) -> str:
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(Node(op, tuple(map(str, inputs)), output, shape[1:], attributes))
        return output


def _is_spread(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether an array was given leading axes of length 1, at most."""
    return tuple(after) == (1,) * (len(after) - len(before)) + tuple(before)


def _is_plain(params: Mapping[str, Any]) -> bool:
    """Whether a convolution is of images (B, h, w, c), all channels with all, without dilation."""
    numbers = params["dimension_numbers"]
    layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    groups = params["feature_group_count"], params["batch_group_count"]
    return layout and groups == (1, 1) and {*params["lhs_dilation"], *params["rhs_dilation"]} == {1}


# --- what it costs ----------------------------------------------------------------------------------------------------


def flops(graph: Graph) -> int:
    """Floating-point operations of one image's forward pass, counted as XLA's compiler does.

    A multiplication and an addition are two, a comparison or a choice is one. Products with the zeros around an image are none, and
    neither are roots, which are counted apart there as transcendental.
    """
    shapes = {PIXELS: graph.image_shape} | {node.output: node.shape for node in graph.nodes} | graph.parameters
    return sum(_node_flops(node, [shapes[name] for name in node.inputs]) for node in graph.nodes)


def _node_flops(node: Node, shapes: list[tuple[int, ...]]) -> int:
    size, first = math.prod(node.shape), math.prod(shapes[0])
    if node.op == "conv":
        _, _, channels, features = shapes[1]
        taps = [
            _taps(*sides)
            for sides in zip(shapes[0], shapes[1], node.shape, node.attributes["strides"], node.attributes["padding"], strict=False)
        ]
        return 2 * taps[0] * taps[1] * channels * features
    if node.op == "dense":
        return 2 * math.prod(shapes[1])
    if node.op == "max_pool":
        # Two maxima along one side and one along the other, of a comparison and a choice each.
        return 6 * size
    if node.op == "mean":
        return first
    if node.op == "group_norm":
        # Of all: squares, two sums, difference, product, sum. Of channels and groups: the variances, and the scales with them.
        return 6 * size + 2 * node.shape[-1] + 3 * node.attributes["groups"]
    if node.op == "batch_norm":
        return 3 * size + 2 * node.shape[-1]
    return size


def _taps(side: int, kernel: int, out: int, stride: int, padding: Sequence[int]) -> int:
    """How many products one row of a convolution takes: of all places of the kernel, those of its taps that lie on the image."""
    return sum(0 <= place * stride + tap - padding[0] < side for place in range(out) for tap in range(kernel))
