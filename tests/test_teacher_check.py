"""A teacher that is read in the wrong way stops the run with what is wrong; one that is right, or that cannot be judged, does not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from wdkd.config import TeacherInputConfig
from wdkd.data import Split
from wdkd.errors import UsageError
from wdkd.metrics import confidence_bins
from wdkd.teacher import Teacher
from wdkd.teacher_check import at_chance, calibration, check_teacher, flags
from wdkd.teacher_input import adapt, interface

NAMES = ("dog", "ant", "cat", "bee")
LEVELS = np.array([20, 90, 160, 230])
"""Of red, by class. Green is its complement and blue is noise, so neither rows nor blue say anything of the class."""


def split_of(count=64, labels=None):
    draw = np.random.default_rng(0)
    labels = np.arange(count) % 4 if labels is None else np.asarray(labels)
    red = (LEVELS[labels % 4][:, None, None] + draw.integers(-15, 16, (count, 8, 8))).astype(np.uint8)
    blue = np.broadcast_to(draw.integers(0, 256, (count, 1, 1)), red.shape).astype(np.uint8)
    images = np.stack([red, 255 - red, blue], -1)
    return Split("made", NAMES, images, labels.astype(np.int32), np.arange(count), "hash", images, labels, "test")


def network(variables, x):
    """Reads the level of red from nchw images in 0-255."""
    return -((x[:, 0].mean((1, 2))[:, None] - variables) ** 2) / 500


def read(options, network=network):
    between = interface(options, (8, 8, 3), NAMES, where="net.onnx")
    apply, variables = adapt(network, between), np.asarray(LEVELS, np.float32)
    return Teacher(apply, variables, 4, (8, 8, 3), "net.onnx", "hash", None, read_as=between.describe())


RIGHT = TeacherInputConfig(value_range="0-255")


def check(options=RIGHT, split=None, network=network):
    return check_teacher(read(options, network), split or split_of(), options, lambda other: read(other, network))


def test_what_was_found_is_said_in_a_line():
    said = check()
    assert said.startswith("teacher net.onnx on 64 training images: accuracy 100.00%, ECE 0.")
    assert "input gradients finite, norms about " in said and "\n" not in said


def in_order(order):
    """The network with its outputs in another order: place j is class order[j]."""
    return lambda variables, x: network(variables, x)[:, jnp.asarray(order)]


WRONG = {
    "value range": (TeacherInputConfig(), network, "likely cause: scaling; with --teacher-input.value-range 0-255 its accuracy is 100.00%"),
    "mean and std": (
        dataclasses.replace(RIGHT, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
        network,
        "likely cause: scaling; with --teacher-input.mean None --teacher-input.std None its accuracy is 100.00%",
    ),
    "colours": (
        dataclasses.replace(RIGHT, channels="bgr"),
        network,
        "likely cause: order of colours; with --teacher-input.channels rgb its accuracy is 100.00%",
    ),
    "layout": (
        dataclasses.replace(RIGHT, layout="nhwc"),
        network,
        "likely cause: layout; with --teacher-input.layout nchw its accuracy is 100.00%",
    ),
    "two things": (
        TeacherInputConfig(channels="bgr"),
        network,
        "order of colours and scaling; with --teacher-input.channels rgb --teacher-input.value-range 0-255 its accuracy is 100.00%",
    ),
    "class order": (
        RIGHT,
        in_order([2, 0, 3, 1]),
        "likely cause: another order of the classes; in the order cat dog bee ant its accuracy is 100.00%: give that to --teacher-input.cl",
    ),
    "alphabetical order": (
        RIGHT,
        in_order([1, 3, 2, 0]),
        "in the order ant bee cat dog, which is alphabetical, its accuracy is 100.00%",
    ),
    "scaling and class order": (
        TeacherInputConfig(),
        in_order([2, 0, 3, 1]),
        "likely causes: scaling (--teacher-input.value-range 0-255), and another order of the classes; in the order cat dog bee ant",
    ),
    "nothing that is known": (RIGHT, lambda variables, x: jnp.zeros((len(x), 4)).at[:, 1].set(x[:, 2, 0, 0]), "none is far better"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_teacher_at_chance_stops_the_run_with_the_likely_cause(name):
    options, net, words = WRONG[name]
    with pytest.raises(UsageError) as caught:
        check(options, network=net)
    text = str(caught.value)
    assert "teacher net.onnx is at chance: accuracy " in text and words in text and text.isprintable(), text


def test_what_the_error_says_puts_it_right():
    order = ("cat", "dog", "bee", "ant")
    assert "accuracy 100.00%" in check(dataclasses.replace(RIGHT, classes=order), network=in_order([2, 0, 3, 1]))
    assert flags(RIGHT, dataclasses.replace(RIGHT, mean=(0.5, 0.25), classes=None)) == "--teacher-input.mean 0.5 0.25"


def test_few_images_or_none_with_a_label_tell_nothing_so_nothing_is_stopped():
    wrong = in_order([2, 0, 3, 1])
    assert "accuracy 0.00%" in check(split=split_of(3), network=wrong)
    said = check(split=split_of(labels=[-1] * 64), network=wrong)
    assert "accuracy" not in said and "input gradients finite" in said


def test_at_chance_is_a_matter_of_how_likely_guessing_would_do_as_well():
    labels = np.repeat(np.arange(10), 10)
    for right, chance in ((0, True), (10, True), (17, True), (19, False), (100, False)):
        named = (labels + 1) % 10
        named[np.random.default_rng(0).permutation(100)[:right]] = labels[np.random.default_rng(0).permutation(100)[:right]]
        assert at_chance(np.eye(10)[named], labels) == chance, right
    # Most images are of one class: naming always that one is no better than chance.
    labels = np.array([0] * 90 + [1] * 10)
    assert at_chance(np.eye(2)[np.zeros(100, int)], labels) and not at_chance(np.eye(2)[labels], labels)


def test_calibration_is_the_expected_calibration_error():
    draw = np.random.default_rng(1)
    logits, labels = draw.normal(size=(50, 4)).astype(np.float32) * 2, draw.integers(0, 4, 50)
    confidence = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
    bins = np.asarray(confidence_bins(jnp.asarray(confidence), 15))
    right = logits.argmax(1) == labels
    expected = sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)) / 50
    assert calibration(logits, labels) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("net", "options", "words"),
    [
        (lambda v, x: network(v, x) * jnp.inf, RIGHT, "gives outputs that are not finite for 64 of 64 training images"),
        (
            lambda v, x: jnp.exp(network(v, x)) / jnp.exp(network(v, x)).sum(1, keepdims=True),
            RIGHT,
            "gives probabilities: all are at least",
        ),
        (network, dataclasses.replace(RIGHT, outputs="probabilities"), "gives no probabilities: they sum to"),
        (
            lambda v, x: network(v, x) + jnp.sqrt(x.min((1, 2, 3)) - x.min((1, 2, 3)))[:, None],
            RIGHT,
            "its input gradients are not finite on training images; use --method.name kd, --method.through-teacher False",
        ),
    ],
)
def test_outputs_and_gradients_that_cannot_be_are_refused(net, options, words):
    with pytest.raises(UsageError) as caught:
        check(options, network=net)
    assert words in str(caught.value), str(caught.value)


def test_gradients_that_nobody_needs_may_be_anything():
    def net(variables, x):
        return network(variables, x) + jnp.sqrt(x.min((1, 2, 3)) - x.min((1, 2, 3)))[:, None]

    said = check_teacher(read(RIGHT, net), split_of(), RIGHT, None, needs_gradients=False)
    assert "accuracy 100.00%" in said and said.endswith("input gradients not finite, nor needed")


def test_of_outputs_alone_the_order_is_tried(tmp_path):
    split = split_of()
    right = np.eye(4, dtype=np.float32)[split.train_labels] * 3
    teacher = Teacher(None, None, 4, (8, 8, 3), "said.npz", "hash", None, outputs=right)
    said = check_teacher(teacher, split, TeacherInputConfig(), None)
    assert "accuracy 100.00%" in said and "its outputs alone are known, so through_teacher is False" in said
    for outputs, words in (
        (right[:, [2, 0, 3, 1]], "in the order cat dog bee ant"),
        (right[np.random.default_rng(3).permutation(64)], "are its rows those of"),
    ):
        with pytest.raises(UsageError) as caught:
            check_teacher(dataclasses.replace(teacher, outputs=outputs), split, TeacherInputConfig(), None)
        assert words in str(caught.value), str(caught.value)
