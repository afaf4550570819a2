"""A recorded graph computes what its network computes, and its FLOPs are those that the compiler counts."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_folding import drawn

from wdkd import numpy_network, parallel
from wdkd.errors import UsageError
from wdkd.folding import fold
from wdkd.graph import flops, named, record
from wdkd.models import apply_network
from wdkd.teacher import inference

NETWORKS = ["cnn", "whitened_cnn", "resnet8", "wrn_10_1"]
ODD = (9, 11, 3)
"""Sides that are odd at first, or after one halving."""


def computed(model, variables, x):
    """Logits by the recorded graph, with NumPy in float64."""
    graph = record(model, variables, x.shape[1:])
    values = {name: np.asarray(leaf, np.float64) for name, leaf in named(variables).items()}
    assert {name: value.shape for name, value in values.items()} == graph.parameters
    return numpy_network.run([dataclasses.asdict(node) for node in graph.nodes], values, x.astype(np.float64))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_computes_what_the_network_does(name, norm):
    model, variables, x = drawn(name, norm, ODD)
    logits = np.asarray(jax.jit(lambda tree, x: apply_network(model, tree, x, train=False).logits)(variables, x))
    for network, tree in ((model, variables), fold(model, variables, ODD)):
        assert np.abs(computed(network, tree, x) - logits).max() <= 2e-6 * np.abs(logits).max()


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("shape", [ODD, (32, 32, 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_those_that_the_compiler_counts(name, shape, norm):
    model, variables, _ = drawn(name, norm, shape)
    assert flops(record(model, variables, shape)) == parallel.forward_flops(inference(model), variables, shape)


def test_every_node_knows_the_shape_of_its_output():
    model, variables, x = drawn("wrn_10_1", "group", ODD)
    graph = record(model, variables, ODD)
    known = {}
    for end in range(1, len(graph.nodes) + 1):
        nodes = [dataclasses.asdict(node) for node in graph.nodes[:end]]
        if end % 8 == 0 or end == len(graph.nodes):
            known[end] = numpy_network.run(nodes, named(variables), x).shape
            assert known[end] == (len(x), *graph.nodes[end - 1].shape)
    assert known[len(graph.nodes)] == (len(x), 5)


class Other(nn.Module):
    """A network with an operation that graphs do not have."""

    @nn.compact
    def __call__(self, x, train=False):
        return Logits(nn.Dense(3)(jnp.tanh(x).mean((1, 2))))


@dataclasses.dataclass
class Logits:
    """All that is recorded of a network."""

    logits: jax.Array


def test_an_operation_that_no_graph_has_is_refused_by_name():
    model = Other()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(UsageError, match="'tanh' in a way that no graph has"):
        record(model, variables, (8, 8, 1))
