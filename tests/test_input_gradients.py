"""The worst-case objective against finite differences, brute force and itself on several devices."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from wdkd import losses
from wdkd.errors import UsageError
from wdkd.input_gradients import dual_norm, toward_boundary, value_and_input_gradient, worst_case

GROUND_NORMS = (1, 2, math.inf)
AGGREGATES = ("mean", "rms", "max")
NORM_AND_AGGREGATE = pytest.mark.parametrize(("ground_norm", "aggregate"), list(itertools.product(GROUND_NORMS, AGGREGATES)))
BATCH, PIXELS, HIDDEN, CLASSES = 5, (2, 3, 1), 4, 3
EPSILON = 0.7

LOSSES = {
    "kl": lambda s, t: losses.kl_divergence(s, t, 2.0),
    "mse": losses.logit_mse,
    "distance": losses.logit_distance,
}
NUMPY_AGGREGATES = {"mean": np.mean, "rms": lambda n: np.sqrt(np.mean(np.square(n))), "max": np.max}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def network(seed):
    size = math.prod(PIXELS)
    return {
        "w": normal(seed, size, HIDDEN),
        "b": normal(seed + 1, HIDDEN),
        "v": normal(seed + 2, HIDDEN, CLASSES),
        "c": normal(seed + 3, CLASSES),
    }


def apply(params, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["w"] + params["b"]) @ params["v"] + params["c"]


def images(batch=BATCH, seed=100):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(batch, *PIXELS)))


def distillation(student, teacher, name, through_teacher=True):
    def per_example_loss(x):
        t = apply(teacher, x)
        return LOSSES[name](apply(student, x), t if through_teacher else jax.lax.stop_gradient(t))

    return per_example_loss


@NORM_AND_AGGREGATE
def test_parameter_gradient_equals_finite_differences(ground_norm, aggregate, x64):
    teacher, x = network(0), images()
    flat, unflatten = ravel_pytree(network(10))

    def objectives(flat):
        student = unflatten(flat)
        return jnp.stack([worst_case(distillation(student, teacher, n), x, EPSILON, ground_norm, aggregate)[0] for n in LOSSES])

    step = 1e-5
    moves = step * jnp.eye(len(flat))
    up, down = jnp.split(jax.vmap(objectives, out_axes=-1)(flat + jnp.concatenate([moves, -moves])), 2, axis=-1)
    central = (up - down) / (2 * step)
    gradients = jax.jacrev(objectives)(flat)
    error = np.linalg.norm(gradients - central, axis=1) / np.linalg.norm(central, axis=1)
    assert np.all(error < 1e-5), dict(zip(LOSSES, error, strict=True))


@NORM_AND_AGGREGATE
def test_value_is_mean_loss_plus_epsilon_times_the_aggregate(ground_norm, aggregate):
    x = images()
    per_example_loss = distillation(network(10), network(0), "kl")
    value, aux = jax.jit(lambda x, epsilon: worst_case(per_example_loss, x, epsilon, ground_norm, aggregate))(x, EPSILON)
    values, gradients = value_and_input_gradient(per_example_loss, x)
    order = {1: np.inf, 2: 2, math.inf: 1}[ground_norm]
    norm = NUMPY_AGGREGATES[aggregate]([np.linalg.norm(np.ravel(g), order) for g in gradients])
    np.testing.assert_allclose(aux.gradient_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(aux.loss, values.mean(), rtol=1e-5)
    np.testing.assert_allclose(value, values.mean() + EPSILON * norm, rtol=1e-5)


@NORM_AND_AGGREGATE
@pytest.mark.parametrize("through_teacher", [True, False], ids=["through teacher", "teacher constant"])
def test_where_student_and_teacher_agree_the_term_vanishes_with_its_gradient(ground_norm, aggregate, through_teacher):
    # Not compiled as a whole: XLA may round two equal networks differently, and then they do not agree.
    teacher, x = network(0), images()
    for name in LOSSES:

        def objective(student, name=name):
            decay = sum(jnp.sum(jnp.square(leaf)) for leaf in student.values())  # so that the mean loss has a gradient to keep
            term = distillation(student, teacher, name, through_teacher)
            return worst_case(lambda x: term(x) + decay, x, EPSILON, ground_norm, aggregate)

        (value, aux), gradient = jax.value_and_grad(objective, has_aux=True)(teacher)
        assert aux.gradient_norm == 0, name
        assert value == aux.loss
        for key, leaf in gradient.items():
            np.testing.assert_allclose(leaf, 2 * teacher[key], rtol=1e-5, err_msg=f"{name} {key}")


@NORM_AND_AGGREGATE
def test_two_equal_networks_compiled_leave_rounding_and_nothing_else(ground_norm, aggregate):
    def objective(student, teacher):
        return worst_case(distillation(student, teacher, "kl"), images(), EPSILON, ground_norm, aggregate)

    (value, _), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(network(0), network(0))
    np.testing.assert_allclose(value, 0, atol=1e-5)
    for leaf in gradient.values():
        np.testing.assert_allclose(leaf, 0, atol=1e-5)


def test_another_examples_pixels_do_not_move_an_examples_gradient():
    x, other = images(), images(seed=101)
    changed = x.at[2].set(other[2])
    rest = np.arange(BATCH) != 2
    per_example_loss = distillation(network(10), network(0), "kl")
    _, before = value_and_input_gradient(per_example_loss, x)
    _, after = value_and_input_gradient(per_example_loss, changed)
    np.testing.assert_array_equal(before[rest], after[rest])
    assert np.abs(before[2] - after[2]).max() > 1e-3


def test_batch_statistics_do_move_it():
    x, other = images(), images(seed=101)

    def mixed(x):
        return distillation(network(10), network(0), "kl")(x - x.mean(0))

    _, before = value_and_input_gradient(mixed, x)
    _, after = value_and_input_gradient(mixed, x.at[2].set(other[2]))
    assert np.abs(before[0] - after[0]).max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_equals_vmap_of_grad(name):
    x = images()
    per_example_loss = distillation(network(10), network(0), name)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(lambda image: per_example_loss(image[None])[0])))(x)
    ours, our_gradients = value_and_input_gradient(per_example_loss, x)
    assert our_gradients.shape == x.shape
    np.testing.assert_allclose(ours, values, rtol=1e-5)
    np.testing.assert_allclose(our_gradients, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_teachers_share_is_its_jacobian_times_the_loss_gradient(name, x64):
    student, teacher, x = network(10), network(0), images()
    _, through = value_and_input_gradient(distillation(student, teacher, name), x)
    _, constant = value_and_input_gradient(distillation(student, teacher, name, through_teacher=False), x)
    jacobian = jax.vmap(jax.jacfwd(lambda image: apply(teacher, image[None])[0]))(x)
    cotangent = jax.grad(lambda t: LOSSES[name](apply(student, x), t).sum())(apply(teacher, x))
    share = np.einsum("bchwk,bc->bhwk", jacobian, cotangent)
    assert np.abs(share).max() > 1e-2
    np.testing.assert_allclose(through - constant, share, atol=1e-12)


@pytest.mark.parametrize("ground_norm", GROUND_NORMS)
def test_dual_norm_equals_numpy_and_is_the_support_function_of_the_ball(ground_norm, x64):
    g = normal(7, BATCH, *PIXELS)
    norms = dual_norm(g, ground_norm)
    assert norms.dtype == jnp.float64
    order = {1: np.inf, 2: 2, math.inf: 1}[ground_norm]
    np.testing.assert_allclose(norms, [np.linalg.norm(np.ravel(one), order) for one in g], rtol=1e-12)
    moves = np.random.default_rng(8).normal(size=(1000, math.prod(PIXELS)))
    moves /= np.linalg.norm(moves, ground_norm, axis=1, keepdims=True)
    reached = moves @ np.asarray(g).reshape(BATCH, -1).T
    assert np.all(reached.max(0) <= norms)
    assert np.all(reached.max(0) >= 0.5 * norms)


@pytest.mark.parametrize("ground_norm", GROUND_NORMS)
def test_dual_norm_at_zero_and_at_extreme_scales(ground_norm):
    g = jnp.asarray(normal(7, 3, 4), jnp.float32)
    norms, slopes = dual_norm(g, ground_norm), jax.grad(lambda g: dual_norm(g, ground_norm).sum())(g)
    for scale in (1e-30, 1e-22, 1e22):
        np.testing.assert_allclose(dual_norm(scale * g, ground_norm), scale * norms, rtol=1e-5)
        np.testing.assert_allclose(jax.grad(lambda g: dual_norm(g, ground_norm).sum())(scale * g), slopes, rtol=1e-5)
    zero = g.at[1].set(0)
    assert dual_norm(zero, ground_norm)[1] == 0
    np.testing.assert_array_equal(jax.grad(lambda g: dual_norm(g, ground_norm).sum())(zero), slopes.at[1].set(0))
    assert np.isnan(dual_norm(g.at[1, 2].set(jnp.nan), ground_norm)).tolist() == [False, True, False]


def corners(ground_norm, radius):
    """Points whose hull is the ball: all vertices for L1 and L-infinity, a fine circle for L2. (K, 2)."""
    if ground_norm == 1:
        return radius * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    if ground_norm == math.inf:
        return radius * np.array(list(itertools.product((-1, 1), repeat=2)))
    angle = np.linspace(0, 2 * np.pi, 20001)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


@pytest.mark.parametrize("ground_norm", GROUND_NORMS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_for_linear_losses_it_is_the_worst_case_over_the_ball_by_brute_force(ground_norm, aggregate, x64):
    x, slope = normal(20, 2, 2), normal(21, 2, 2)
    value, _ = worst_case(lambda x: jnp.sum(slope * x, axis=1), x, EPSILON, ground_norm, aggregate)
    share = np.linspace(0, 1, 20001)
    radii = {  # how far each of the two examples may move: W_infinity, W_2 and W_1 balls of radius epsilon
        "mean": np.array([[EPSILON, EPSILON]]),
        "rms": EPSILON * np.sqrt(2) * np.sqrt(np.stack([share, 1 - share], 1)),
        "max": EPSILON * 2 * np.stack([share, 1 - share], 1),
    }[aggregate]
    farthest = np.array([np.max(corners(ground_norm, 1.0) @ s) for s in np.asarray(slope)])
    brute = np.mean(np.sum(slope * x, axis=1)) + np.max(np.mean(radii * farthest, axis=1))
    np.testing.assert_allclose(value, brute, rtol=1e-7)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_rest_of_the_batch_enters_through_all_examples(aggregate):
    per_example_loss = distillation(network(10), network(0), "mse")
    x = images(8)
    _, aux = worst_case(per_example_loss, x, EPSILON, 2, aggregate)
    elsewhere = dual_norm(value_and_input_gradient(per_example_loss, x[4:])[1], 2)
    _, part = worst_case(per_example_loss, x[:4], EPSILON, 2, aggregate, all_examples=lambda norms: jnp.concatenate([norms, elsewhere]))
    np.testing.assert_allclose(part.gradient_norm, aux.gradient_norm, rtol=1e-5)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_mean_over_devices_is_the_global_value_and_gradient(aggregate, x64):
    teacher, student, x = network(0), network(10), images(8)

    def on_device(shard):
        def objective(student):
            def all_gather(norms):
                return jax.lax.all_gather(norms, "devices", tiled=True)

            return worst_case(distillation(student, teacher, "kl"), shard, EPSILON, 2, aggregate, all_examples=all_gather)[0]

        return jax.lax.pmean(jax.value_and_grad(objective)(student), "devices")

    value, gradient = jax.jit(jax.vmap(on_device, axis_name="devices"))(x.reshape(4, 2, *PIXELS))
    whole = jax.value_and_grad(lambda student: worst_case(distillation(student, teacher, "kl"), x, EPSILON, 2, aggregate)[0])
    expected, expected_gradient = jax.jit(whole)(student)
    np.testing.assert_allclose(value, np.full(4, expected), rtol=1e-12)
    for name, leaf in expected_gradient.items():
        np.testing.assert_allclose(gradient[name], np.broadcast_to(leaf, (4, *leaf.shape)), rtol=1e-9, atol=1e-12, err_msg=name)


def test_bfloat16_images_give_a_float32_objective():
    low = images().astype(jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (network(10), network(0)))
    value, aux = jax.jit(lambda x: worst_case(distillation(*params, "mse"), x, EPSILON, 2, "rms"))(low)
    assert value.dtype == aux.loss.dtype == aux.gradient_norm.dtype == jnp.float32
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    expected, _ = worst_case(distillation(*same, "mse"), low.astype(jnp.float32), EPSILON, 2, "rms")
    np.testing.assert_allclose(value, expected, rtol=0.03)


def test_what_the_loss_returns_beside_its_values_comes_out():
    x, student = images(), network(10)

    def per_example_loss(x):
        logits = apply(student, x)
        return jnp.square(logits).sum(1), {"logits": logits}

    (values, beside), _ = value_and_input_gradient(per_example_loss, x, has_aux=True)
    np.testing.assert_array_equal(beside["logits"], apply(student, x))
    value, aux = worst_case(per_example_loss, x, EPSILON, has_aux=True)
    np.testing.assert_array_equal(aux.aux["logits"], apply(student, x))
    plain, plain_aux = worst_case(lambda x: per_example_loss(x)[0], x, EPSILON)
    assert plain_aux.aux is None
    assert value == plain
    np.testing.assert_allclose(aux.loss, values.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, "mean"), "ground_norm 3 .* 1, 2 and inf"),
        (("2", "mean"), "ground_norm '2' .* numbers"),
        ((2, "maen"), "'maen'.*'mean'.*max, mean, rms"),
    ],
)
def test_unknown_choices_are_refused_by_name(arguments, message):
    with pytest.raises(UsageError, match=message):
        worst_case(lambda x: x.sum(1), jnp.ones((2, 3)), 0.1, *arguments)


def test_a_loss_that_is_not_one_value_per_example_is_refused():
    with pytest.raises(AssertionError, match="shape"):
        value_and_input_gradient(lambda x: x.mean(), jnp.ones((2, 3)))


# --- images moved to a boundary -----------------------------------------------------------------------------------------


def keys(batch=BATCH, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def undecided(logits, x, key, radius, steps):
    """One image x (pixels,) moved as documented, in NumPy, its gradients by finite differences."""
    said = logits(x)
    a = said.argmax()
    b = int(jax.random.categorical(key, jnp.where(jnp.arange(CLASSES) == a, -jnp.inf, said)))

    def margin(x):
        return logits(x)[a] - logits(x)[b]

    moved = x
    for _ in range(steps):
        g = np.array([(margin(moved + e) - margin(moved - e)) / 2e-6 for e in 1e-6 * np.eye(x.size)])
        away = moved - np.clip(margin(moved) / np.linalg.norm(g), -2 * radius, 2 * radius) * g / np.linalg.norm(g) - x
        moved = np.clip(x + away * min(1, radius / np.linalg.norm(away)), 0, 1)
    return moved, margin


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("radius", [0.05, 10.0])
def test_images_move_to_the_boundary_as_far_as_they_may(x64, radius, steps):
    params, x = network(0), images()
    found = jax.jit(lambda x: toward_boundary(lambda x: apply(params, x), x, keys(), radius, steps))(x)
    for image, moved, key in zip(np.asarray(x), np.asarray(found), keys(), strict=True):
        expected, margin = undecided(lambda x: np.asarray(apply(params, x[None]))[0], image.reshape(-1), key, radius, steps)
        np.testing.assert_allclose(moved.reshape(-1), expected, atol=1e-7)
        assert np.linalg.norm(moved - image) <= radius * (1 + 1e-9)
        if steps == 3:
            assert abs(margin(moved.reshape(-1))) < abs(margin(image.reshape(-1)))


def test_a_linear_classifier_is_undecided_after_one_step(x64):
    """At the foot of the perpendicular, which is what the distance to its boundary means."""
    weights, x = normal(1, math.prod(PIXELS), CLASSES), 0.5 + 0.01 * normal(2, BATCH, *PIXELS)

    def logits(x):
        return (x.reshape(len(x), -1) - 0.5) @ weights

    moved = toward_boundary(logits, x, keys(), 1.0, 1)
    said, now, (a, *others) = logits(x), logits(moved), np.argsort(-logits(x), axis=1).T
    rows, away = np.arange(BATCH), np.asarray(moved - x).reshape(BATCH, -1)
    reached = np.array([np.abs(now[rows, a] - now[rows, b]) < 1e-12 for b in others])
    np.testing.assert_array_equal(reached.sum(0), 1)
    b = np.array(others)[reached.argmax(0), rows]
    normals = np.asarray(weights)[:, a] - np.asarray(weights)[:, b]
    distances = np.asarray(said[rows, a] - said[rows, b]) / np.linalg.norm(normals, axis=0)
    np.testing.assert_allclose(away, -(distances / np.linalg.norm(normals, axis=0) * normals).T, atol=1e-12)


def test_the_other_class_is_drawn_by_its_probability():
    draws, logits = 3000, jnp.array([4.0, 1.0, 0.0])
    x = jnp.full((draws, 3), 0.5)
    moved = jax.jit(lambda x: toward_boundary(lambda x: logits + x, x, keys(draws), 1e-3, 1))(x)
    # It is the other class whose pixel gains.
    share = (np.asarray(moved)[:, 1] > 0.5).mean()
    assert ((np.asarray(moved) > 0.5).sum(1) == 1).all()
    expected = np.e / (np.e + 1)
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / draws)


def test_moved_images_stay_images_and_a_constant_classifier_moves_none():
    x = images().astype(jnp.float32)
    steep = toward_boundary(lambda x: 1e-3 * apply(network(0), x) + jnp.arange(3.0), x, keys(), 100.0)
    assert steep.min() >= 0 and steep.max() <= 1 and np.abs(steep - x).max() > 0.1
    still = toward_boundary(lambda x: jnp.tile(jnp.arange(3.0), (len(x), 1)), x, keys(), 0.1)
    np.testing.assert_array_equal(still, x)


def test_no_derivative_goes_through_where_images_move_to():
    def moved(params):
        return toward_boundary(lambda x: apply(params, x), images(), keys(), 0.1).sum()

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.grad(moved)(network(0))))
