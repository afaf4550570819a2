"""The optimiser against NumPy: schedule, AdamW, Muon, Nesterov, clipping, which leaves decay; and the moving average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wdkd.config import OptimizerConfig
from wdkd.methods import Connectors
from wdkd.state import (
    create_optimizer,
    create_schedule,
    create_state,
    initialize_connectors,
    join_params,
    moving_average,
    split_params,
)

STEPS = 10
PLAIN = {"warmup_fraction": 0.0, "clip_norm": None, "weight_decay": 0.0}


def parameters(seed=0):
    random = np.random.default_rng(seed)
    leaf = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "student": {
            "Conv_0": {"kernel": leaf(3, 3, 1, 2)},
            "Norm_0": {"GroupNorm_0": {"scale": leaf(2), "bias": leaf(2)}},
            "head": {"kernel": leaf(2, 3), "bias": leaf(3)},
        },
        "connectors": {"stage1_conv": {"kernel": leaf(1, 1, 2, 2), "bias": leaf(2)}},
    }


def cosine(step, peak, warmup, steps):
    return peak * step / warmup if step < warmup else peak * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))) / 2


def leaves(tree):
    """{path: NumPy array in float64}."""
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def run(config, params, gradients, **options):
    """The parameters after each of the gradients."""
    optimizer = create_optimizer(config, steps=STEPS, **options)
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(leaves(params))
    return seen


def close(a, b):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=2e-5, atol=1e-6, err_msg=path)


# --- schedule -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "fraction", "warmup"), [(10, 0.0, 0), (10, 0.3, 3), (7, 0.05, 0), (60, 0.05, 3), (4, 0.99, 4), (1, 0.05, 0)]
)
def test_schedule_is_a_linear_warmup_and_a_cosine_to_zero(steps, fraction, warmup):
    schedule = create_schedule(OptimizerConfig(learning_rate=0.7, warmup_fraction=fraction), steps)
    expected = [cosine(step, 0.7, warmup, steps) for step in range(steps)]
    np.testing.assert_allclose([float(schedule(step)) for step in range(steps)], expected, atol=1e-6)
    if warmup < steps:
        assert float(schedule(steps)) == pytest.approx(0, abs=1e-6)
        assert float(schedule(warmup)) == pytest.approx(0.7)


# --- rules --------------------------------------------------------------------------------------------------------------


def test_adamw_against_numpy():
    """Loshchilov & Hutter 2019: the decay is scaled by the schedule alone, and reaches kernels alone."""
    config = OptimizerConfig("adamw", learning_rate=0.03, warmup_fraction=0.2, weight_decay=0.1, clip_norm=None)
    params, gradients = parameters(), [parameters(seed) for seed in (1, 2, 3)]
    found = run(config, params, gradients)
    p = leaves(params)
    m, v = ({path: np.zeros_like(leaf) for path, leaf in p.items()} for _ in range(2))
    for step, gradient in enumerate(map(leaves, gradients)):
        rate = cosine(step, 0.03, 2, STEPS)
        for path, g in gradient.items():
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            direction = (m[path] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[path] / (1 - 0.999 ** (step + 1))) + 1e-8)
            decay = 0.1 * p[path] if "kernel" in path else 0
            p[path] = p[path] - rate * (direction + decay)
        close(found[step], p)


def test_sgd_with_nesterov_momentum_against_numpy():
    """Sutskever et al. 2013 as deep learning libraries have it: decay is part of the gradient that the momentum sums."""
    config = OptimizerConfig("sgd", learning_rate=0.3, warmup_fraction=0.0, weight_decay=0.1, momentum=0.8, clip_norm=None)
    params, gradients = parameters(), [parameters(seed) for seed in (1, 2, 3)]
    found = run(config, params, gradients)
    p = leaves(params)
    velocity = {path: np.zeros_like(leaf) for path, leaf in p.items()}
    for step, gradient in enumerate(map(leaves, gradients)):
        rate = cosine(step, 0.3, 0, STEPS)
        for path, g in gradient.items():
            g = g + (0.1 * p[path] if "kernel" in path else 0)
            velocity[path] = 0.8 * velocity[path] + g
            p[path] = p[path] - rate * (g + 0.8 * velocity[path])
        close(found[step], p)


def test_muon_against_singular_values_in_numpy():
    """Newton and Schulz's iteration changes singular values alone, each by its polynomial, which is near 1 in the end."""
    config = OptimizerConfig("muon", learning_rate=0.03, warmup_fraction=0.2, weight_decay=0.1, clip_norm=None)
    params, gradients = parameters(), [parameters(seed) for seed in (1, 2, 3)]
    found, adam = run(config, params, gradients), run(dataclasses.replace(config, name="adamw"), params, gradients)
    p = leaves(params)
    convolutions = [path for path, leaf in p.items() if "kernel" in path and leaf.ndim == 4]
    momentum = {path: np.zeros_like(p[path]) for path in convolutions}
    for step, gradient in enumerate(map(leaves, gradients)):
        expected = dict(adam[step])
        for path in convolutions:
            g = gradient[path]
            momentum[path] = 0.95 * momentum[path] + 0.05 * g
            ahead = 0.95 * momentum[path] / (1 - 0.95 ** (step + 2)) + 0.05 * g / (1 - 0.95 ** (step + 1))
            u, s, v = np.linalg.svd(ahead.reshape(-1, g.shape[-1]), full_matrices=False)
            s = s / np.linalg.norm(s)
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            assert (s > 0.6).all() and (s < 1.3).all()
            direction = 0.2 * np.sqrt(max(len(u), len(v))) * (u * s) @ v
            p[path] = expected[path] = p[path] - cosine(step, 0.03, 2, STEPS) * (direction.reshape(g.shape) + 0.1 * p[path])
        close(found[step], expected)
    assert len(convolutions) == 2


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_decay_shrinks_kernels_alone_and_nothing_where_it_is_off(name):
    """With zero gradients decay is all that moves anything; without it a layer that a stage does not reach stays, bit for bit."""
    config = OptimizerConfig(name, learning_rate=0.1, warmup_fraction=0.0, weight_decay=0.5, momentum=0.0, clip_norm=1.0)
    params = parameters()
    nothing = jax.tree.map(np.zeros_like, params)
    (decayed,) = run(config, params, [nothing])
    close(decayed, {path: leaf * (1 - 0.1 * 0.5) if "kernel" in path else leaf for path, leaf in leaves(params).items()})
    assert sum("kernel" in path for path in decayed) == 3
    for after in run(config, params, [nothing] * 3, decay=False):
        assert all(np.array_equal(after[path], leaf) for path, leaf in leaves(params).items())


