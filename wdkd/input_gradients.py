"""Input gradients, one per example, and the worst case over a Wasserstein ball that they give to first order.

For a ball of radius epsilon in the ground metric ||.||, to first order in epsilon,

    worst case = mean_i l(x_i) + epsilon * aggregate_i ||grad_{x_i} l(x_i)||_*

with ||.||_* the dual norm and `mean` for the W_infinity ball (Eq. 2 of Kong, Guo, You, Xu, AAAI 2020), `rms` for the W_2 ball,
`max` for the nearest that a batch gets to the supremum in the W_1 (Lipschitz) bound. The true worst case can lie above it: the
examples' gradients stand in for those of all x. Nothing here knows of networks, or of devices.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from wdkd.errors import UsageError, unknown

Array = jax.Array


@flax.struct.dataclass
class WorstCaseAux:
    """The parts of the worst-case objective."""

    loss: Array
    """mean_i l(x_i) over the examples given, a scalar."""
    gradient_norm: Array
    """aggregate_i ||grad_{x_i} l(x_i)||_*, a scalar, over what `all_examples` returned."""
    aux: Any = None
    """What the per-example loss returned beside its values."""


def value_and_input_gradient(per_example_loss: Callable, x: Array, *, has_aux: bool = False) -> tuple:
    """l(x_i) and grad_{x_i} l(x_i) for each example i, as grad of sum_i l(x_i).

    That is the per-example gradient only if l(x_i) depends on no other example: batch normalisation in training mode breaks it.

    Args:
      per_example_loss: x -> (B,), or x -> ((B,), aux) with has_aux.
      x: (B, ...), floating point, in pixel units.
      has_aux: whether per_example_loss returns something beside its values.

    Returns:
      (values (B,), gradients like x), or ((values, aux), gradients) with has_aux.

    Raises:
      AssertionError: the values' shape is not (B,).
    """

    def total(x):
        values, aux = per_example_loss(x) if has_aux else (per_example_loss(x), None)
        chex.assert_shape(values, (x.shape[0],))
        return jnp.sum(values), (values, aux)

    gradients, (values, aux) = jax.grad(total, has_aux=True)(x)
    return ((values, aux) if has_aux else values), gradients


def dual_norm(gradients: Array, ground_norm: float) -> Array:
    """||g_i||_*, the dual of the ground metric's norm, for each example i; its gradient at g_i = 0 is 0.

    Ground L2 has dual L2, ground L-infinity has dual L1, ground L1 has dual L-infinity.

    Args:
      gradients: (B, ...), in loss per pixel unit.
      ground_norm: 1, 2 or inf.

    Returns:
      (B,), float32 or float64.

    Raises:
      UsageError: any other ground_norm.
    """
    flat = _at_least_float32(gradients).reshape(gradients.shape[0], -1)
    # jnp.abs has derivative 1 at 0; this has 0.
    magnitudes = flat * jax.lax.stop_gradient(jnp.sign(flat))
    if ground_norm == 1:
        return jnp.max(magnitudes, axis=1)
    if ground_norm == 2:
        return _euclidean_norm(flat)
    if ground_norm == math.inf:
        return jnp.sum(magnitudes, axis=1)
    raise UsageError(f"ground_norm {ground_norm!r} is not one of the numbers 1, 2 and inf")


def worst_case(
    per_example_loss: Callable,
    x: Array,
    epsilon: chex.Numeric,
    ground_norm: float = 2,
    aggregate: str = "mean",
    *,
    has_aux: bool = False,
    all_examples: Callable[[Array], Array] = lambda norms: norms,
) -> tuple[Array, WorstCaseAux]:
    """mean_i l(x_i) + epsilon * aggregate_i ||grad_{x_i} l(x_i)||_*: Eq. 2 of Kong et al. (AAAI 2020) and its relatives.

    On several devices, each with its own examples, `all_examples` makes the aggregate one over the global batch:

        worst_case(..., all_examples=lambda norms: jax.lax.all_gather(norms, "devices", tiled=True))

    The mean loss stays the device's own. With equal shares and that all-gather, whose transpose adds up the devices' cotangents,
    the pmean over devices of the value and of its parameter gradient are those of the global batch, for every aggregate.

    Args:
      per_example_loss: x -> (B,), or x -> ((B,), aux) with has_aux; the gradient goes through all of it, the teacher too.
      x: (B, ...), floating point, in pixel units.
      epsilon: the ball's radius, a scalar in pixel units, measured in the ground norm; may be traced.
      ground_norm: 1, 2 or inf.
      aggregate: "mean", "rms" or "max".
      has_aux: whether per_example_loss returns something beside its values.
      all_examples: (B,) norms -> norms of the global batch; must be differentiable.

    Returns:
      A scalar, and its parts.

    Raises:
      UsageError: unknown ground_norm or aggregate.
      AssertionError: the values' shape is not (B,).
    """
    if aggregate not in _AGGREGATES:
        raise unknown("aggregate", aggregate, _AGGREGATES)
    values, gradients = value_and_input_gradient(per_example_loss, x, has_aux=has_aux)
    values, aux = values if has_aux else (values, None)
    loss = jnp.mean(_at_least_float32(values))
    gradient_norm = _AGGREGATES[aggregate](all_examples(dual_norm(gradients, ground_norm)))
    return loss + epsilon * gradient_norm, WorstCaseAux(loss=loss, gradient_norm=gradient_norm, aux=aux)


def _euclidean_norm(vectors: Array) -> Array:
    """||v||_2 over the last axis, with a gradient of 0 at v = 0."""
    # Measured in units of its largest entry: the squares of a fitted student's gradients would underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    unit = jnp.where(largest < jnp.finfo(vectors.dtype).tiny, 1.0, largest)
    return unit[..., 0] * optax.safe_norm(vectors / unit, 0.0, axis=-1)


def _root_mean_square(norms: Array) -> Array:
    return _euclidean_norm(norms) / math.sqrt(norms.size)


def _at_least_float32(array: Array) -> Array:
    return array.astype(jnp.promote_types(jnp.float32, array.dtype))


_AGGREGATES = {"mean": jnp.mean, "rms": _root_mean_square, "max": jnp.max}
