"""The PyTorch side of the benchmark computes what the JAX side does: logits, losses and every parameter's gradient."""

import copy
import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wdkd.config import ModelConfig  # noqa: E402
from wdkd.errors import UsageError  # noqa: E402
from wdkd.input_gradients import worst_case  # noqa: E402
from wdkd.losses import kl_divergence  # noqa: E402
from wdkd.models import apply_network, create_model  # noqa: E402
from wdkd.torch_reference import kd_step, mirror, to_flax, worst_case_step  # noqa: E402

TEMPERATURE, EPSILON = 3.0, 0.7
PAIRS = {  # (student, its norm, teacher, its norm, image shape); 9×11 halves to 5×6: odd and even sides, and both in one image.
    "cnn": ("cnn", "group", "resnet8", "batch", (9, 11, 1)),
    "resnet": ("resnet8", "group", "cnn", "group", (16, 16, 3)),
    "batch": ("cnn", "batch", "cnn", "batch", (8, 8, 3)),
}


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Compiling takes nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def network(name, norm, shape, seed=0, width=4):
    """(model, variables): drawn so that no scale is 1, no bias or mean 0, and variances are positive."""
    channels = shape[-1]
    model = create_model(ModelConfig(name, width, norm), classes=5, mean=[0.3, 0.4, 0.5][:channels], std=[0.2, 0.3, 0.4][:channels])
    random = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim > 1:
            return (random.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), np.float32)))


def images(shape, batch=6, seed=1):
    return np.random.default_rng(seed).uniform(size=(batch, *shape)).astype(np.float32)


def to_torch(x):
    """(B, H, W, C) -> (B, C, H, W)."""
    return torch.tensor(x.transpose(0, 3, 1, 2))


IN_DOUBLE = ("resnet",)
"""Pairs compared in float64. In float32 a ReLU may lie within rounding of its kink, whose two derivatives differ by a percent of the
gradient; whether it does depends on the processor. `test_logits` and the other pairs compare float32."""


@functools.cache
def mirrored(pair):
    """(student, teacher) in PyTorch, the variables of both in flax, and their models and images."""
    student, student_norm, teacher, teacher_norm, shape = PAIRS[pair]
    # Two widths, so that one network cannot stand in for the other.
    models, variables = zip(network(student, student_norm, shape, 2), network(teacher, teacher_norm, shape, 3, width=8), strict=True)
    twins = [mirror(model, tree) for model, tree in zip(models, variables, strict=True)]
    x = images(shape)
    if pair in IN_DOUBLE:
        twins = [twin.double() for twin in twins]
        variables, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables, x))
    twins[1].requires_grad_(False)
    return twins, variables, models, x


def expected(pair, through_teacher, epsilon):
    """(value, gradient tree) of the step in JAX; without epsilon that of plain distillation."""
    _, variables, models, x = mirrored(pair)

    @jax.jit
    @jax.value_and_grad
    def step(params):
        def per_example(x):
            s, t = (
                apply_network(model, tree, x, train=False).logits for model, tree in zip(models, (own(params), variables[1]), strict=True)
            )
            return kl_divergence(s, t if through_teacher else constant, TEMPERATURE)

        return per_example(x).mean() if epsilon is None else worst_case(per_example, x, epsilon)[0]

    def own(params):
        return variables[0] | {"params": params}

    with jax.enable_x64(pair in IN_DOUBLE):
        constant = models[1].apply(variables[1], x).logits
        return step(variables[0]["params"])


def relative(found, wanted):
    found, wanted = np.asarray(found), np.asarray(wanted)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def assert_agree(pair, found, wanted):
    """The value, and every gradient in units of its own norm, to 1e-4."""
    (value, gradients), (wanted_value, wanted_gradients) = found, wanted
    assert not value.requires_grad and value.ndim == 0
    assert relative(value, wanted_value) < 1e-5
    differences = jax.tree.map(relative, to_flax(mirrored(pair)[0][0], gradients), wanted_gradients)
    assert max(jax.tree.leaves(differences)) < 1e-4, differences


# --- networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", ["cnn", "resnet14"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 11, 1), (16, 16, 3)])
def test_logits(name, norm, shape):
    model, variables = network(name, norm, shape)
    x = images(shape)
    wanted = jax.jit(model.apply)(variables, x).logits
    with torch.no_grad():
        assert relative(mirror(model, variables)(to_torch(x)), wanted) < 1e-5
    assert np.ptp(wanted, axis=0).min() > 0.01