@pytest.mark.parametrize("limit", [0.5, 1e6, None])
def test_clipping_is_by_the_global_norm(limit):
    config = OptimizerConfig("sgd", learning_rate=1.0, momentum=0.0, **PLAIN | {"clip_norm": limit})
    params, gradient = parameters(), parameters(1)
    (after,) = run(config, params, [gradient])
    g = leaves(gradient)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in g.values()))
    assert norm > 1
    factor = min(1, (limit or np.inf) / norm)
    close(after, {path: leaf - factor * g[path] for path, leaf in leaves(params).items()})


def test_clipping_comes_before_decay():
    """Decay is not part of what is clipped, so a strong one does not weaken the gradient."""
    config = OptimizerConfig("sgd", learning_rate=1.0, momentum=0.0, **PLAIN | {"clip_norm": 0.1, "weight_decay": 0.5})
    params, gradient = parameters(), parameters(1)
    (after,) = run(config, params, [gradient])
    g = leaves(gradient)
    factor = 0.1 / np.sqrt(sum(np.square(leaf).sum() for leaf in g.values()))
    close(after, {p: leaf * (0.5 if "kernel" in p else 1) - factor * g[p] for p, leaf in leaves(params).items()})


# --- state --------------------------------------------------------------------------------------------------------------


def test_moving_average_is_the_sum_of_its_history():
    """After n steps: decay^n of the start, and (1 − decay) decay^(n − 1 − k) of the k-th."""
    history, decay = [parameters(seed) for seed in range(5)], 0.7
    average = history[0]
    for new in history[1:]:
        average = moving_average(average, new, decay)
    weights = [decay**4] + [(1 - decay) * decay ** (3 - k) for k in range(4)]
    assert sum(weights) == pytest.approx(1)
    each = [leaves(tree) for tree in history]
    close(leaves(average), {path: sum(w * tree[path] for w, tree in zip(weights, each, strict=True)) for path in each[0]})


def test_split_and_join_are_inverse():
    variables = {
        "student": {"params": {"a": 1, "b": {"c": 2}}, "batch_stats": {"mean": 3}},
        "connectors": {"params": {"d": 4}},
    }
    params, rest = split_params(variables)
    assert params == {"student": {"a": 1, "b": {"c": 2}}, "connectors": {"d": 4}}
    assert rest == {"student": {"batch_stats": {"mean": 3}}, "connectors": {}}
    assert join_params(params, rest) == variables
    assert split_params(join_params(params, rest)) == (params, rest)


def test_state_starts_fresh_and_evaluates_the_average_where_there_is_one():
    student = {"params": {"kernel": jnp.ones(3)}, "batch_stats": {"mean": jnp.zeros(2)}}
    optimizer = create_optimizer(OptimizerConfig(), steps=5)
    plain = create_state({"student": student}, optimizer, step=7, averaged=False)
    assert plain.step == 7 and plain.step.dtype == jnp.int32
    assert plain.average is None and plain.evaluated is student
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(plain.optimizer))
    averaged = create_state({"student": student}, optimizer, step=0, averaged=True)
    assert averaged.evaluated is averaged.average
    for a, b in zip(jax.tree.leaves(averaged.average), jax.tree.leaves(student), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()  # the state is donated, so each buffer may be there once


def test_connectors_that_have_nothing_to_learn_still_have_params():
    hidden = {"stage1": jax.ShapeDtypeStruct((1, 2, 2, 3), jnp.float32)}
    connectors = Connectors(("stage1",), norm="none", bias=False, identity=True)
    variables = initialize_connectors(connectors, jax.random.key(0), hidden, hidden)
    assert split_params(variables) == ({"connectors": {}}, {"connectors": {}})
    assert initialize_connectors(None, jax.random.key(0), hidden, hidden) == {}
