"""Evaluation as sums and counts: add them over batches and devices in any order, divide once."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from wdkd.errors import UsageError
from wdkd.result import Evaluation


@flax.struct.dataclass
class Sums:
    """What one batch, or any number of batches added up, contributes to an evaluation of C classes.

    Counts are int32 and exact; the confidence sum is float32. Every leaf may be psum-ed.
    """

    count: jax.Array
    """(), images with mask 1."""
    correct: jax.Array
    """(), images whose largest logit is the label's."""
    agree: jax.Array
    """(), images on which student and teacher name the same class; 0 without a teacher."""
    teacher_correct: jax.Array
    """(), images whose largest logit is the label's for the teacher; 0 without one."""
    confusion: jax.Array
    """(C, C), images of class i (row) called j (column)."""
    bin_count: jax.Array
    """(bins,), images whose confidence falls in each bin."""
    bin_confidence: jax.Array
    """(bins,), float32, their summed confidence."""
    bin_correct: jax.Array
    """(bins,), how many of them are correct."""


def confidence_bins(confidence: jax.Array, bins: int) -> jax.Array:
    """Index of the equal-width bin ((m-1)/bins, m/bins] that holds each confidence (Guo et al. 2017).

    Args: confidence (B,) in [0, 1]. Returns (B,) int32 in [0, bins); a confidence of 0 goes to the first bin.
    """
    return jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)


def batch_sums(
    student_logits: jax.Array, labels: jax.Array, mask: jax.Array, teacher_classes: jax.Array | None = None, bins: int = 15
) -> Sums:
    """Sums and counts over the images of a batch whose mask is not 0; the others may hold anything, NaN too.

    Args: student_logits (B, C); labels (B,) int in [0, C); mask (B,) bool or 0/1; teacher_classes (B,) int, what the teacher
    calls them, or None; bins of the calibration error. Returns Sums. Ties between logits go to the lower class, as in argmax.
    """
    classes = student_logits.shape[-1]
    real = mask.astype(bool)
    logits = jnp.where(real[:, None], student_logits.astype(jnp.float32), 0.0)
    # A negative index would wrap around to the last class; one past the end is dropped, and `summarize` notices.
    labels = jnp.where(labels < 0, classes, labels)
    one = real.astype(jnp.int32)
    predicted = jnp.argmax(logits, axis=-1)
    confidence = jnp.where(real, jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1), 0.0)
    right = jnp.where(predicted == labels, one, 0)
    named = jnp.full_like(predicted, -1) if teacher_classes is None else teacher_classes
    agree = jnp.where(predicted == named, one, 0)
    where = confidence_bins(confidence, bins)
    return Sums(
        count=one.sum(dtype=jnp.int32),
        correct=right.sum(dtype=jnp.int32),
        agree=agree.sum(dtype=jnp.int32),
        teacher_correct=jnp.where(named == labels, one, 0).sum(dtype=jnp.int32),
        confusion=jnp.zeros((classes, classes), jnp.int32).at[labels, predicted].add(one),
        bin_count=jnp.zeros(bins, jnp.int32).at[where].add(one),
        bin_confidence=jnp.zeros(bins, jnp.float32).at[where].add(confidence),
        bin_correct=jnp.zeros(bins, jnp.int32).at[where].add(right),
    )


def add(a: Sums, b: Sums) -> Sums:
    """The sums of the two sets of images together."""
    return jax.tree.map(jnp.add, a, b)


def calibration_error(sums: Sums) -> float:
    """ECE = sum_b n_b/n |acc_b - conf_b| (Guo et al. 2017), a fraction in [0, 1].

    n_b/n (correct_b/n_b - confidence_b/n_b) is (correct_b - confidence_b)/n, so empty bins need no special case.
    """
    correct, confidence = np.asarray(sums.bin_correct, np.float64), np.asarray(sums.bin_confidence, np.float64)
    return float(np.abs(correct - confidence).sum() / int(sums.count))


def summarize(sums: Sums, split: str, class_names: Sequence[str], with_teacher: bool, labelled: bool = True) -> Evaluation:
    """Divides, once, what was summed over a whole split.

    Args: sums over the split, on the host or addressable from it; class_names, C of them. Returns an Evaluation in
    fractions; agreement is None unless with_teacher. A class without images has accuracy 0.0, which is valid JSON where
    NaN is not; its row of `confusion` is all zeros, and that tells it from a class that was always missed. Unless `labelled`,
    nothing but agreement is known.
    Raises UsageError when there is no image, class_names do not fit, labels were out of range, or outputs not finite.
    """
    count, confusion = int(sums.count), np.asarray(sums.confusion)
    if count == 0:
        raise UsageError(f"the {split} split has 0 images to evaluate; it must have at least 1, so choose another split")
    if len(class_names) != len(confusion):
        raise UsageError(
            f"the data set has {len(class_names)} classes but the network {len(confusion)} outputs; evaluate on its own data set"
        )
    if labelled and confusion.sum() != count:
        raise UsageError(
            f"{count - confusion.sum()} labels of the {split} split are outside [0, {len(confusion)}); evaluate on its own data set"
        )
    ece = calibration_error(sums)
    if not np.isfinite(ece):
        raise UsageError(
            f"the network's outputs on the {split} split are not finite (confidence is NaN); lower the learning rate and train again"
        )
    agreement = int(sums.agree) / count if with_teacher else None
    if not labelled:
        if agreement is None:
            raise UsageError(f"the {split} images have no labels, so agreement with a teacher is all that can be measured; give --teacher")
        return Evaluation(split, count, None, None, agreement, [], [], list(class_names))
    return Evaluation(
        split=split,
        count=count,
        accuracy=int(sums.correct) / count,
        ece=ece,
        agreement=agreement,
        per_class_accuracy=[float(right / max(total, 1)) for right, total in zip(np.diag(confusion), confusion.sum(axis=1), strict=True)],
        confusion=confusion.tolist(),
        class_names=list(class_names),
        teacher_accuracy=int(sums.teacher_correct) / count if with_teacher else None,
    )
