"""Folded batch norm: the same outputs and input gradients, from fewer parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wdkd.config import ModelConfig
from wdkd.folding import fold
from wdkd.models import apply_network, create_model

MODELS = ["cnn", "whitened_cnn", "resnet20", "wrn_16_2"]


def drawn(name, norm="batch", shape=(16, 16, 3), dtype=np.float32):
    """A network with random parameters and statistics; some scales are negative, where a maximum does not commute with them."""
    model = create_model(ModelConfig(name, 4, norm), classes=5, mean=(0.4,) * shape[2], std=(0.3,) * shape[2])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    random = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(dtype) * (0.4 if leaf.ndim > 1 else 1), shapes)
    variables["batch_stats"] = jax.tree.map(lambda leaf: np.abs(leaf) + dtype(0.3), variables.get("batch_stats", {}))
    given = {"mean": random.uniform(0.2, 0.6, shape[2]).astype(dtype), "std": random.uniform(0.2, 0.4, shape[2]).astype(dtype)}
    return model, {**variables, "input": given}, random.uniform(size=(3, *shape)).astype(dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(16, 16, 3), (11, 9, 1)])
def test_outputs_and_input_gradients_are_those_of_the_network(name, shape):
    model, variables, x = drawn(name, shape=shape)
    folded, fewer = fold(model, variables, shape)
    direction = np.random.default_rng(2).normal(size=5)

    def look(network, tree):
        outputs, pull = jax.vjp(lambda x: apply_network(network, tree, x, train=False), x)
        (gradient,) = pull(jax.tree.map(jnp.zeros_like, outputs).replace(logits=jnp.broadcast_to(direction, (3, 5)).astype(x.dtype)))
        return outputs, gradient

    before, after = (jax.jit(look, static_argnums=0)(network, tree) for network, tree in ((model, variables), (folded, fewer)))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


@pytest.mark.parametrize("name", MODELS)
def test_no_norm_is_left_that_follows_a_convolution(name):
    model, variables, _ = drawn(name)
    folded, fewer = fold(model, variables, (16, 16, 3))
    left = [path for path in fewer["params"] if path.startswith("Norm")]
    # A wide network normalises the sum that both branches of a block take: once a block, and once at the end.
    assert len(left) == {"cnn": 0, "whitened_cnn": 0, "resnet20": 0, "wrn_16_2": 7}[name]
    assert sorted(fewer["batch_stats"]) == sorted(left)
    assert fewer["input"] is variables["input"]


def test_a_channel_whose_scale_is_zero_is_its_bias():
    model, variables, x = drawn("cnn")
    variables["params"]["Norm_0"]["BatchNorm_0"]["scale"][:2] = 0
    folded, fewer = fold(model, variables, (16, 16, 3))
    a, b = (np.asarray(apply_network(m, v, x, train=False).logits) for m, v in ((model, variables), (folded, fewer)))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_group_norm_is_left_as_it_is():
    model, variables, _ = drawn("cnn", "group")
    assert fold(model, variables, (16, 16, 3)) == (model, variables)