def test_group_norm_of_wider_networks_and_of_small_activations():
    """Widths of 5, 8 and 8 groups; kernels so small that what is added to the variance shows."""
    model, variables = network("cnn", "group", (8, 8, 1), width=20)
    variables = jax.tree.map(lambda leaf: leaf * np.float32(0.01) if leaf.ndim == 4 else leaf, variables)
    x = images((8, 8, 1))
    with torch.no_grad():
        assert relative(mirror(model, variables)(to_torch(x)), jax.jit(model.apply)(variables, x).logits) < 1e-5


def test_pixel_statistics_of_the_variables_come_first():
    model, variables = network("cnn", "group", (8, 8, 3))
    given = variables | {"input": {"mean": np.float32([0.6, 0.2, 0.1]), "std": np.float32([0.5, 1.0, 2.0])}}
    x = images((8, 8, 3))
    with torch.no_grad():
        found, own = (mirror(model, tree)(to_torch(x)) for tree in (given, variables))
    assert relative(found, apply_network(model, given, x).logits) < 1e-5 < relative(own, found)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_weights_are_copies_and_come_back(norm):
    model, variables = network("resnet8", norm, (8, 8, 1))
    twin = mirror(model, variables)
    jax.tree.map(np.testing.assert_array_equal, to_flax(twin, twin.parameters()), variables["params"])
    before = jax.tree.map(np.copy, variables)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_values_must_be_as_many_as_parameters():
    twin = mirror(*network("cnn", "group", (8, 8, 1)))
    with pytest.raises(ValueError, match="shorter"):
        to_flax(twin, list(twin.parameters())[:-1])


# --- steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_distillation_step(pair):
    (student, teacher), _, _, x = mirrored(pair)
    assert_agree(pair, kd_step(student, teacher, to_torch(x), TEMPERATURE), expected(pair, True, None))


@pytest.mark.parametrize("through_teacher", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_worst_case_step(pair, through_teacher):
    (student, teacher), _, _, x = mirrored(pair)
    found = worst_case_step(student, teacher, to_torch(x), TEMPERATURE, EPSILON, through_teacher)
    assert_agree(pair, found, expected(pair, through_teacher, EPSILON))


def test_memory_format_changes_nothing():
    (student, teacher), _, _, x = mirrored("cnn")
    wanted_value, wanted = worst_case_step(student, teacher, to_torch(x), TEMPERATURE, EPSILON)
    student, teacher = (copy.deepcopy(twin).to(memory_format=torch.channels_last) for twin in (student, teacher))
    last = to_torch(x).contiguous(memory_format=torch.channels_last)
    value, gradients = worst_case_step(student, teacher, last, TEMPERATURE, EPSILON)
    assert relative(value, wanted_value) < 1e-5
    assert max(map(relative, gradients, wanted)) < 1e-4


def test_a_ball_of_no_radius_is_distillation():
    (student, teacher), _, _, x = mirrored("resnet")
    value, gradients = worst_case_step(student, teacher, to_torch(x), TEMPERATURE, 0.0)
    wanted_value, wanted = kd_step(student, teacher, to_torch(x), TEMPERATURE)
    torch.testing.assert_close((value, gradients), (wanted_value, wanted))


def test_steps_leave_no_gradients_behind():
    (student, teacher), _, _, x = mirrored("cnn")
    x = to_torch(x)
    for _, gradients in (kd_step(student, teacher, x, TEMPERATURE), worst_case_step(student, teacher, x, TEMPERATURE, EPSILON)):
        assert [g.shape for g in gradients] == [p.shape for p in student.parameters()]
        assert not any(g.requires_grad for g in gradients)
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters(), x))
    assert not x.requires_grad and not any(p.requires_grad for p in teacher.parameters())


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_a_trainable_teacher_is_refused():
    (student, _), _, _, x = mirrored("cnn")
    with pytest.raises(UsageError, match=r"freeze it with teacher.requires_grad_\(False\)"):
        worst_case_step(student, student, to_torch(x), TEMPERATURE, EPSILON)


def test_networks_that_have_no_reference_are_refused():
    with pytest.raises(UsageError, match="WideResNet has no PyTorch reference; known: CNN, ResNet"):
        mirror(*network("wrn_10_1", "group", (8, 8, 1)))
    model, variables = network("cnn", "group", (8, 8, 1))
    with pytest.raises(UsageError, match="float32, not in bfloat16"):
        mirror(model.clone(dtype=jax.numpy.bfloat16), variables)
    params = variables["params"] | {"Shift_0": {"bias": np.zeros(4, np.float32)}}
    with pytest.raises(UsageError, match="layer 'Shift_0' has no PyTorch reference"):
        mirror(model, {"params": params})
