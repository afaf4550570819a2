"""Few-shot subsets are nested, balanced, repeatable and never touch the validation images."""

import hashlib
import itertools
import struct

import numpy as np
import pytest

from wdkd.errors import UsageError
from wdkd.subset import few_shot_indices, held_out, subset_hash, validation_split

COUNTS = (40, 25, 31, 60)
SIZES = (1, 2, 3, 7, 10, 24, 25)
FEW_SHOT_GOLDEN = [7, 8, 15, 19, 26, 30, 52, 54, 63, 71]
VALIDATION_GOLDEN = [3, 51, 52, 55, 56, 77, 84, 89, 90, 98]


@pytest.fixture
def labels():
    """Unevenly many of each of four classes, shuffled."""
    return np.random.default_rng(3).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS)).astype(np.int32)


@pytest.mark.parametrize("seed", range(5))
def test_a_subset_is_contained_in_every_larger_one(labels, seed):
    subsets = [set(few_shot_indices(labels, n, seed)) for n in (*SIZES, None)]
    for small, large in itertools.pairwise(subsets):
        assert small < large


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_a_subset_has_exactly_n_of_each_class_in_order(labels, n, seed):
    indices = few_shot_indices(labels, n, seed)
    assert indices.dtype == np.int64
    assert (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(np.bincount(labels[indices]), [n] * len(COUNTS))


def test_none_means_all(labels):
    np.testing.assert_array_equal(few_shot_indices(labels, None, 0), np.arange(sum(COUNTS)))


def test_draws_repeat_for_a_seed_and_differ_between_seeds(labels):
    draws = [tuple(few_shot_indices(labels, 5, seed)) for seed in range(50)]
    assert draws == [tuple(few_shot_indices(labels, 5, seed)) for seed in range(50)]
    assert len(set(draws)) == 50


def test_a_draw_ignores_numpys_global_state_and_the_type_of_the_labels(labels):
    np.random.seed(1)
    first = few_shot_indices(labels, 5, 0)
    np.random.seed(2)
    np.testing.assert_array_equal(few_shot_indices(labels.astype(np.uint8), np.int64(5), np.int64(0)), first)


def test_every_image_is_drawn_equally_often():
    labels = np.repeat(np.arange(2), 10)
    drawn = np.bincount(np.concatenate([few_shot_indices(labels, 3, seed) for seed in range(2000)]), minlength=20)
    # Binomial(2000, 0.3): mean 600, standard deviation 20.5.
    assert np.abs(drawn - 600).max() < 5 * 20.5


def test_draws_are_those_of_earlier_versions():
    """Published subsets must stay the same; a change here means that results are no longer comparable."""
    labels = np.arange(100) % 10
    assert few_shot_indices(labels, 1, 0).tolist() == FEW_SHOT_GOLDEN
    assert validation_split(labels, 10)[1].tolist() == VALIDATION_GOLDEN


@pytest.mark.parametrize("size", [0, 4, 5, 6, 7, 40, 41, 96])
def test_validation_is_balanced_disjoint_and_of_the_size_asked_for(labels, size):
    train, validation = validation_split(labels, size)
    assert train.dtype == validation.dtype == np.int64
    assert len(validation) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    counts = np.bincount(labels[validation], minlength=len(COUNTS))
    assert counts.max() - counts.min() <= 1


def test_validation_is_always_the_same_and_not_a_few_shot_draw(labels):
    validation = validation_split(labels, 40)[1]
    np.testing.assert_array_equal(validation_split(labels, 40)[1], validation)
    assert not any(np.array_equal(few_shot_indices(labels, 10, seed), validation) for seed in range(20))


@pytest.mark.parametrize("seed", range(20))
def test_no_subset_of_the_rest_contains_a_validation_image(labels, seed):
    train, validation = validation_split(labels, 40)
    for n in (1, 5, 15, None):
        subset = train[few_shot_indices(labels[train], n, seed)]
        assert not set(subset) & set(validation)


def test_hash_is_sha256_of_little_endian_int64():
    expected = hashlib.sha256(struct.pack("<3q", 1, 5, 300)).hexdigest()
    for dtype in ("<i8", ">i8", "int32", "uint16"):
        assert subset_hash(np.array([1, 5, 300], dtype)) == expected
    assert subset_hash(np.array([5, 1, 300])) != expected


def refused(function, *args, **kwargs):
    """The text of the UsageError that the call must raise, known to be one line."""
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("n", [0, -3, 1.5, True])
def test_bad_n_is_refused(labels, n):
    assert f"n_per_class is {n}; it must be an integer, at least 1" in refused(few_shot_indices, labels, n, 0)


def test_too_large_n_names_the_smallest_class(labels):
    text = refused(few_shot_indices, labels, 26, 0)
    assert "26" in text and "class 1 has only 25" in text and "use at most 25" in text


def test_a_missing_class_is_named():
    assert "class 1 of 3 has no images" in refused(few_shot_indices, np.array([0, 2, 0, 2]), 1, 0)
    assert "class 3 of 4 has no images" in refused(few_shot_indices, np.array([0, 1, 2]), 1, 0, num_classes=4)
    assert "class 3 of 4 has no images" in refused(validation_split, np.array([0, 1, 2] * 3), 4, num_classes=4)


@pytest.mark.parametrize("labels", [np.zeros((3, 2), int), np.array([0.0, 1.0]), np.array([], int), np.array(["a"]), np.int64(3)])
def test_labels_of_another_kind_are_refused(labels):
    for function, args in ((few_shot_indices, (1, 0)), (validation_split, (0,))):
        text = refused(function, labels, *args)
        assert str(np.asarray(labels).shape) in text and "integers in one dimension" in text


def test_labels_out_of_range_are_refused():
    assert "-1" in refused(few_shot_indices, np.array([0, -1]), 1, 0)
    assert "there are 2 classes" in refused(few_shot_indices, np.array([0, 1, 2]), 1, 0, num_classes=2)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_bad_seeds_are_refused(labels, seed):
    assert f"seed is {seed}" in refused(few_shot_indices, labels, 1, seed)


@pytest.mark.parametrize("size", [-1, 2.0])
def test_bad_validation_sizes_are_refused(labels, size):
    assert f"validation_size is {size}" in refused(validation_split, labels, size)


def test_a_validation_split_that_empties_a_class_is_refused(labels):
    assert "at least 4" in refused(validation_split, labels, 3)
    text = refused(validation_split, labels, 100)
    assert "class 1 has only 25" in text and "use at most 96" in text


# --- held_out -----------------------------------------------------------------------------------------------------------


def names_of(count, label):
    return [f"{label}/{number}.png" for number in range(count)]


def test_held_out_is_about_the_share_and_does_not_depend_on_the_other_images():
    names, labels = names_of(3000, 0) + names_of(3000, 1), np.repeat([0, 1], 3000)
    chosen = held_out(names, labels, 0.2)
    for label in (0, 1):  # Five deviations of a binomial.
        assert abs(chosen[labels == label].mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 3000)
    some = np.random.default_rng(0).permutation(6000)[:2000]
    np.testing.assert_array_equal(held_out([names[i] for i in some], labels[some], 0.2), chosen[some])
    assert (chosen <= held_out(names, labels, 0.3)).all()


def test_held_out_leaves_some_on_either_side():
    for count, share in ((2, 1e-9), (5, 1e-9), (2, 1 - 1e-9), (5, 1 - 1e-9)):
        chosen = held_out(names_of(count, 0) + names_of(count, 1), np.repeat([0, 1], count), share)
        assert all(0 < part.sum() < count for part in (chosen[:count], chosen[count:]))
    assert held_out(["a", "b/1", "b/2"], np.array([0, 1, 1]), 0.5)[0] == False  # noqa: E712


def test_held_out_takes_equal_spellings_for_equal_and_images_without_a_class():
    composed, decomposed = ["caf\u00e9", *names_of(50, 0)], ["cafe\u0301", *names_of(50, 0)]
    labels = np.full(51, -1)
    np.testing.assert_array_equal(held_out(composed, labels, 0.5), held_out(decomposed, labels, 0.5))
