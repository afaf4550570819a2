"""Whether a teacher from elsewhere is what it is taken for: looked at on some of the training images, before anything is trained."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from scipy.special import bdtrc

from wdkd import metrics
from wdkd.config import TeacherInputConfig
from wdkd.data import Split
from wdkd.errors import UsageError
from wdkd.input_gradients import value_and_input_gradient
from wdkd.steps import pixels
from wdkd.teacher import Teacher
from wdkd.teacher_input import check_outputs
from wdkd.wording import shown

MOST_IMAGES = 256
GRADIENT_IMAGES = 8
BATCH = 32
ABOVE_CHANCE = 0.01
"""A teacher is at chance where guessing would be as often right with more than this probability."""
FAR_HIGHER = 0.3
"""How much accuracy another reading must add to be named as what was meant."""

Rebuild = Callable[[TeacherInputConfig], Teacher]


def check_teacher(
    teacher: Teacher, split: Split, options: TeacherInputConfig, rebuild: Rebuild | None, *, needs_gradients: bool = True
) -> str:
    """What was found on at most `MOST_IMAGES` of the split's training images, in a line for the user.

    Args:
      options: how the teacher was read.
      rebuild: reads it with other options; None where its outputs alone are known.
      needs_gradients: whether the run takes input gradients through the teacher.

    Raises:
      UsageError: if the outputs have another shape, are not finite, or are not of the kind that `options` says, if input gradients
        that the run needs are not finite, or if the teacher is at chance: with the likely cause, found by trying.
    """
    chosen = np.linspace(0, len(split.train_labels) - 1, min(MOST_IMAGES, len(split.train_labels))).round().astype(int)
    images, labels = split.train_images[chosen], split.train_labels[chosen]
    logits = teacher.outputs[chosen] if teacher.apply is None else run(teacher, images)
    check_outputs(logits.shape, len(images), split.num_classes, shown(teacher.path))
    _check_values(logits, options, teacher)
    said = [f"teacher {shown(teacher.path)} on {len(images)} training images"]
    labelled = labels >= 0
    if labelled.any():
        accuracy = accuracy_of(logits[labelled], labels[labelled])
        if at_chance(logits[labelled], labels[labelled]):
            where = f"teacher {shown(teacher.path)} is at chance: accuracy {accuracy:.2%} on {labelled.sum()} training images"
            cause = find_cause(images[labelled], labels[labelled], logits[labelled], split.class_names, options, rebuild)
            raise UsageError(f"{where}; {cause}")
        said.append(f"accuracy {accuracy:.2%}, ECE {calibration(logits[labelled], labels[labelled]):.3f}")
    if teacher.apply is None:
        said.append(
            "its outputs alone are known, so through_teacher is False: they are constants, and one view of each image is trained on"
        )
    else:
        norm = _gradient_norm(teacher, images[:GRADIENT_IMAGES])
        if needs_gradients and not np.isfinite(norm):
            raise UsageError(
                f"teacher {shown(teacher.path)}: its input gradients are not finite on training images; "
                "use --method.name kd, --method.through-teacher False or another teacher"
            )
        said.append(f"input gradients finite, norms about {norm:.2g}" if np.isfinite(norm) else "input gradients not finite, nor needed")
    return f"{said[0]}: {'; '.join(said[1:])}"


def run(teacher: Teacher, images: np.ndarray) -> np.ndarray:
    """Logits (n, classes) for images uint8 (n, H, W, C)."""
    apply = jax.jit(lambda variables, x: teacher.apply(variables, pixels(x)).logits)
    padded = np.concatenate([images, np.zeros((-len(images) % BATCH, *images.shape[1:]), images.dtype)])
    parts = [np.asarray(apply(teacher.variables, padded[i : i + BATCH])) for i in range(0, len(padded), BATCH)]
    return np.concatenate(parts)[: len(images)]


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(1) == labels).mean())


def calibration(logits: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error (see `metrics.calibration_error`)."""
    return metrics.calibration_error(metrics.batch_sums(logits, labels, np.ones(len(labels), bool)))


def at_chance(logits: np.ndarray, labels: np.ndarray) -> bool:
    """Whether naming the most frequent class, or any at random, would be as often right.

    False where so few images can tell nothing: even all right would not be above chance.
    """
    chance = max(1 / logits.shape[1], np.bincount(labels).max() / len(labels))
    # bdtrc(k, n, p) is the probability of more than k successes in n trials.
    if bdtrc(len(labels) - 1, len(labels), chance) > ABOVE_CHANCE:
        return False
    right = int((logits.argmax(1) == labels).sum())
    return bool(bdtrc(right - 1, len(labels), chance) > ABOVE_CHANCE)


def _check_values(logits: np.ndarray, options: TeacherInputConfig, teacher: Teacher) -> None:
    where = f"teacher {shown(teacher.path)}"
    finite = np.isfinite(logits).all(1)
    if not finite.all():
        raise UsageError(
            f"{where} gives outputs that are not finite for {(~finite).sum()} of {len(finite)} training images; check its input"
        )
    if teacher.apply is None:
        return
    if options.outputs == "logits" and (logits >= 0).all() and np.abs(logits.sum(1) - 1).max() < 1e-3:
        raise UsageError(f"{where} gives probabilities: all are at least 0 and sum to 1; use --teacher-input.outputs probabilities")
    if options.outputs == "probabilities" and np.abs(np.exp(logits).sum(1) - 1).max() > 1e-2:
        sums = np.exp(logits).sum(1)
        raise UsageError(
            f"{where} gives no probabilities: they sum to {sums.min():.3g} to {sums.max():.3g}; use --teacher-input.outputs logits"
        )


