"""One step of training against jax.grad and an update by hand; evaluation against NumPy. On one device, through pmap."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wdkd import metrics
from wdkd.augment import create_augmentation
from wdkd.batches import evaluation_batches
from wdkd.config import AugmentConfig, MethodConfig, ModelConfig, OptimizerConfig
from wdkd.methods import create_stages
from wdkd.models import create_model
from wdkd.parallel import AXIS, map_over_devices
from wdkd.state import create_optimizer, create_state
from wdkd.steps import Data, Draw, EvaluationDraw, make_batch, make_eval_step, make_naming_step, make_train_step, pixels
from wdkd.teacher import inference, live

SHAPE, CLASSES, IMAGES, BATCH = (8, 8, 1), 3, 10, 4
RATE, MOMENTUM, DECAY, EMA = 0.2, 0.6, 0.1, 0.7
KEY = jax.random.key_data(jax.random.key(9))
pytestmark = pytest.mark.skipif(jax.device_count() != 1, reason="what is computed by hand here is one device's")


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Compiling takes nearly all the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def network(width, norm, axis_name=None):
    return create_model(ModelConfig("cnn", width, norm), classes=CLASSES, mean=[0.4], std=[0.3], axis_name=axis_name)


def drawn(shapes, seed):
    """Variables drawn with NumPy, which compiles nothing; variances are positive."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim > 1:
            return (random.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def variables_of(model, seed):
    return drawn(jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)), seed)


def dataset(seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, IMAGES).astype(np.int32)
    return Data(random.integers(0, 256, (IMAGES, *SHAPE)).astype(np.uint8), labels)


def draw(index, partner=None, position=None):
    index = np.asarray(index, np.int32)
    partner = index if partner is None else np.asarray(partner, np.int32)
    position = np.arange(len(index), dtype=np.int32) if position is None else np.asarray(position, np.int32)
    return Draw(index, partner, position, np.zeros(len(index), np.int32))


