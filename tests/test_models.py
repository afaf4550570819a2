"""Networks against what they are said to be: hidden features are what the next activation sees, examples stay apart, sizes are known."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wdkd.config import ModelConfig
from wdkd.errors import UsageError
from wdkd.models import STAGES, Norm, _halve, _he_normal, check_image_shape, create_model, initialize, parameter_count

SHAPE = (8, 8, 1)
SIDES = {  # Heights and widths of the three stages, by hand.
    ("cnn", (8, 8, 1)): [(4, 4), (4, 4), (4, 4)],
    ("cnn", (28, 28, 1)): [(14, 14), (7, 7), (4, 4)],
    ("cnn", (9, 11, 3)): [(5, 6), (3, 3), (3, 3)],
    ("resnet", (8, 8, 1)): [(8, 8), (4, 4), (2, 2)],
    ("resnet", (28, 28, 1)): [(28, 28), (14, 14), (7, 7)],
    ("resnet", (9, 11, 3)): [(9, 11), (5, 6), (3, 3)],
}
NETWORKS = ["cnn", "whitened_cnn", "resnet8", "resnet20", "wrn_10_1", "wrn_16_2"]


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Compiling takes nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def network(name="cnn", norm="group", *, width=4, classes=3, channels=1, mean=0.4, std=0.3, axis_name=None):
    config = ModelConfig(name, width, norm)
    return create_model(config, classes=classes, mean=[mean] * channels, std=[std] * channels, axis_name=axis_name)


def shapes(model, shape, batch=2):
    """Shapes of (outputs, variables), without computing anything."""
    x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    return jax.eval_shape(functools.partial(model.init_with_output, train=True), jax.random.key(0), x)


def images(seed, batch=3, shape=SHAPE):
    return np.random.default_rng(seed).uniform(size=(batch, *shape)).astype(np.float32)


def random_variables(model, shape=SHAPE, seed=0):
    """Variables drawn with NumPy, which compiles nothing: no scale is 1 and no bias 0, and variances are positive."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim > 1:
            return (random.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes(model, shape)[1])


# --- shapes and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("norm", "shape"), [("group", (28, 28, 1)), ("batch", (8, 8, 1)), ("group", (9, 11, 3))])
def test_every_stage_has_its_shape(name, norm, shape):
    outputs, variables = shapes(network(name, norm, channels=shape[-1]), shape)
    sides = SIDES["cnn" if name.endswith("cnn") else "resnet", shape]
    width = 8 if name == "wrn_16_2" else 4
    assert outputs.logits.shape == (2, 3)
    assert {stage: h.shape for stage, h in outputs.hidden.items()} == {
        stage: (2, *side, width * factor) for stage, side, factor in zip(STAGES, sides, (1, 2, 4), strict=True)
    }
    assert {leaf.dtype for leaf in jax.tree.leaves((outputs, variables))} == {np.dtype("float32")}
    assert set(variables) == ({"params"} if norm == "group" else {"params", "batch_stats"})


def test_parameters_of_the_cnn():
    """Six 3×3 convolutions, a scale and a shift for each, and the head."""
    pairs = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    expected = sum(9 * i * o + 2 * o for i, o in pairs) + 64 * 10 + 10
    for norm in ("group", "batch"):
        _, variables = shapes(network("cnn", norm, width=16, classes=10, channels=3), (32, 32, 3))
        assert parameter_count(variables["params"]) == expected == 72_954


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", 272_474),  # He et al. 2016, table 6: 0.27M, with projections where the shape changes
        ("resnet56", 855_770),  # 0.85M
        ("wrn_16_2", 691_674),  # Zagoruyko & Komodakis 2016: 0.7M
        ("wrn_40_2", 2_243_546),  # 2.2M
    ],
)
def test_parameters_of_published_networks(name, expected):
    _, variables = shapes(network(name, "batch", width=16, classes=10, channels=3), (32, 32, 3))
    assert parameter_count(variables["params"]) == expected


@pytest.mark.parametrize(("name", "depth"), [("resnet8", 8), ("resnet20", 20), ("wrn_10_2", 10), ("wrn_16_2", 16)])
def test_depth_counts_the_layers_as_the_papers_do(name, depth):
    """ResNet: 3×3 convolutions and the head. Wide ResNet: all convolutions, the three projections among them."""
    _, variables = shapes(network(name), SHAPE)
    kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
    counted = [shape for shape in kernels if shape[0] == 3] + ["head"] if name.startswith("resnet") else kernels
    assert len(counted) == depth


