"""The ONNX operators of image classifiers that jaxonnxruntime lacks, added to it the way that it adds its own."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import onnx
from jaxonnxruntime import onnx_ops as onnx_ops  # Importing it is what registers the library's own.
from jaxonnxruntime.core.handler import Handler

Array = jax.Array

# --- the operators: tensors in, attributes by name, as https://onnx.ai/onnx/operators says ----------------------------------


def hard_sigmoid(x: Array, *, alpha: float = 0.2, beta: float = 0.5) -> Array:
    return jnp.clip(alpha * x + beta, 0, 1)


def hard_swish(x: Array) -> Array:
    return x * hard_sigmoid(x, alpha=1 / 6)


def clip(x: Array, least: Array | None = None, most: Array | None = None, **attributes: float) -> Array:
    """The limits are inputs from opset 11 on, and attributes before."""
    return jnp.clip(x, attributes.get("min", least), attributes.get("max", most))


def gelu(x: Array, *, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def global_max_pool(x: Array) -> Array:
    return x.max(tuple(range(2, x.ndim)), keepdims=True)


def max_pool(
    x: Array,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    ceil_mode: int = 0,
    auto_pad: str = "NOTSET",
    **_: Any,
) -> Array:
    """The library's, and with ceil_mode, which SqueezeNet and GoogLeNet have: a last window that is only partly inside counts too."""
    ones = (1,) * len(kernel_shape)
    strides, dilations = strides or ones, dilations or ones
    begins, ends = (pads or (0, 0) * len(ones))[: len(ones)], (pads or (0, 0) * len(ones))[len(ones) :]
    padding: Any = {"SAME_UPPER": "SAME", "SAME_LOWER": "SAME_LOWER"}.get(auto_pad)
    if padding is None:
        widths = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(kernel_shape, dilations, strict=True)]
        sizes = zip(x.shape[2:], begins, ends, widths, strides, strict=True)
        extra = [_overhang(*each) if ceil_mode else 0 for each in sizes]
        padding = [(0, 0), (0, 0), *((begin, end + more) for begin, end, more in zip(begins, ends, extra, strict=True))]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, *kernel_shape), (1, 1, *strides), padding, None, (1, 1, *dilations))


