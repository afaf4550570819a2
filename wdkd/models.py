"""Linen networks. Each maps pixels in [0, 1] to `Outputs(logits, hidden)`; normalisation of pixels happens inside.

hidden["stage1" | "stage2" | "stage3"] is what the last activation of a resolution stage is applied to, (B, h, w, c).
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from wdkd.config import ModelConfig
from wdkd.errors import UsageError, unknown
from wdkd.whitening import PATCH, whitening_filters

STAGES = ("stage1", "stage2", "stage3")
MIN_SIDE = 8
MAX_DEPTH = 200
"""Layers of the deepest network; its step is compiled within minutes."""
MAX_PARAMETERS = 500_000_000
"""Of the largest network: training one takes 16 bytes and more for each of them."""


@struct.dataclass
class Outputs:
    """What a network says of a batch: logits (B, classes) and, by stage, pre-activations (B, h, w, c)."""

    logits: jax.Array
    hidden: dict[str, jax.Array]


class Norm(nn.Module):
    """Group norm (at most 8 groups, at least 4 channels in each where they divide) or batch norm over all devices.

    Group norm keeps examples apart, which input gradients per example need (Wu & He 2018).
    """

    kind: str
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "batch":
            return nn.BatchNorm(use_running_average=not self.train, momentum=0.9, axis_name=self.axis_name if self.train else None)(x)
        channels = x.shape[-1]
        groups = max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4))
        return nn.GroupNorm(num_groups=groups)(x)


def _he_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    # Drawn in two dimensions: the same numbers, but XLA compiles random bits of four dimensions for 8 seconds on CPU.
    return nn.initializers.he_normal()(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


class Shift(nn.Module):
    """What is left of a normalisation whose scale went into the convolution: x + bias, or ±x + bias channel by channel."""

    signed: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        signs = self.param("sign", nn.initializers.ones, shape) if self.signed else 1
        return signs * x + self.param("bias", nn.initializers.zeros, shape)


def _halve(x: jax.Array) -> jax.Array:
    """2×2 max pooling of (B, h, w, c), unless a side is 4 or less; odd sides round up. Of equal maxima, one has the derivative.

    By slices rather than `nn.max_pool`, whose second derivative scatters, and by `where` rather than `jnp.maximum`, whose derivative
    divides to share it between equal maxima: a distillation step takes a quarter less time on CPU.
    """
    height, width = x.shape[1:3]
    if min(height, width) <= 4:
        return x
    if height % 2 or width % 2:  # A padding by nothing is not free: its second derivative is made of arrays of zeros.
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    x = _larger(x[:, ::2], x[:, 1::2])
    return _larger(x[:, :, ::2], x[:, :, 1::2])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a >= b, a, b)


class _Network(nn.Module):
    """What all networks share: input normalisation, convolution with normalisation, and the linear head.

    `dtype` is what convolutions are computed in, parameters and all else being float32. `folded` networks take the variables that
    `folding.fold` makes.
    """

    classes: int
    widths: Sequence[int]
    norm: str
    mean: Sequence[float]
    std: Sequence[float]
    axis_name: str | None = None
    dtype: Any = None
    folded: bool = False

    def standardize(self, x: jax.Array) -> jax.Array:
        return (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)

    def head(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))

    def normalize(self, x: jax.Array, train: bool) -> jax.Array:
        return Norm(self.norm, train, self.axis_name)(x)

    def convolve(self, x: jax.Array, width: int, kernel: int = 3, stride: int = 1) -> jax.Array:
        window, strides = (kernel, kernel), (stride, stride)
        y = nn.Conv(width, window, strides, padding="SAME", use_bias=False, kernel_init=_he_normal, dtype=self.dtype)(x)
        return y.astype(jnp.float32) if self.dtype == jnp.bfloat16 else y

    def halve(self, x: jax.Array) -> jax.Array:
        """A method, so that `graph.record` sees a pooling where it is called."""
        return _halve(x)

    def convolve_normalize(self, x: jax.Array, width: int, train: bool, *, halve: bool = False, **window: int) -> jax.Array:
        """norm(conv(x)), or norm(halve(conv(x))): what `folding.fold` makes one affine map of."""
        y = self.convolve(x, width, **window)
        y = self.halve(y) if halve else y
        if self.folded:
            return Shift(signed=halve)(y)
        return self.normalize(y, train)


class CNN(_Network):
    """Three stages of convolution, pooling, convolution (the layout of fast CIFAR-10 recipes: little work at full size).

    Width 16 is a student of 73 thousand parameters, width 64 a teacher of 1.2 million.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Outputs:
        x, hidden = self.standardize(x), {}
        for stage, width in zip(STAGES, self.widths, strict=True):
            x = nn.relu(self.convolve_normalize(x, width, train, halve=True))
            hidden[stage] = self.convolve_normalize(x, width, train)
            x = nn.relu(hidden[stage])
        return Outputs(self.head(x), hidden)