def test_initial_kernels_are_he_normal_and_bit_equal_to_flax():
    """Drawn in another shape for the compiler's sake: the same numbers, of variance 2 / fan-in."""
    key, shape = jax.random.key(3), (3, 3, 16, 32)
    kernel = _he_normal(key, shape)
    assert kernel.shape == shape and abs(kernel.std() / np.sqrt(2 / (9 * 16)) - 1) < 0.05
    one_by_one = _he_normal(key, (1, 1, 16, 8))
    np.testing.assert_array_equal(one_by_one[0, 0], nn.initializers.he_normal()(key, (16, 8)))


def test_initial_variables_are_a_function_of_the_key():
    model = network("cnn", "batch")
    first, again, other = (initialize(model, jax.random.key(seed), SHAPE) for seed in (1, 1, 2))
    assert jax.tree.structure(first) == jax.tree.structure(shapes(model, SHAPE)[1])
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
    assert not np.array_equal(first["params"]["head"]["kernel"], other["params"]["head"]["kernel"])


# --- hidden features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "resnet8", "wrn_10_1"])
def test_hidden_is_the_preactivation_of_what_follows(name):
    """relu(stage1) and relu(stage2) are what the next stage's first convolution is applied to, relu(stage3) what the head pools."""
    model = network(name)
    variables = random_variables(model)
    seen = []

    def watch(next_method, args, kwargs, context):
        if isinstance(context.module, nn.Conv):
            seen.append((context.module.features, args[0]))
        return next_method(*args, **kwargs)

    def run(x):
        seen.clear()
        with nn.intercept_methods(watch):
            outputs = model.apply(variables, x)
        return outputs, [next(inputs for features, inputs in seen if features == width) for width in (8, 16)]

    outputs, entering = jax.jit(run)(images(0))
    for stage, following in zip(STAGES[:2], entering, strict=True):
        assert (outputs.hidden[stage] < 0).any() and (outputs.hidden[stage] > 0).any()
        np.testing.assert_allclose(np.maximum(outputs.hidden[stage], 0), following, atol=1e-6)
    head = variables["params"]["head"]
    pooled = np.maximum(outputs.hidden["stage3"], 0).mean((1, 2))
    np.testing.assert_allclose(pooled @ head["kernel"] + head["bias"], outputs.logits, rtol=1e-4, atol=1e-4)
    assert np.ptp(outputs.logits) > 0.1


def test_pixels_are_normalised_inside():
    """Channel by channel, (x − mean) / std."""
    mean, std = np.array([0.2, 0.4, 0.6], np.float32), np.array([0.1, 0.5, 2.0], np.float32)
    x = images(1, shape=(8, 8, 3))
    inside = create_model(ModelConfig("cnn", 4), classes=3, mean=mean, std=std)
    outside = create_model(ModelConfig("cnn", 4), classes=3, mean=np.zeros(3), std=np.ones(3))
    variables = random_variables(inside, (8, 8, 3))
    np.testing.assert_allclose(
        jax.jit(inside.apply)(variables, x).logits, jax.jit(outside.apply)(variables, (x - mean) / std).logits, rtol=1e-4, atol=1e-5
    )


