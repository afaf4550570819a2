"""Each loss against an independent float64 NumPy version, and the properties that its callers rely on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.test_util import check_grads

from wdkd import losses

TEMPERATURE = 4.0
MARGIN = 1.0


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def numpy_cross_entropy(logits, labels):
    return -np.log(scipy.special.softmax(logits, axis=1)[np.arange(len(labels)), labels])


def numpy_soft_cross_entropy(logits, labels):
    return -(labels * np.log(scipy.special.softmax(logits, axis=1))).sum(1)


def numpy_kl(s, t):
    return TEMPERATURE**2 * scipy.stats.entropy(
        scipy.special.softmax(t / TEMPERATURE, 1), scipy.special.softmax(s / TEMPERATURE, 1), axis=1
    )


def numpy_activation_boundary(s, t):
    total = np.zeros(len(s))
    for index in np.ndindex(*s.shape):
        if t[index] <= 0 and s[index] > -MARGIN:
            total[index[0]] += (s[index] + MARGIN) ** 2
        if t[index] > 0 and s[index] <= MARGIN:
            total[index[0]] += (s[index] - MARGIN) ** 2
    return total


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(scale=2, size=shape)


LOGITS = (normal(0, 6, 10), normal(1, 6, 10))
HIDDEN = (normal(2, 6, 4, 3, 5), normal(3, 6, 4, 3, 5))
CASES = {
    "cross_entropy": (losses.cross_entropy, numpy_cross_entropy, (LOGITS[0], np.array([0, 9, 3, 3, 1, 7]))),
    "soft_cross_entropy": (losses.cross_entropy, numpy_soft_cross_entropy, (LOGITS[0], scipy.special.softmax(LOGITS[1], 1))),
    "kl_divergence": (partial(losses.kl_divergence, temperature=TEMPERATURE), numpy_kl, LOGITS),
    "logit_mse": (losses.logit_mse, lambda s, t: ((s - t) ** 2).mean(1), LOGITS),
    "logit_distance": (losses.logit_distance, lambda s, t: np.linalg.norm(s - t, axis=1), LOGITS),
    "hint": (losses.hint, lambda s, t: 0.5 * ((s - t) ** 2).reshape(len(s), -1).mean(1), HIDDEN),
    "activation_boundary": (partial(losses.activation_boundary, margin=MARGIN), numpy_activation_boundary, HIDDEN),
}
ONE_CASE_EACH = pytest.mark.parametrize(("loss", "reference", "arguments"), CASES.values(), ids=CASES)
TEACHER_LOSSES = [name for name in CASES if "cross_entropy" not in name]


def cast(arguments, dtype):
    return [jnp.asarray(a, dtype) if np.issubdtype(a.dtype, np.floating) else jnp.asarray(a) for a in arguments]


def test_kl_divergence_check_value():
    values = losses.kl_divergence(jnp.array([[1.0, 2, 3], [0, -1, 2]]), jnp.array([[3.0, 2, 1], [1, 0, 2]]), 4.0)
    np.testing.assert_allclose(values.mean(), 0.721353, atol=1e-6)


def test_activation_boundary_check_value():
    values = losses.activation_boundary(jnp.array([[-2, -0.5, 0.5, 2]]), jnp.array([[-1.0, 1, -3, 0]]), 1.0)
    np.testing.assert_allclose(values, [13.5], rtol=1e-6)


@ONE_CASE_EACH
def test_equals_numpy_in_float64_and_float32(loss, reference, arguments, x64):
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 2e-5)):
        values = jax.jit(loss)(*cast(arguments, dtype))
        assert values.dtype == dtype
        np.testing.assert_allclose(values, reference(*arguments), rtol=tolerance)


@ONE_CASE_EACH
def test_same_under_jit_and_vmap(loss, reference, arguments):
    arguments = cast(arguments, jnp.float32)
    values = loss(*arguments)
    np.testing.assert_allclose(jax.jit(loss)(*arguments), values, rtol=1e-5)
    pairs = [a.reshape(2, 3, *a.shape[1:]) for a in arguments]
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(*pairs).reshape(-1), values, rtol=1e-5)


@ONE_CASE_EACH
def test_bfloat16_inputs_are_reduced_in_float32(loss, reference, arguments):
    low = cast(arguments, jnp.bfloat16)
    values = jax.jit(loss)(*low)
    assert values.dtype == jnp.float32
    rounded = [np.asarray(a).astype(np.float64) if a.dtype == jnp.bfloat16 else np.asarray(a) for a in low]
    np.testing.assert_allclose(values, reference(*rounded), rtol=2e-5)
    np.testing.assert_allclose(values, reference(*arguments), rtol=0.03)


@ONE_CASE_EACH
def test_derivatives_of_both_arguments_to_second_order(loss, reference, arguments, x64):
    arguments = cast(arguments, jnp.float64)
    differentiable = arguments if arguments[1].dtype == jnp.float64 else arguments[:1]
    compiled = jax.jit(lambda *a: loss(*a, *arguments[len(a) :]))
    check_grads(compiled, differentiable, order=2, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["kl_divergence", "logit_mse", "logit_distance", "hint"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_are_exactly_zero_where_both_agree(name, dtype):
    loss = CASES[name][0]
    value_and_gradients = jax.jit(jax.value_and_grad(lambda a, b: loss(a, b).sum(), (0, 1)))
    for seed in range(20):
        s = jnp.asarray(normal(seed, 6, 10), dtype)
        value, gradients = value_and_gradients(s, s)
        assert value == 0
        np.testing.assert_array_equal(gradients, jnp.zeros((2, 6, 10)))


@pytest.mark.parametrize("size", [0, 1e-39, 1e-30, 1e-20, 1e-6, 1e20, 1e30])
def test_logit_distance_second_derivative_is_finite_at_every_scale(size):
    r = size * jnp.array([[1.0, 2, -3]])
    hessian = jax.jit(jax.hessian(lambda s: losses.logit_distance(s, jnp.zeros_like(s))[0]))(r)[0, :, 0]
    assert np.all(np.isfinite(hessian))
    if size >= 1e-30:
        unit = np.array([1, 2, -3]) / np.sqrt(14)
        np.testing.assert_allclose(hessian * np.linalg.norm(np.asarray(r, np.float64)), np.eye(3) - np.outer(unit, unit), atol=1e-5)
    else:
        np.testing.assert_array_equal(hessian, np.zeros((3, 3)))


def test_kl_divergence_is_of_the_teacher_from_the_student():
    sure, unsure = jnp.array([[20.0, 0, 0]]), jnp.zeros((1, 3))
    np.testing.assert_allclose(losses.kl_divergence(unsure, sure, 1.0), np.log(3), rtol=1e-5)
    np.testing.assert_allclose(losses.kl_divergence(sure, unsure, 1.0), -np.log(3) + 2 / 3 * 20, rtol=1e-5)


def test_kl_divergence_gradient_is_that_of_soft_cross_entropy(x64):
    s, t = cast(LOGITS, jnp.float64)
    softened = jax.nn.softmax(t / TEMPERATURE)
    gradient = jax.jit(jax.grad(lambda s: losses.kl_divergence(s, t, TEMPERATURE).sum()))(s)
    other = jax.jit(jax.grad(lambda s: TEMPERATURE**2 * losses.cross_entropy(s / TEMPERATURE, softened).sum()))(s)
    np.testing.assert_allclose(gradient, other, atol=1e-12)


def test_kl_divergence_of_extreme_logits_is_finite():
    s, t = jnp.array([[1e4, 0, -1e4]]), jnp.array([[-1e4, 0, 1e4]])
    values, gradient = jax.value_and_grad(lambda s: losses.kl_divergence(s, t, 1.0).sum())(s)
    np.testing.assert_allclose(values, 2e4)
    np.testing.assert_allclose(gradient, [[1, 0, -1]])


def test_integer_labels_are_one_hot_probabilities_and_others_are_not_a_number():
    logits = jnp.asarray(LOGITS[0], jnp.float32)
    labels = np.array([0, 9, 3, 3, 1, 7])
    one_hot = losses.cross_entropy(logits, jax.nn.one_hot(labels, 10))
    for dtype in (np.uint8, np.int64):
        np.testing.assert_allclose(losses.cross_entropy(logits, labels.astype(dtype)), one_hot, rtol=1e-6)
    assert np.isnan(losses.cross_entropy(logits, jnp.array([-1, 10, 300, -300, 0, 9]))).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("name", TEACHER_LOSSES)
def test_unequal_shapes_are_refused(name):
    loss, _, (s, t) = CASES[name]
    with pytest.raises(AssertionError, match="shape"):
        loss(jnp.asarray(s), jnp.asarray(t[:, :1]))


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.zeros(6), np.zeros((6, 9))], ids=["too few", "not integer", "too few classes"])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(AssertionError, match="shape"):
        losses.cross_entropy(jnp.asarray(LOGITS[0]), jnp.asarray(labels))