class Whitening(nn.Module):
    """Convolution with fixed filters (2, 2, C, 8 C). Random ones until `with_whitening` puts those of the training images in."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        filters = self.param("filters", _he_normal, (PATCH, PATCH, channels, 2 * PATCH**2 * channels))
        # A constant: neither the objective's gradient nor weight decay (of kernels alone) moves it.
        filters = lax.stop_gradient(filters).astype(x.dtype)
        return lax.conv_general_dilated(x, filters, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class WhitenedCNN(_Network):
    """`CNN` behind a whitening layer (Jordan 2024, arXiv 2404.00498), with which it takes about half as many steps to learn."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Outputs:
        x, hidden = nn.relu(Whitening()(self.standardize(x))), {}
        for stage, width in zip(STAGES, self.widths, strict=True):
            x = nn.relu(self.convolve_normalize(x, width, train, halve=True))
            hidden[stage] = self.convolve_normalize(x, width, train)
            x = nn.relu(hidden[stage])
        return Outputs(self.head(x), hidden)


def with_whitening(variables: Mapping[str, Any], images: np.ndarray, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fresh variables with the whitening filters of `images`, uint8 (n, H, W, C); those of a network without the layer as they are.

    `given` holds "mean" and "std" of the pixels in [0, 1].
    """
    params = dict(variables["params"])
    if "Whitening_0" not in params:
        return dict(variables)
    params["Whitening_0"] = {"filters": jnp.asarray(whitening_filters(images, given["mean"], given["std"]))}
    return {**variables, "params": params}


class ResNet(_Network):
    """Residual network for small images, basic blocks, activation after the sum (He et al. 2016, section 4.2)."""

    blocks: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Outputs:
        hidden = {}
        x = nn.relu(self.convolve_normalize(self.standardize(x), self.widths[0], train))
        for index, (stage, width) in enumerate(zip(STAGES, self.widths, strict=True)):
            for block in range(self.blocks):
                stride = 2 if index > 0 and block == 0 else 1
                y = nn.relu(self.convolve_normalize(x, width, train, stride=stride))
                y = self.convolve_normalize(y, width, train)
                shortcut = x if x.shape == y.shape else self.convolve_normalize(x, width, train, kernel=1, stride=stride)
                hidden[stage] = shortcut + y
                x = nn.relu(hidden[stage])
        return Outputs(self.head(x), hidden)


class WideResNet(_Network):
    """Wide residual network, activation before each convolution (Zagoruyko & Komodakis 2016).

    A stage's pre-activation is the normalised sum that the next block's first activation is applied to.
    """

    blocks: int = 2
    widening: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Outputs:
        hidden = {}
        x = self.convolve(self.standardize(x), self.widths[0] // self.widening)
        for index, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if index > 0 and block == 0 else 1
                before = self.normalize(x, train)
                if index > 0 and block == 0:
                    hidden[STAGES[index - 1]] = before
                active = nn.relu(before)
                y = self.convolve(nn.relu(self.convolve_normalize(active, width, train, stride=stride)), width)
                x = y + (x if x.shape == y.shape else self.convolve(active, width, kernel=1, stride=stride))
        hidden[STAGES[-1]] = self.normalize(x, train)
        return Outputs(self.head(nn.relu(hidden[STAGES[-1]])), hidden)


PLAIN = {"cnn": CNN, "whitened_cnn": WhitenedCNN}
"""Networks of one depth, by name."""


def create_model(
    config: ModelConfig, *, classes: int, mean: Sequence[float], std: Sequence[float], axis_name: str | None = None, dtype: Any = None
) -> nn.Module:
    """The network that `config` names.

    Args:
      classes: length of the logits.
      mean, std: of the training pixels, one each per channel, in [0, 1]; std above 0.
      axis_name: pmap axis over which batch norm takes its statistics in training mode.
      dtype: jnp.bfloat16 to compute convolutions in; None: float32, or float64 where the input is.

    Raises:
      UsageError: for a name of no family, a depth that the family does not have, or a network too large to train.
    """
    shared = {"classes": classes, "norm": config.norm, "mean": tuple(mean), "std": tuple(std), "axis_name": axis_name, "dtype": dtype}
    widths = tuple(config.width * factor for factor in (1, 2, 4))
    if config.name in PLAIN:
        _check_size(config, widths, 1)
        return PLAIN[config.name](widths=widths, **shared)
    if match := re.fullmatch(r"resnet([0-9]{1,4})", config.name):
        blocks = _blocks(config.name, int(match[1]), 2)
        _check_size(config, widths, blocks)
        return ResNet(widths=widths, blocks=blocks, **shared)
    if match := re.fullmatch(r"wrn_([0-9]{1,4})_([0-9]{1,3})", config.name):
        widening = int(match[2])
        if widening < 1:
            raise UsageError(f"model {config.name!r} has widening {widening}; it must be at least 1, as in wrn_16_1")
        blocks = _blocks(config.name, int(match[1]), 4)
        widths = tuple(w * widening for w in widths)
        _check_size(config, widths, blocks)
        return WideResNet(widths=widths, blocks=blocks, widening=widening, **shared)
    raise unknown("model", config.name, (*PLAIN, "resnet20", "resnet32", "resnet56", "wrn_16_1", "wrn_16_2", "wrn_40_2"))


def _blocks(name: str, depth: int, offset: int) -> int:
    if depth <= offset or (depth - offset) % 6:
        raise UsageError(f"model {name!r} has depth {depth}; it must be 6n+{offset}, as {6 * 3 + offset}")
    if depth > MAX_DEPTH:
        raise UsageError(f"model {name!r} has depth {depth}; it must be at most {MAX_DEPTH}")
    return (depth - offset) // 6


def _check_size(config: ModelConfig, widths: Sequence[int], blocks: int) -> None:
    """Of a block's two convolutions, the first is half as large where the stage begins."""
    count = sum(9 * width**2 * (2 * blocks - 0.5) for width in widths)
    if count > MAX_PARAMETERS:
        raise UsageError(
            f"model {config.name!r} of width {config.width} has about {count / 1e6:,.0f} million parameters; at most "
            f"{MAX_PARAMETERS // 10**6} million are trained: use a smaller --model.width"
        )


def check_image_shape(shape: Sequence[int]) -> None:
    """Raises UsageError unless `shape` is (H, W, C) with sides of at least 8 and 1 or 3 channels."""
    height, width, channels = shape
    if min(height, width) < MIN_SIDE or channels not in (1, 3):
        raise UsageError(f"images are {height}×{width}×{channels}; networks take sides of at least {MIN_SIDE} and 1 or 3 channels")


def apply_network(model: nn.Module, variables: Mapping[str, Any], x: jax.Array, **options: Any) -> Any:
    """`model.apply` with the pixels' mean and deviation taken from variables["input"], where it is there.

    As arguments instead of constants of the module, they let one compiled step serve every subset of a data set.
    """
    given = variables.get("input")
    if given is None:
        return model.apply(variables, x, **options)
    rest = {name: tree for name, tree in variables.items() if name != "input"}
    return model.clone(mean=given["mean"], std=given["std"]).apply(rest, x, **options)


def initialize(model: nn.Module, key: jax.Array, image_shape: Sequence[int]) -> dict[str, Any]:
    """Fresh variables: {"params": ...} and, with batch norm, {"batch_stats": ...}."""
    return _compiled_init(model)(key, jnp.zeros((1, *image_shape), jnp.float32))


def variable_shapes(model: nn.Module, image_shape: Sequence[int]) -> dict[str, Any]:
    """What `initialize` gives, as shape structs, without computing anything."""
    return jax.eval_shape(lambda key: initialize(model, key, image_shape), jax.random.key(0))


@functools.lru_cache(maxsize=64)
def _compiled_init(model: nn.Module) -> Callable[..., dict[str, Any]]:
    return jax.jit(model.init)


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