# --- normalisation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "train", "apart"),
    [("cnn", "group", True, True), ("wrn_10_1", "group", True, True), ("cnn", "batch", True, False), ("cnn", "batch", False, True)],
)
def test_which_normalisation_keeps_examples_apart(name, norm, train, apart):
    """Another example's pixels move neither logits nor hidden features of this one, or they do."""
    model = network(name, norm)
    variables = random_variables(model)

    @jax.jit
    def first(x):
        outputs, _ = model.apply(variables, x, train=train, mutable=["batch_stats"])
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    x = images(2)
    other = x.copy()
    other[1:] = images(3)[1:]
    a, b = first(x), first(other)
    moved = [np.abs(p - q).max() for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    assert (max(moved) < 1e-6) if apart else (min(moved) > 1e-3), moved


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (8, 2), (12, 3), (20, 5), (64, 8)])
def test_group_norm_against_numpy(channels, groups):
    x = np.random.default_rng(4).normal(2, 3, size=(2, 3, 2, channels)).astype(np.float32)
    found, _ = Norm("group", True, None).init_with_output(jax.random.key(0), x)
    parts = x.reshape(2, 6, groups, channels // groups)
    expected = (parts - parts.mean((1, 3), keepdims=True)) / np.sqrt(parts.var((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, expected.reshape(x.shape), atol=1e-4)


def test_batch_norm_against_numpy_and_its_running_statistics():
    x = np.random.default_rng(5).normal(2, 3, size=(4, 3, 2, 5)).astype(np.float32)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    train, infer = Norm("batch", True, None), Norm("batch", False, "no such axis outside of pmap")
    variables = train.init(jax.random.key(0), x)
    found, changed = train.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(found, (x - mean) / np.sqrt(variance + 1e-5), atol=1e-4)
    # init does not count as a step: running statistics start at 0 and 1.
    statistics = changed["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * variance, rtol=1e-4)
    inferred = infer.apply({**variables, **changed}, x)
    np.testing.assert_allclose(inferred, (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * variance + 1e-5), atol=1e-4)


# --- pooling ------------------------------------------------------------------------------------------------------------


def blocks(height, width):
    """Row and column slices of the 2×2 blocks, the last ones cut off at an odd border."""
    return [[(slice(i, i + 2), slice(j, j + 2)) for j in range(0, width, 2)] for i in range(0, height, 2)]


@pytest.mark.parametrize("sides", [(8, 8), (5, 5), (5, 6), (6, 7), (9, 11)])
def test_halve_is_max_pooling_and_sends_gradients_to_the_largest(sides):
    x = np.random.default_rng(6).normal(size=(2, *sides, 3)).astype(np.float32)
    weights = np.random.default_rng(7).normal(size=(2, (sides[0] + 1) // 2, (sides[1] + 1) // 2, 3)).astype(np.float32)
    expected, gradient = np.zeros_like(weights), np.zeros_like(x)
    for i, row in enumerate(blocks(*sides)):
        for j, (rows, columns) in enumerate(row):
            block = x[:, rows, columns]
            expected[:, i, j] = block.max((1, 2))
            gradient[:, rows, columns] = (block == expected[:, i : i + 1, j : j + 1]) * weights[:, i : i + 1, j : j + 1]
    np.testing.assert_array_equal(_halve(jnp.asarray(x)), expected)
    np.testing.assert_allclose(jax.grad(lambda x: (_halve(x) * weights).sum())(x), gradient, rtol=1e-6)


@pytest.mark.parametrize("sides", [(4, 4), (3, 9), (12, 4), (1, 1)])
def test_halve_leaves_small_sides_alone(sides):
    x = jnp.asarray(np.random.default_rng(8).normal(size=(1, *sides, 2)))
    assert _halve(x) is x


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cn", "did you mean 'cnn'"),
        ("resnet", "did you mean 'resnet"),
        ("ResNet20", "did you mean 'resnet20'"),
        ("wrn_16", "did you mean 'wrn_16_"),
        ("vit", "Known: cnn, resnet20"),
        ("resnet20 ", "did you mean 'resnet20'"),
        ("resnet21", "depth 21; it must be 6n.2, as 20"),
        ("resnet2", "depth 2; it must be 6n.2"),
        ("resnet18", "depth 18; it must be 6n.2"),
        ("wrn_16_0", "widening 0; it must be at least 1"),
        ("wrn_15_1", "depth 15; it must be 6n.4, as 22"),
        ("wrn_4_1", "depth 4; it must be 6n.4"),
        ("resnet1202", "depth 1202; it must be at most 200"),
        ("resnet٢٠", "did you mean 'resnet"),
        ("wrn_16_999", "'wrn_16_999' of width 4 has about 10,563 million parameters; at most 500 million .*--model.width"),
    ],
)
def test_unknown_networks(name, text):
    with pytest.raises(UsageError, match=text):
        network(name)


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 100, 3), (9, 11, 3)])
def test_image_shapes_that_fit(shape):
    check_image_shape(shape)


@pytest.mark.parametrize("shape", [(7, 8, 1), (28, 7, 3), (8, 8, 2), (8, 8, 4), (32, 32, 0)])
def test_image_shapes_that_do_not_fit(shape):
    with pytest.raises(UsageError, match="×".join(map(str, shape)) + ".*at least 8.*1 or 3 channels"):
        check_image_shape(shape)
