"""metrics against NumPy in double precision and scikit-learn, and under every way of cutting the set into batches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix

from wdkd import metrics
from wdkd.errors import UsageError

CLASSES = 5
NAMES = [f"class{i}" for i in range(CLASSES)]


def make(n=203, classes=CLASSES, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    student = rng.normal(size=(n, classes)).astype(np.float32) * 2
    student[np.arange(n), labels] += 1.5
    teacher = (student + rng.normal(size=(n, classes)) * 2).argmax(1)
    return student, labels, teacher


def reference_ece(logits, labels, bins=15):
    """The definition of Guo et al. 2017 word by word: a loop over bins of float64 softmax confidences."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    total = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def evaluate(student, labels, teacher=None, mask=None):
    mask = np.ones(len(labels), bool) if mask is None else mask
    return metrics.summarize(metrics.batch_sums(student, labels, mask, teacher), "test", NAMES, teacher is not None)


def test_against_sklearn_and_numpy():
    student, labels, teacher = make()
    result = evaluate(student, labels, teacher)
    predicted = student.argmax(axis=1)
    matrix = confusion_matrix(labels, predicted, labels=range(CLASSES))
    assert result.count == len(labels)
    assert result.accuracy == accuracy_score(labels, predicted)
    assert result.agreement == accuracy_score(teacher, predicted)
    assert np.array_equal(result.confusion, matrix)
    np.testing.assert_allclose(result.per_class_accuracy, matrix.diagonal() / matrix.sum(axis=1), rtol=1e-12)
    assert result.ece == pytest.approx(reference_ece(student, labels), abs=1e-6)
    assert 0.01 < result.ece < 0.5


def test_ece_of_a_calibrated_and_of_an_overconfident_network():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20000, CLASSES)).astype(np.float32)
    p = np.asarray(jax.nn.softmax(logits))
    labels = (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1)
    assert evaluate(logits, labels).ece < 0.015
    assert evaluate(logits * 5, labels).ece > 0.2


@pytest.mark.parametrize("garbage", [0.0, 1e30, np.nan, np.inf])
def test_masked_rows_count_for_nothing(garbage):
    student, labels, teacher = make(60)
    expected = evaluate(student[:41], labels[:41], teacher[:41])
    student[41:], teacher[41:], labels[41:] = garbage, 77, 3
    mask = np.arange(60) < 41
    got = evaluate(student, labels, teacher, mask)
    assert got == evaluate(student, labels, teacher, mask.astype(np.float32))
    assert (got.count, got.accuracy, got.agreement, got.confusion) == (41, expected.accuracy, expected.agreement, expected.confusion)
    assert got.ece == pytest.approx(expected.ece, abs=1e-7)
    labels[41:] = -1
    assert evaluate(student, labels, teacher, mask) == got


@pytest.mark.parametrize("sizes", [[203], [1, 202], [64, 64, 64, 11], [3, 100, 0, 100]])
def test_uneven_padded_batches_equal_one_batch(sizes):
    student, labels, teacher = make()
    step = jax.jit(metrics.batch_sums)
    whole = step(student, labels, np.ones(len(labels), bool), teacher)
    total, start = None, 0
    for size in sizes:
        rows = np.concatenate([np.arange(start, start + size), np.zeros(205 - size, int)])
        part = step(student[rows], labels[rows], np.arange(205) < size, teacher[rows])
        total, start = part if total is None else metrics.add(total, part), start + size
    for name in ("count", "correct", "agree", "confusion", "bin_count", "bin_correct"):
        assert getattr(total, name).dtype == jnp.int32
        assert np.array_equal(getattr(total, name), getattr(whole, name)), name
    np.testing.assert_allclose(total.bin_confidence, whole.bin_confidence, rtol=1e-6)


def test_sums_survive_a_collective():
    student, labels, teacher = make(200)
    cut = [a.reshape(4, 50, *a.shape[1:]) for a in (student, labels, np.ones(200, bool), teacher)]
    summed = jax.vmap(lambda *a: jax.lax.psum(metrics.batch_sums(*a), "d"), axis_name="d")(*cut)
    got = metrics.summarize(jax.tree.map(lambda x: x[0], summed), "test", NAMES, True)
    expected = evaluate(student, labels, teacher)
    assert (got.count, got.accuracy, got.agreement, got.confusion) == (200, expected.accuracy, expected.agreement, expected.confusion)


def test_bins_at_the_edges():
    confidence = jnp.array([0.0, 1e-9, 1 / 15, 1 / 15 + 1e-6, 0.5, 14 / 15 + 1e-6, 1.0])
    assert metrics.confidence_bins(confidence, 15).tolist() == [0, 0, 0, 1, 7, 14, 14]


def test_certain_network():
    """Confidence 1 in float32: right everywhere is perfectly calibrated, wrong everywhere is as bad as it gets."""
    labels = np.arange(10) % CLASSES
    certain = 1000.0 * np.eye(CLASSES, dtype=np.float32)[labels]
    assert (evaluate(certain, labels).accuracy, evaluate(certain, labels).ece) == (1.0, 0.0)
    wrong = evaluate(certain, (labels + 1) % CLASSES)
    assert (wrong.accuracy, wrong.ece, wrong.per_class_accuracy) == (0.0, 1.0, [0.0] * CLASSES)


def test_low_precision_logits_are_summed_in_float32():
    student, labels, _ = make()
    low = jnp.asarray(student, jnp.bfloat16)
    sums = metrics.batch_sums(low, labels, np.ones(len(labels), bool))
    assert sums.bin_confidence.dtype == jnp.float32
    assert metrics.calibration_error(sums) == pytest.approx(reference_ece(np.asarray(low, np.float32), labels), abs=1e-6)


def test_class_without_images_and_no_teacher_are_strict_json():
    student, labels, _ = make()
    keep = labels != 2
    result = evaluate(student[keep], labels[keep])
    assert result.agreement is None
    assert result.per_class_accuracy[2] == 0.0 and sum(result.confusion[2]) == 0
    json.dumps(vars(result), allow_nan=False)


def test_what_cannot_be_summarised_is_named():
    student, labels, _ = make(10)
    full = np.ones(10, bool)
    with pytest.raises(UsageError, match="0 images"):
        evaluate(student, labels, mask=~full)
    with pytest.raises(UsageError, match="5 outputs"):
        metrics.summarize(metrics.batch_sums(student, labels, full), "test", NAMES[:4], False)
    for outside in (CLASSES, -1):
        with pytest.raises(UsageError, match="1 labels .* outside"):
            evaluate(student, np.where(np.arange(10) == 4, outside, labels))
    with pytest.raises(UsageError, match="not finite"):
        evaluate(np.where(np.arange(10)[:, None] == 4, np.nan, student), labels)