def _gradient_norm(teacher: Teacher, images: np.ndarray) -> float:
    """Mean L2 norm of the input gradient of a random mix of the logits; not finite where one of them is not."""
    mix = np.random.default_rng(0).normal(size=teacher.classes).astype(np.float32)
    mix /= np.linalg.norm(mix)

    def gradients(variables, x):
        return value_and_input_gradient(lambda x: teacher.apply(variables, x).logits @ mix, x)[1]

    found = np.asarray(jax.jit(gradients)(teacher.variables, pixels(images)))
    return float(np.sqrt(np.square(found).sum((1, 2, 3))).mean())


# --- why it is at chance ----------------------------------------------------------------------------------------------------


def find_cause(
    images: np.ndarray, labels: np.ndarray, logits: np.ndarray, names: Sequence[str], options: TeacherInputConfig, rebuild: Rebuild | None
) -> str:
    """The likely cause in words: the first other reading of the teacher with far higher accuracy, and the options for it."""
    here = accuracy_of(logits, labels)
    if cause := _other_order(logits, labels, names, here):
        return cause
    for what, other in [] if rebuild is None else other_readings(options, images):
        try:
            found = run(rebuild(other), images)
        except UsageError:  # It does not take images in this way at all.
            continue
        if accuracy_of(found, labels) >= here + FAR_HIGHER:
            return f"likely cause: {what}; with {flags(options, other)} its accuracy is {accuracy_of(found, labels):.2%}"
        if cause := _other_order(found, labels, names, here):
            return f"likely causes: {what} ({flags(options, other)}), and {cause.removeprefix('likely cause: ')}"
    tried = "other orders of the classes" if rebuild is None else "other layouts, scalings, orders of colours and of classes"
    rest = "are its rows those of these images?" if rebuild is None else "was it trained on these classes?"
    return f"{tried} were tried and none is far better: {rest}"


def _other_order(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], here: float) -> str | None:
    """The order of classes that fits best, where it is far better: an assignment of outputs to labels."""
    from scipy.optimize import linear_sum_assignment  # Slow to import, and for a teacher at chance alone.

    classes = len(names)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, logits.argmax(1)), 1)
    ours, theirs = linear_sum_assignment(confusion, maximize=True)
    accuracy = confusion[ours, theirs].sum() / len(labels)
    # With hardly more images than classes some order always fits.
    if accuracy < max(here + FAR_HIGHER, 0.5) or len(labels) < 3 * classes:
        return None
    order = [names[i] for i in ours[np.argsort(theirs)]]
    alphabetical = ", which is alphabetical," if order == sorted(names) else ""
    listed = shown(" ".join(order), 400)
    return (
        f"likely cause: another order of the classes; in the order {listed}{alphabetical} its accuracy is {accuracy:.2%}: "
        "give that to --teacher-input.classes"
    )


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {"mean": (103.939, 116.779, 123.68), "std": None}
"""Of BGR pixels from 0 to 255."""


def other_readings(options: TeacherInputConfig, images: np.ndarray) -> Iterator[tuple[str, TeacherInputConfig]]:
    """(in which it differs, options) of the usual ways to give images to a network, the most frequent mistakes first."""
    values = images.reshape(-1, images.shape[-1]) / 255
    own = {"mean": tuple(values.mean(0).round(4).tolist()), "std": tuple(values.std(0).clip(1e-3).round(4).tolist())}
    plain, half = {"mean": None, "std": None}, {"mean": (0.5,), "std": (0.5,)}
    scalings = [
        *({"value_range": "0-1"} | statistics for statistics in (IMAGENET, half, own, plain)),
        {"value_range": "0-255"} | plain,
        {"value_range": "0-255", "channels": "bgr"} | CAFFE,
    ]
    kept = {name: getattr(options, name) for name in ("value_range", "mean", "std")}
    layouts = sorted(("nchw", "nhwc"), key=lambda name: name != options.layout)
    colours = sorted(("rgb", "bgr"), key=lambda name: name != options.channels)
    # One thing at a time comes before two.
    combined = list(itertools.product((kept, *scalings), colours, layouts))
    for scaling, colour, layout in sorted(combined, key=lambda c: (c[0] != kept) + (c[1] != options.channels) + (c[2] != options.layout)):
        other = dataclasses.replace(options, **{"channels": colour, "layout": layout} | scaling)
        changed = [
            "layout" if other.layout != options.layout else "",
            "order of colours" if other.channels != options.channels else "",
            "scaling" if any(getattr(other, name) != value for name, value in kept.items()) else "",
        ]
        if any(changed):
            yield " and ".join(filter(None, changed)), other


def flags(options: TeacherInputConfig, other: TeacherInputConfig) -> str:
    """What to add to the command line to change the one into the other."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(other, field.name)
        if value != getattr(options, field.name):
            shown_value = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--teacher-input.{field.name.replace('_', '-')} {shown_value}")
    return " ".join(words)