def on_device(tree):
    """With the leading device axis that the mapped step splits."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def close(a, b, tolerance=2e-4):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# --- batches ------------------------------------------------------------------------------------------------------------


def batch_of(name, chosen, data, views=None):
    augmentation = create_augmentation(AugmentConfig(name, padding=1), SHAPE)
    return jax.jit(make_batch, static_argnums=(4, 5, 6))(data, chosen, jax.random.key(1), 0, augmentation, CLASSES, views)


def test_pixels_are_the_bytes_over_255():
    """To one rounding (XLA multiplies by the inverse), and never above 1."""
    found = np.asarray(pixels(jnp.arange(256, dtype=jnp.uint8)))
    np.testing.assert_allclose(found, np.arange(256) / 255, rtol=2e-7)
    assert found.dtype == np.float32 and found[0] == 0 and found[255] == 1


@pytest.mark.parametrize("name", ["none", "flip_crop"])
def test_labels_that_are_not_mixed_are_one_hot(name):
    data, index = dataset(), np.array([3, 1, 3, 9])
    batch = batch_of(name, draw(index, partner=[0, 2, 4, 5]), data)
    np.testing.assert_array_equal(batch.labels, np.eye(CLASSES)[data.labels[index]])
    if name == "none":
        np.testing.assert_allclose(batch.x, data.images[index] / 255, rtol=2e-7)


def test_mixed_labels_have_the_weights_of_the_two_images():
    """White images of class 0 blended with black ones of class 1, not moved: the label's weights are the view's grey."""
    labels = np.array([0, 1], np.int32)
    data = Data(np.stack([np.full(SHAPE, 255), np.zeros(SHAPE)]).astype(np.uint8), labels)
    chosen = draw(np.zeros(16), partner=np.ones(16))
    augmentation = create_augmentation(AugmentConfig("matching", padding=0), SHAPE)
    batch = jax.jit(make_batch, static_argnums=(4, 5, 6))(data, chosen, jax.random.key(2), 0, augmentation, CLASSES, None)
    grey = np.asarray(batch.x).mean((1, 2, 3))
    np.testing.assert_allclose(batch.labels, np.stack([grey, 1 - grey, 0 * grey], 1), atol=1e-6)
    assert np.ptp(grey) > 0.3


def test_an_example_depends_on_its_position_in_the_global_batch_alone():
    """Two devices with half the batch each see what one sees."""
    data, index, partner = dataset(), np.array([3, 1, 3, 9]), np.array([0, 2, 4, 5])
    whole = batch_of("matching", draw(index, partner), data)
    halves = [batch_of("matching", draw(index[part], partner[part], np.arange(4)[part]), data) for part in (slice(2), slice(2, 4))]
    for field in ("x", "labels"):
        np.testing.assert_array_equal(getattr(whole, field), np.concatenate([getattr(half, field) for half in halves]))
    key_data = np.asarray(jax.random.key_data(whole.keys))
    np.testing.assert_array_equal(key_data, np.concatenate([jax.random.key_data(half.keys) for half in halves]))
    assert len(np.unique(key_data, axis=0)) == 4


# --- a step of kd -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kd():
    """Two steps of kd with SGD and a moving average; student and teacher have batch norm, augmentation is on."""
    student, teacher = network(4, "batch"), network(6, "batch")
    student_variables, teacher_variables = variables_of(student, 1), variables_of(teacher, 2)
    given = copy.deepcopy((student_variables, teacher_variables))
    optimizer = create_optimizer(
        OptimizerConfig("sgd", RATE, warmup_fraction=0.0, weight_decay=DECAY, momentum=MOMENTUM, clip_norm=None), steps=10
    )
    augmentation = create_augmentation(AugmentConfig("flip_crop", padding=1), SHAPE)
    step = make_train_step(
        student=network(4, "batch", AXIS),
        connectors=None,
        teacher_at=live(inference(teacher)),
        objective=create_stages(MethodConfig("kd", temperature=2.0))[0].objective,
        optimizer=optimizer,
        augmentation=augmentation,
        views=None,
        ema_decay=EMA,
        classes=CLASSES,
        axis_name=AXIS,
    )
    mapped, data, chosen = map_over_devices(step, arguments=5), dataset(), draw([3, 1, 3, 9])
    states = [jax.device_put(create_state({"student": student_variables}, optimizer, step=5, averaged=True))]
    measured = []
    for _ in range(2):
        state, seen = mapped(states[-1], teacher_variables, data, KEY, on_device(chosen))
        states.append(state)
        measured.append(seen)

    def by_hand(variables, count):
        """(loss, gradients, statistics) at a step, written without anything of ours but the networks and the batch."""
        batch = make_batch(data, chosen, jax.random.wrap_key_data(KEY), count, augmentation, CLASSES, None)
        p = jax.nn.softmax(teacher.apply(teacher_variables, batch.x, train=False).logits / 2.0)

        def loss(params):
            outputs, changed = student.apply({**variables, "params": params}, batch.x, train=True, mutable=["batch_stats"])
            q = jax.nn.softmax(outputs.logits / 2.0)
            return 4.0 * (p * jnp.log(p / q)).sum(-1).mean(), changed["batch_stats"]

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, gradients, statistics

    by_hand = jax.jit(by_hand)
    hands = [by_hand(state.variables["student"], 5 + n) for n, state in enumerate(states[:2])]
    found = {"states": states, "measured": measured, "hands": hands, "given": given, "used": (student_variables, teacher_variables)}
    return jax.device_get(found)


def test_kd_step_is_the_gradient_and_the_update_by_hand(kd):
    """Nesterov with the decay in the gradient; the second step uses the first one's velocity and a rate on the cosine."""
    velocity = None
    for n, (_, gradients, _) in enumerate(kd["hands"]):
        params = kd["states"][n].variables["student"]["params"]
        rate = RATE * (1 + np.cos(np.pi * n / 10)) / 2  # the schedule counts the stage's steps, not the run's
        decayed = jax.tree_util.tree_map_with_path(lambda path, g, p: g + DECAY * p * (path[-1].key == "kernel"), gradients, params)
        velocity = decayed if velocity is None else jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, decayed)
        expected = jax.tree.map(lambda p, g, v, rate=rate: p - rate * (g + MOMENTUM * v), params, decayed, velocity)
        close(kd["states"][n + 1].variables["student"]["params"], expected)
        assert kd["states"][n + 1].step == 6 + n


def test_kd_step_measures_what_it_did(kd):
    for seen, (value, gradients, _) in zip(kd["measured"], kd["hands"], strict=True):
        np.testing.assert_allclose([seen["objective"], seen["loss"]], value, rtol=1e-4)
        norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
        np.testing.assert_allclose(seen["gradient_norm"], norm, rtol=1e-3)
        assert np.isnan(seen["input_gradient_norm"])
    assert kd["measured"][0]["loss"] != kd["measured"][1]["loss"]


