"""Losses between student and teacher: arrays in, one value per example out.

Every function is pure and returns shape (B,); whoever calls it reduces. The teacher's values are ordinary arguments: nothing
here stops their gradient, because the input gradient of the worst-case objective goes through both networks. Results are
float32 whatever the inputs' precision, or float64 where an input is. Mismatched shapes raise AssertionError (chex).
"""

import chex
import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-sum_c y_c log softmax(logits)_c, in nats.

    Args:
      logits: (B, C).
      labels: integers (B,), or class probabilities (B, C) such as mixup makes.

    Returns:
      (B,). A label outside 0..C-1 gives NaN.

    Raises:
      AssertionError: labels are neither integers (B,) nor of the logits' shape.
    """
    if jnp.ndim(labels) == jnp.ndim(logits) - 1 and jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        chex.assert_shape(labels, jnp.shape(logits)[:-1])
        (logits,) = _at_least_float32(logits)
        labels = jnp.asarray(labels, jnp.int32)
        # An index of -1 would mean the last class; past the last class means NaN.
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(labels < 0, logits.shape[-1], labels))
    logits, labels = _at_least_float32(logits, labels)
    chex.assert_equal_shape([logits, labels])
    return optax.softmax_cross_entropy(logits, labels)


def kl_divergence(student_logits: jax.Array, teacher_logits: jax.Array, temperature: chex.Numeric) -> jax.Array:
    """T^2 KL(p || q) = T^2 sum_c p_c (log p_c - log q_c), p = softmax(teacher / T), q = softmax(student / T), in nats.

    Hinton, Vinyals, Dean 2015 (arXiv 1503.02531); T^2 keeps the gradient's size independent of T.

    Args:
      student_logits: (B, C).
      teacher_logits: (B, C).
      temperature: T > 0, a scalar.

    Returns:
      (B,).

    Raises:
      AssertionError: the shapes differ.
    """
    student_logits, teacher_logits = _at_least_float32(student_logits, teacher_logits)
    chex.assert_equal_shape([student_logits, teacher_logits])
    # In one array, so that equal logits give bit-equal probabilities when compiled too.
    log_q, log_p = jax.nn.log_softmax(jnp.stack([student_logits, teacher_logits]) / temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # Adding sum(q - p) = 0 changes no derivative, but makes the gradient exactly 0 where the logits agree. Without it rounding
    # leaves about 1e-8, whose *norm* has a gradient of size 1 in an arbitrary direction.
    return temperature**2 * jnp.sum(p * (log_p - log_q) + (q - p), axis=-1)


def logit_mse(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """mean_c (s_c - t_c)^2, in squared logits.

    Args:
      student_logits: (B, C).
      teacher_logits: (B, C).

    Returns:
      (B,).

    Raises:
      AssertionError: the shapes differ.
    """
    student_logits, teacher_logits = _at_least_float32(student_logits, teacher_logits)
    chex.assert_equal_shape([student_logits, teacher_logits])
    return jnp.mean(jnp.square(student_logits - teacher_logits), axis=-1)


def logit_distance(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """||s - t||_2, not squared, in logits; first and second derivatives are 0 at s = t.

    Convex and Lipschitz, as the theorem of Kong, Guo, You, Xu (AAAI 2020) asks. Its curvature grows like 1 / ||s - t||.

    Args:
      student_logits: (B, C).
      teacher_logits: (B, C).

    Returns:
      (B,).

    Raises:
      AssertionError: the shapes differ.
    """
    student_logits, teacher_logits = _at_least_float32(student_logits, teacher_logits)
    chex.assert_equal_shape([student_logits, teacher_logits])
    difference = student_logits - teacher_logits
    # Measured in units of its largest entry, so that neither the squares nor their second derivative leave the float range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(difference), axis=-1, keepdims=True))
    unit = jnp.where(largest < jnp.finfo(difference.dtype).tiny, 1.0, largest)
    return unit[..., 0] * optax.safe_norm(difference / unit, 0.0, axis=-1)


def hint(student_hidden: jax.Array, teacher_hidden: jax.Array) -> jax.Array:
    """1/2 mean over all units of (h_S - h_T)^2: FitNet's first stage, h_S already through its regressor.

    Romero et al. 2014 (arXiv 1412.6550).

    Args:
      student_hidden: (B, ...).
      teacher_hidden: (B, ...), the same shape.

    Returns:
      (B,).

    Raises:
      AssertionError: the shapes differ.
    """
    student_hidden, teacher_hidden = _at_least_float32(student_hidden, teacher_hidden)
    chex.assert_equal_shape([student_hidden, teacher_hidden])
    return 0.5 * jnp.mean(jnp.square(student_hidden - teacher_hidden), axis=_units(student_hidden))


def activation_boundary(student_preactivation: jax.Array, teacher_preactivation: jax.Array, margin: chex.Numeric) -> jax.Array:
    """sum over all units of (s + m)^2 [s > -m and t <= 0] + (s - m)^2 [s <= m and t > 0].

    Pushes each student unit to the teacher's side of zero, by the margin m. Heo et al., AAAI 2019 (arXiv 1811.03233).

    Args:
      student_preactivation: (B, ...), before the activation function and after the connector.
      teacher_preactivation: (B, ...), the same shape.
      margin: m >= 0, a scalar, in units of the pre-activation.

    Returns:
      (B,).

    Raises:
      AssertionError: the shapes differ.
    """
    s, t = _at_least_float32(student_preactivation, teacher_preactivation)
    chex.assert_equal_shape([s, t])
    too_high = jnp.square(s + margin) * ((s > -margin) & (t <= 0))
    too_low = jnp.square(s - margin) * ((s <= margin) & (t > 0))
    return jnp.sum(too_high + too_low, axis=_units(s))


def _at_least_float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in one floating type: float64 if any is, else float32."""
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(*arrays))
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def _units(array: jax.Array) -> tuple[int, ...]:
    """All axes but that of the examples."""
    return tuple(range(1, array.ndim))
