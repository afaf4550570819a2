"""Batch norm in inference form is one affine map per channel: it goes into the convolution before it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wdkd.models import Norm, apply_network

EPSILON = 1e-5
"""What flax's BatchNorm adds to the variance."""


def fold(model: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> tuple[nn.Module, Any]:
    """A network and variables that give the same inference outputs with less work; networks without batch norm as they are.

    With s = scale / sqrt(var + 1e-5), norm(conv(x)) = conv'(x) + (bias - s * mean), the kernel of conv' being s times that of conv.
    Where the maximum of a pooling stands between the two it commutes with |s| alone, and the sign of s is applied after it.

    Args:
      model: as `models.create_model` makes it, not in training.
      variables: {"params", "batch_stats", and perhaps "input"}.
      image_shape: (H, W, C).

    Returns:
      (folded model, its variables), equal to about 1e-6 of the outputs' size.
    """
    if model.norm != "batch":
        return model, variables
    params, statistics = dict(variables["params"]), dict(variables["batch_stats"])
    folded: dict[str, Any] = {}
    for index, (conv, norm, halved) in enumerate(_pairs(model, variables, image_shape)):
        scale, bias = _affine(params.pop(norm)["BatchNorm_0"], statistics.pop(norm)["BatchNorm_0"])
        kernel = np.asarray(params.pop(conv)["kernel"], np.float64)
        folded[conv] = {"kernel": kernel * (np.abs(scale) if halved else scale)}
        folded[f"Shift_{index}"] = {"bias": bias} | ({"sign": np.sign(scale)} if halved else {})
    # Norms that follow no convolution stay, and are counted anew.
    left = sorted(statistics, key=lambda name: int(name.split("_")[1]))
    renamed = {name: f"Norm_{index}" for index, name in enumerate(left)}
    params = {renamed.get(name, name): tree for name, tree in params.items()} | folded
    kept = {"params": params, "batch_stats": {renamed[name]: statistics[name] for name in left}}
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), kept)
    return model.clone(folded=True), {**variables, **arrays}


def _affine(params: Any, statistics: Any) -> tuple[np.ndarray, np.ndarray]:
    """(scale, bias) per channel of a batch norm, in float64."""
    scale, bias, mean, var = (
        np.asarray(leaf, np.float64) for leaf in (params["scale"], params["bias"], statistics["mean"], statistics["var"])
    )
    scale = scale / np.sqrt(var + EPSILON)
    return scale, bias - scale * mean


def _pairs(model: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> list[tuple[str, str, bool]]:
    """(convolution, norm, whether pooling stands between them) of each pair, in the order in which the network calls them."""
    found: list[tuple[str, str, bool]] = []
    names: dict[type, str] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if context.method_name == "__call__":
            names[type(context.module)] = context.module.name
        elif context.method_name == "convolve_normalize":
            found.append((names[nn.Conv], names[Norm], kwargs.get("halve", False)))
        return outputs

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda tree, x: apply_network(model, tree, x, train=False), variables, image)
    return found