def test_students_statistics_move_and_the_teachers_do_not(kd):
    """Were the teacher in training mode, the loss by hand would be another one."""
    for (_, _, statistics), state in zip(kd["hands"], kd["states"][1:], strict=True):
        close(state.variables["student"]["batch_stats"], statistics)
    before, after = (state.variables["student"]["batch_stats"] for state in kd["states"][:2])
    assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    for used, given in zip(jax.tree.leaves(kd["used"]), jax.tree.leaves(kd["given"]), strict=True):
        np.testing.assert_array_equal(used, given)
    assert set(kd["states"][-1].variables) == {"student"}


def test_average_follows_parameters_and_statistics(kd):
    expected = kd["given"][0]
    for state in kd["states"][1:]:
        expected = jax.tree.map(lambda a, new: EMA * a + (1 - EMA) * new, expected, state.variables["student"])
        close(state.average, expected, 1e-6)
        assert state.evaluated is state.average


# --- a step of a pre-training stage -------------------------------------------------------------------------------------


def test_boundary_step_trains_connectors_and_leaves_the_head_alone():
    student, teacher = network(4, "group"), network(6, "batch")
    student_variables, teacher_variables = variables_of(student, 1), variables_of(teacher, 2)
    stage = create_stages(MethodConfig("ab"))[0]
    connectors = stage.connectors(axis_name=AXIS)
    shapes = [
        jax.eval_shape(inference(m), v, jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)).hidden
        for m, v in ((student, student_variables), (teacher, teacher_variables))
    ]
    connector_variables = drawn(jax.eval_shape(stage.connectors(axis_name=None).init, jax.random.key(0), *shapes), 3)
    variables = {"student": student_variables, "connectors": connector_variables}
    optimizer = create_optimizer(OptimizerConfig(warmup_fraction=0.0, weight_decay=0.5), steps=10, decay=stage.decays)
    step = make_train_step(
        student=student,
        connectors=connectors,
        teacher_at=live(inference(teacher)),
        objective=stage.objective,
        optimizer=optimizer,
        augmentation=create_augmentation(AugmentConfig(), SHAPE),
        views=1,
        ema_decay=None,
        classes=CLASSES,
        axis_name=AXIS,
    )
    before = create_state(variables, optimizer, step=0, averaged=False)
    after, _ = map_over_devices(step, arguments=5)(before, teacher_variables, dataset(), KEY, on_device(draw([0, 1, 2, 3])))
    assert after.average is None and after.evaluated is after.variables["student"]
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(variables), jax.tree.leaves(after.variables), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.array_equal(old, new) == ("'head'" in name), name


# --- evaluation ---------------------------------------------------------------------------------------------------------


def test_evaluation_counts_every_image_once():
    """Ten images in batches of four: the last has two of padding, index 0, which must not count again."""
    student, teacher = network(4, "group"), network(6, "batch")
    trees, data = (variables_of(student, 4), variables_of(teacher, 5)), dataset(6)
    logits = [np.asarray(jax.jit(inference(m))(v, pixels(data.images)).logits) for m, v in zip((student, teacher), trees, strict=True)]
    called, taught = (z.argmax(1) for z in logits)
    data = Data(data.images, np.where(np.arange(IMAGES) % 3, data.labels, called).astype(np.int32))  # the first is right
    draws = [on_device(EvaluationDraw(index, mask)) for index, mask in evaluation_batches(IMAGES, BATCH)]
    naming = map_over_devices(make_naming_step(apply=inference(teacher), axis_name=AXIS), arguments=3)
    named = np.concatenate([np.asarray(naming(trees[1], data, drawn)).reshape(-1) for drawn in draws])[:IMAGES]
    np.testing.assert_array_equal(named, taught)
    step = map_over_devices(make_eval_step(apply=inference(student), axis_name=AXIS), arguments=4)
    sums = [step(trees[0], data, named, drawn) for drawn in draws]
    assert [int(s.count) for s in sums] == [4, 4, 2]
    total = sums[0]
    for more in sums[1:]:
        total = metrics.add(total, more)
    confusion = np.zeros((CLASSES, CLASSES), int)
    np.add.at(confusion, (data.labels, called), 1)
    np.testing.assert_array_equal(total.confusion, confusion)
    assert int(total.count) == IMAGES
    assert int(total.correct) == (called == data.labels).sum() > 0
    assert int(total.agree) == (called == taught).sum()
    assert int(total.bin_count.sum()) == IMAGES
    e = np.exp(logits[0] - logits[0].max(1, keepdims=True))
    np.testing.assert_allclose(total.bin_confidence.sum(), (e / e.sum(1, keepdims=True)).max(1).sum(), rtol=1e-5)
