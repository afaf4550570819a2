"""One step of training and one of evaluation: pure functions of arrays. Collectives are here; mapping over devices is not."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from wdkd import metrics
from wdkd.augment import example_keys, view_keys
from wdkd.methods import Batch, Objective, Seen
from wdkd.models import Outputs, apply_network
from wdkd.state import TrainState, all_finite, join_params, moving_average, split_params, unless_finite
from wdkd.teacher import TeacherAt

Array = jax.Array
TeacherApply = Callable[[Any, Array], Outputs]


@struct.dataclass
class Data:
    """All images of a split, uint8 (n, H, W, C), and their labels, int32 (n,). Lives on every device."""

    images: Array
    labels: Array
    input: dict[str, Array] | None = None
    """{"mean", "std"} of the training pixels, (channels,) each, for `models.apply_network`; None: those in the module."""


@struct.dataclass
class Draw:
    """Which images a device trains on in a step: indices (b,), partners to blend with (b,), positions in the batch (b,), and
    which of its fixed views each image is seen in (b,). With a leading axis, the draws of several steps.

    `wish` () is what this process wants after the step, a number; all are told the largest. None: they need not agree on anything."""

    index: Array
    partner: Array
    position: Array
    view: Array
    wish: Array | None = None


@struct.dataclass
class EvaluationDraw:
    """Which images a device evaluates: indices (b,) and a mask (b,) that is False on padding."""

    index: Array
    mask: Array


def pixels(images: Array) -> Array:
    """uint8 in 0..255 to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


FIXED_VIEWS = 2**32 - 1
"""Folded into the augmentation's key where views are fixed; no step has this number."""


def make_batch(data: Data, draw: Draw, key: Array, step: Array, augmentation: Callable, classes: int, views: int | None) -> Batch:
    """Gathers, augments and labels one device's share of a batch.

    A view depends on (key, step, position in the batch), or where there are `views` fixed ones of each image on (key, image, view).
    """
    keys = example_keys(jax.random.fold_in(key, step), draw.position)
    x, own = make_views(data, draw, key if views else keys, augmentation, views)
    one_hot = functools.partial(jax.nn.one_hot, num_classes=classes)
    labels = own[:, None] * one_hot(data.labels[draw.index]) + (1 - own[:, None]) * one_hot(data.labels[draw.partner])
    rows = draw.index * views + draw.view if views else None
    return Batch(x, labels, jax.vmap(functools.partial(jax.random.fold_in, data=1))(keys), rows)


def make_views(data: Data, draw: Draw, key: Array, augmentation: Callable, views: int | None) -> tuple[Array, Array]:
    """(x (b, H, W, C) in [0, 1], own weights (b,)): `key` is one key per example or, with fixed views, that of all of them."""
    keys = view_keys(jax.random.fold_in(key, FIXED_VIEWS), draw.index, draw.view) if views else key
    return augmentation(keys, pixels(data.images[draw.index]), pixels(data.images[draw.partner]))


def make_train_step(
    *,
    student: nn.Module,
    connectors: nn.Module | None,
    teacher_at: TeacherAt | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    augmentation: Callable,
    views: int | None,
    ema_decay: float | None,
    classes: int,
    axis_name: str,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The function (state, what is known of the teacher, data, key data, draw) -> (state, metrics), the same on every device.

    It sees one device's share of the batch; gradients, statistics and metrics are averaged over `axis_name`.
    """

    def see(params: Any, rest: Any, given: Any, teacher: Any, labels: Array, x: Array, through_teacher: bool) -> tuple[Seen, Any]:
        variables = join_params(params, rest)
        own = variables["student"] if given is None else variables["student"] | {"input": given}
        student_outputs, statistics = apply_network(student, own, x, train=True, mutable=["batch_stats"])
        statistics = {"student": dict(statistics)}
        teacher_outputs, connected = None, {}
        if teacher is not None:
            teacher_outputs = teacher(x if through_teacher else lax.stop_gradient(x))
        if connectors is not None:
            connected, changed = connectors.apply(
                variables["connectors"], student_outputs.hidden, teacher_outputs.hidden, mutable=["batch_stats"]
            )
            statistics["connectors"] = dict(changed)
        return Seen(student_outputs, teacher_outputs, connected, labels), statistics

    def train_step(state: TrainState, known: Any, data: Data, key: Array, draw: Draw) -> tuple[TrainState, dict[str, Array]]:
        batch = make_batch(data, draw, jax.random.wrap_key_data(key), state.step, augmentation, classes, views)
        teacher = None if teacher_at is None else teacher_at(known, batch.rows)
        params, rest = split_params(state.variables)

        def loss(params: Any) -> tuple[Array, Any]:
            look = functools.partial(see, params, rest, data.input, teacher, batch.labels)
            return objective(look, batch, functools.partial(lax.all_gather, axis_name=axis_name, tiled=True))

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        gradients, statistics = lax.pmean((gradients, aux.statistics), axis_name)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        variables = join_params(optax.apply_updates(params, updates), statistics)
        average = state.average if ema_decay is None else moving_average(state.average, variables["student"], ema_decay)
        seen = {"objective": value, "loss": aux.loss, "input_gradient_norm": aux.input_gradient_norm}
        measured = lax.pmean(seen, axis_name) | {"gradient_norm": optax.tree.norm(gradients)}
        new = TrainState(state.step + 1, variables, optimizer_state, average, state.skipped)
        measured["finite_parameters"] = all_finite(variables)
        if state.skipped is not None:
            new = unless_finite(all_finite(measured["objective"], gradients, variables), state, new)
            measured["skipped"] = new.skipped
        if draw.wish is not None:
            measured["wish"] = lax.pmax(draw.wish, axis_name)
        return new, measured

    return train_step


def repeated(train_step: Callable) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The step for draws with a leading axis: as many steps as it is long, metrics (steps,) each.

    One step is run without a loop: around convolutions, XLA's CPU compiler makes a loop 30 to 160 times slower than its body.
    """

    def steps(state: TrainState, known: Any, data: Data, key: Array, draws: Draw) -> tuple[TrainState, dict[str, Array]]:
        def one(state: TrainState, draw: Draw) -> tuple[TrainState, dict[str, Array]]:
            return train_step(state, known, data, key, draw)

        if len(draws.index) > 1:
            return lax.scan(one, state, draws)
        state, measured = one(state, jax.tree.map(lambda rows: rows[0], draws))
        return state, jax.tree.map(lambda value: value[None], measured)

    return steps


def make_naming_step(*, apply: TeacherApply, axis_name: str) -> Callable[..., Array]:
    """The function (variables, data, draw) -> the class that a network calls each image, (devices, b), the same on all devices."""

    def naming_step(variables: Any, data: Data, draw: EvaluationDraw) -> Array:
        return lax.all_gather(jnp.argmax(apply(variables, pixels(data.images[draw.index])).logits, axis=-1), axis_name)

    return naming_step


def make_eval_step(*, apply: TeacherApply, axis_name: str) -> Callable[..., metrics.Sums]:
    """The function (variables, data, the teacher's classes of all images (n,) or None, draw) -> sums and counts over all devices."""

    def eval_step(variables: Any, data: Data, teacher_classes: Array | None, draw: EvaluationDraw) -> metrics.Sums:
        taught = None if teacher_classes is None else teacher_classes[draw.index]
        logits = apply(variables, pixels(data.images[draw.index])).logits
        return lax.psum(metrics.batch_sums(logits, data.labels[draw.index], draw.mask, taught), axis_name)

    return eval_step
