"""Input gradients, one per example, and the worst case over a Wasserstein ball that they give to first order.

For a ball of radius epsilon in the ground metric ||.||, to first order in epsilon,

    worst case = mean_i l(x_i) + epsilon * aggregate_i ||grad_{x_i} l(x_i)||_*

with ||.||_* the dual norm and `mean` for the W_infinity ball (Eq. 2 of Kong, Guo, You, Xu, AAAI 2020), `rms` for the W_2 ball,
`max` for the nearest that a batch gets to the supremum in the W_1 (Lipschitz) bound. The true worst case can lie above it: the
examples' gradients stand in for those of all x. `toward_boundary` follows a classifier's own input gradients to where it changes
its mind. Nothing here knows of networks, or of devices.
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


def toward_boundary(logits: Callable[[Array], Array], x: Array, keys: Array, radius: float, steps: int = 3) -> Array:
    """Each image moved to where a classifier is undecided between its class a and another, b, or as near to it as it may go.

    From x_i, `steps` steps of Newton's method along the gradient of the margin m = z_a - z_b of the logits (Moosavi-Dezfooli, Fawzi,
    Frossard 2016, DeepFool), none longer than the ball is wide:

        x <- P(x - m(x) g / ||g||^2),    g = grad_x m(x),    P: into the Euclidean ball of `radius` around x_i, then into [0, 1]

    The class b is drawn by the classifier's probabilities of all but a, as Heo et al. 2019 (boundary supporting samples) do. An image
    whose margin has no gradient stays. No derivative goes through it.

    Args:
      logits: x -> (B, classes), each row a function of its own image alone; two classes or more.
      x: (B, ...), in pixels of [0, 1].
      keys: one random key per example (B,), which draws b.
      radius: the furthest that an image is moved, above 0, in pixel units.
      steps: how often the classifier is differentiated.

    Returns:
      Images like x.
    """
    said = logits(x)
    own = jax.nn.one_hot(jnp.argmax(said, -1), said.shape[-1], dtype=bool)
    other = jax.vmap(jax.random.categorical)(keys, jnp.where(own, -jnp.inf, said))
    sides = own.astype(x.dtype) - jax.nn.one_hot(other, said.shape[-1], dtype=x.dtype)
    origin, tiny = x.reshape(len(x), -1), jnp.finfo(x.dtype).tiny
    moved = origin
    for _ in range(steps):
        margins, gradients = value_and_input_gradient(lambda flat: (logits(flat.reshape(x.shape)) * sides).sum(-1), moved)
        lengths = jnp.maximum(_euclidean_norm(gradients), tiny)
        # Where the margin hardly changes, Newton's step leads arbitrarily far.
        distances = jnp.clip(margins / lengths, -2 * radius, 2 * radius)
        away = moved - origin - (distances / lengths)[:, None] * gradients
        shares = jnp.minimum(1, radius / jnp.maximum(_euclidean_norm(away), tiny))
        moved = jnp.clip(origin + shares[:, None] * away, 0, 1)
    return jax.lax.stop_gradient(moved.reshape(x.shape))


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
