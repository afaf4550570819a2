"""The order of the images: a function of (seed, step) alone that shows every image equally often."""

import numpy as np
import pytest

from wdkd.batches import ORDER, PARTNER, batch_indices, batch_views, evaluation_batches, fixed_partners

SIZE_AND_BATCH = pytest.mark.parametrize(("size", "batch"), [(12, 4), (7, 3), (5, 5), (4, 10), (3, 7), (1, 3), (10, 1)])


def stream(size, batch, seed, purpose=ORDER, epochs=4):
    """The indices of the first steps in a row, whole epochs of them."""
    steps = -(-size * epochs // batch)
    return np.concatenate([batch_indices(size, batch, seed, step, purpose) for step in range(steps)])[: size * epochs].reshape(epochs, size)


@SIZE_AND_BATCH
@pytest.mark.parametrize("purpose", [ORDER, PARTNER])
def test_every_epoch_has_every_image_once(size, batch, purpose):
    epochs = stream(size, batch, 0, purpose)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))


@SIZE_AND_BATCH
def test_batch_has_its_size_and_the_images_do_not_depend_on_it(size, batch):
    first = batch_indices(size, batch, 1, 5)
    assert first.shape == (batch,) and first.dtype == np.int32
    np.testing.assert_array_equal(stream(size, batch, 1), stream(size, 1, 1))


def test_a_step_needs_no_history():
    forwards = [batch_indices(20, 6, 3, step) for step in range(50)]
    backwards = [batch_indices(20, 6, 3, step) for step in reversed(range(50))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert batch_indices(20, 6, 3, 10**9).max() < 20


def test_a_caller_may_write_into_what_it_gets():
    before = batch_indices(8, 8, 0, 0)
    expected = before.copy()
    before[:] = 0
    np.testing.assert_array_equal(batch_indices(8, 8, 0, 0), expected)


def test_epochs_seeds_and_purposes_have_orders_of_their_own():
    orders = [tuple(order) for seed in range(4) for purpose in (ORDER, PARTNER) for order in stream(50, 10, seed, purpose)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


def test_partners_are_all_images_equally_often():
    """Over many epochs an image is paired with each image, itself too, about as often."""
    size, epochs = 5, 2000
    counts = np.zeros((size, size))
    np.add.at(counts, (stream(size, 10, 0, ORDER, epochs).ravel(), stream(size, 10, 0, PARTNER, epochs).ravel()), 1)
    expected = epochs / size
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@SIZE_AND_BATCH
@pytest.mark.parametrize("views", [1, 3])
def test_every_image_is_seen_in_each_of_its_views_in_turn(size, batch, views):
    epochs = 2 * views
    steps = range(-(-size * epochs // batch))
    seen = [
        np.concatenate([draw(step) for step in steps])[: size * epochs]
        for draw in (
            lambda step: batch_indices(size, batch, 2, step),
            lambda step: batch_views(size, batch, views, step),
        )
    ]
    assert seen[1].dtype == np.int32
    for image in range(size):
        np.testing.assert_array_equal(seen[1][seen[0] == image], [*range(views), *range(views)])


def test_the_partner_of_a_fixed_view_depends_on_seed_image_and_view_alone():
    few, many = fixed_partners(40, 2, 5), fixed_partners(40, 6, 5)
    np.testing.assert_array_equal(few, many[:, :2])
    assert many.dtype == np.int32 and many.min() >= 0 and many.max() < 40
    assert len({tuple(column) for column in many.T}) == 6
    assert (fixed_partners(40, 6, 6) != many).mean() > 0.9


@SIZE_AND_BATCH
def test_evaluation_covers_everything_once(size, batch):
    batches = list(evaluation_batches(size, batch))
    assert len(batches) == -(-size // batch)
    seen = [index for indices, mask in batches for index in indices[mask]]
    assert seen == list(range(size))
    for indices, mask in batches:
        assert indices.shape == mask.shape == (batch,) and indices.dtype == np.int32 and mask.dtype == bool
        assert not indices[~mask].any()


def test_evaluation_of_nothing_has_no_batches():
    assert list(evaluation_batches(0, 4)) == []
