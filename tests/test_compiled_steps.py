"""What the compiler makes of a step: its FLOPs, what sits inside loops, and arrays made of nothing. No seconds: machines are noisy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from wdkd import parallel
from wdkd.augment import create_augmentation
from wdkd.config import ModelConfig
from wdkd.folding import fold
from wdkd.methods import create_stages
from wdkd.models import create_model, initialize
from wdkd.state import create_optimizer, create_state
from wdkd.steps import Data, Draw, make_train_step, repeated
from wdkd.teacher import Record, inference, live, recorded

SHAPE, CLASSES, BATCH = (32, 32, 3), 10, 4
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts what the CPU compiler makes")


def network(name, width, norm):
    model = create_model(ModelConfig(name, width, norm), classes=CLASSES, mean=[0.5] * 3, std=[0.25] * 3)
    return model, initialize(model, jax.random.key(0), SHAPE)


STUDENT, STUDENT_VARIABLES = network("cnn", 16, "group")
TEACHER, TEACHER_VARIABLES = fold(*network("resnet8", 16, "batch"), SHAPE)


def forward_flops(model, variables):
    x = jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32)
    return parallel.compile_lowered(jax.jit(lambda x: inference(model)(variables, x).logits).lower(x)).cost_analysis()["flops"]


def compiled(name, cached=False, steps=1, **edits):
    """A method's step on one device, as a run compiles it."""
    config = tiny(method__name=name, **edits)
    stage = create_stages(config.method)[0]
    optimizer = create_optimizer(config.optimizer, steps=10)
    step = make_train_step(
        student=STUDENT,
        connectors=None,
        teacher_at=recorded if cached else live(inference(TEACHER)),
        objective=stage.objective,
        optimizer=optimizer,
        augmentation=create_augmentation(config.augment, SHAPE),
        views=config.augment.finite_views,
        ema_decay=None,
        classes=CLASSES,
        axis_name=parallel.AXIS,
    )
    record = Record(np.zeros((8, CLASSES), np.float32), np.zeros((8, CLASSES, *SHAPE), np.float32), {})
    state = create_state({"student": STUDENT_VARIABLES}, optimizer, step=0, averaged=False)
    data = Data(np.zeros((8, *SHAPE), np.uint8), np.zeros(8, np.int32))
    rows = np.zeros((1, steps, BATCH), np.int32)
    mapped = jax.pmap(
        repeated(step), axis_name=parallel.AXIS, in_axes=(None, None, None, None, 0), out_axes=None, devices=jax.devices()[:1]
    )
    arguments = (state, record if cached else TEACHER_VARIABLES, data, jax.random.key_data(jax.random.key(0)), Draw(rows, rows, rows, rows))
    return parallel.compile_lowered(mapped.lower(*arguments))


@pytest.fixture(scope="module")
def flops():
    """(F_S, F_T) of a batch."""
    return forward_flops(STUDENT, STUDENT_VARIABLES), forward_flops(TEACHER, TEACHER_VARIABLES)


@pytest.fixture(scope="module")
def exact():
    """The exact worst-case step with the live teacher, and from its record."""
    return {cached: compiled("wdkd", cached, method__epsilon=0.1) for cached in (False, True)}


def test_the_forward_pass_is_counted_right(flops):
    """By hand, multiplications and additions of the convolutions that fall inside the image."""
    inside = 0
    for side, channels, width in ((32, 3, 16), (16, 16, 16), (16, 16, 32), (8, 32, 32), (8, 32, 64), (4, 64, 64)):
        inside += 2 * channels * width * (3 * side - 2) ** 2
    assert inside * BATCH <= flops[0] <= 1.1 * inside * BATCH


@pytest.mark.parametrize(("cached", "ideal"), [(False, lambda s, t: 6 * s + 3 * t), (True, lambda s, t: 6 * s)])
def test_nothing_is_computed_twice_in_the_exact_step(exact, flops, cached, ideal):
    assert exact[cached].cost_analysis()["flops"] <= 1.1 * ideal(*flops)


@pytest.mark.parametrize(
    ("name", "cached", "ideal"),
    [
        ("kd", False, lambda s, t: 3 * s + t),
        ("kd", True, lambda s, t: 3 * s),
        # Its directions do not depend on the student, so the live teacher is never gone through a third time.
        ("sobolev", False, lambda s, t: 6 * s + 2 * t),
        ("sobolev", True, lambda s, t: 6 * s),
    ],
)
def test_no_method_computes_anything_twice(name, cached, ideal, flops):
    assert compiled(name, cached).cost_analysis()["flops"] <= 1.1 * ideal(*flops)


def test_boundary_views_cost_three_steps_of_the_teacher_and_the_student_once_more(flops):
    """At the images both networks are seen already, and of the first of the teacher's three steps only the way back is new."""
    student, teacher = flops
    cost = compiled("kd", False, method__boundary_radius=0.1).cost_analysis()["flops"]
    assert cost <= 1.1 * (6 * student + 7 * teacher)


def inside_loops(text):
    """Names of the operations in the bodies of loops, and in all that they call."""
    computations = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?(%[\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)}
    waiting = [name for body in computations.values() for name in re.findall(r"while\(.*?body=(%[\w.\-]+)", body)]
    seen, operations = set(), set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            operations |= set(re.findall(r" = \S+ ([\w\-]+)\(", computations[name]))
            waiting += [found for found in re.findall(r"%[\w.\-]+", computations[name]) if found in computations]
    return operations


@pytest.mark.parametrize("cached", [False, True])
def test_no_convolution_sits_inside_a_loop_on_cpu(exact, cached):
    text = exact[cached].as_text()
    assert "convolution(" in text
    assert not {"convolution", "dot", "custom-call"} & inside_loops(text)


def test_several_steps_in_a_call_are_a_loop_around_convolutions():
    """What the test above would see, if it came to the CPU."""
    assert "convolution" in inside_loops(compiled("kd", cached=True, steps=2).as_text())


@pytest.mark.parametrize("cached", [False, True])
def test_no_large_array_is_made_of_nothing(exact, cached):
    """Zeros, padded: a padding by no pixels before the pooling once took half of the cached step."""
    nothing = re.findall(r" = f32\[([\d,]+)\]\S* (?:fusion|broadcast|pad)\(\)", exact[cached].as_text())
    assert [shape for shape in nothing if np.prod([int(side) for side in shape.split(",")]) > 1000 * BATCH] == []