def _overhang(size: int, begin: int, end: int, width: int, stride: int) -> int:
    """By how much the last window that begins inside reaches beyond the end."""
    rest = size + begin + end - width
    steps = -(-rest // stride)
    steps -= steps * stride >= size + begin
    return max(0, steps * stride - rest)


def layer_normalization(x: Array, scale: Array, bias: Array | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Array:
    scaled = _standardized(x, tuple(range(axis % x.ndim, x.ndim)), epsilon) * scale
    return scaled if bias is None else scaled + bias


def instance_normalization(x: Array, scale: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    return _affine(_standardized(x, tuple(range(2, x.ndim)), epsilon), scale, bias)


def group_normalization(x: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float = 1e-5, **_: Any) -> Array:
    groups = x.reshape(x.shape[0], num_groups, -1)
    normal = _standardized(groups, (2,), epsilon).reshape(x.shape)
    # One scale per group before opset 21, one per channel since.
    scale, bias = (jnp.repeat(v, x.shape[1] // v.size, total_repeat_length=x.shape[1]) for v in (scale, bias))
    return _affine(normal, scale, bias)


def _standardized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + epsilon)


def _affine(x: Array, scale: Array, bias: Array) -> Array:
    shape = (-1, *(1,) * (x.ndim - 2))
    return x * scale.reshape(shape) + bias.reshape(shape)


def _reduction(function: Callable[..., Array]) -> Callable[..., Array]:
    """Axes are an input from opset 18 on, and an attribute before."""

    def reduce(x: Array, given: tuple[int, ...] | None = None, *, axes=None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Array:
        axes = given or axes
        return x if axes is None and noop_with_empty_axes else function(x, axis=axes, keepdims=bool(keepdims))

    return reduce


def _norm(x: Array, *, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    return jnp.sqrt(jnp.square(x).sum(axis, keepdims=keepdims))


OPERATORS: dict[str, Callable[..., Array]] = {
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    # The library's passes jnp.clip arguments that it no longer has.
    "Clip": clip,
    "Elu": lambda x, *, alpha=1.0: jax.nn.elu(x, alpha),
    "Celu": lambda x, *, alpha=1.0: jax.nn.celu(x, alpha),
    "Gelu": gelu,
    "Mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "Softsign": lambda x: x / (1 + jnp.abs(x)),
    "GlobalMaxPool": global_max_pool,
    "MaxPool": max_pool,
    "LayerNormalization": layer_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": group_normalization,
    "ReduceL2": _reduction(_norm),
    "ReduceL1": _reduction(lambda x, **how: jnp.abs(x).sum(**how)),
    "ReduceMin": _reduction(jnp.min),
    "ReduceProd": _reduction(jnp.prod),
    "Floor": jnp.floor,
    "Round": jnp.round,
    "Sign": jnp.sign,
    "Greater": jnp.greater,
    "GreaterOrEqual": jnp.greater_equal,
    "Tile": lambda x, repeats: jnp.tile(x, repeats),
    "Mean": lambda *x: sum(x) / len(x),
}

STATIC: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMin", "ReduceProd", "Tile"), (1,)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Expand", "Split", "Squeeze", "Unsqueeze", "TopK", "Trilu"), (1,)),
    "ConstantOfShape": (0,),
    "Dropout": (1, 2),
    "NonZero": (0,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
}
"""Inputs, by number, that shapes depend on: they are read once, when the network is loaded, so pixels may not enter them."""


# --- making them known to the library ---------------------------------------------------------------------------------------


def _handler(name: str, function: Callable[..., Array]) -> type[Handler]:
    def handle(cls: type, node: Any, inputs: list[Any], **_: Any) -> Callable[..., Array]:
        fixed = {i: tuple(inputs[i].tolist()) for i in STATIC.get(name, ()) if i < len(inputs) and inputs[i] is not None}

        def call(*inputs: Any) -> Array:
            return function(*(fixed.get(i, x) for i, x in enumerate(inputs)), **node.attrs)

        return call

    # A handler of a name that the library has too takes its place: later subclasses win.
    return type(name, (Handler,), {"OP_TYPE": name, "DOMAIN": "", "handle": classmethod(handle)})


@functools.cache
def register() -> list[type[Handler]]:
    """Makes `OPERATORS` known to jaxonnxruntime, once.

    It finds handlers among the subclasses of Handler, and a class does not keep its subclasses alive: the cache of this function does.
    """
    return [_handler(name, function) for name, function in OPERATORS.items()]


def missing(nodes: Iterable[onnx.NodeProto], opset: int) -> list[str]:
    """The operators of these nodes that there is no way to run, sorted, each once.

    jaxonnxruntime knows operators by the opset that last changed them. Where a change was one of permitted types alone, as most
    of those of opsets 20 and later, the form that it knows is taken.
    """
    register()
    handlers = {handler.OP_TYPE: handler for handler in Handler.__subclasses__() if not handler.DOMAIN}
    found = set()
    for node in nodes:
        # Branches and loops would be decided once, when the network is loaded, whatever the pixels are.
        controls = any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute)
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain or controls or node.op_type not in handlers or not _completed(handlers[node.op_type], opset):
            found.add(f"{domain}.{node.op_type}".lstrip("."))
    return sorted(found)


def _completed(handler: type[Handler], opset: int) -> bool:
    """Whether the handler has the operator's form of this opset, taken from another opset where that is the same but for types."""
    name = handler.OP_TYPE
    if name in OPERATORS:
        return True
    try:
        wanted = onnx.defs.get_schema(name, opset)
    except onnx.defs.SchemaError:
        return False
    if hasattr(handler, f"version_{wanted.since_version}"):
        return True
    known = sorted((int(text.removeprefix("version_")) for text in dir(handler) if text.startswith("version_")), reverse=True)
    for version in known:
        if _form(onnx.defs.get_schema(name, version)) == _form(wanted):
            setattr(handler, f"version_{wanted.since_version}", getattr(handler, f"version_{version}"))
            return True
    return False


def _form(schema: onnx.defs.OpSchema) -> Any:
    """All of an operator's signature but the types."""
    attributes = {name: (a.type, a.required, a.default_value.SerializeToString()) for name, a in schema.attributes.items()}
    return [(x.name, x.option) for x in (*schema.inputs, *schema.outputs)], attributes
