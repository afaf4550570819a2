"""Which images are seen when: a function of (seed, step) alone, so that a resumed run goes on exactly and devices do not matter."""

import functools
from collections.abc import Iterator

import numpy as np

ORDER, PARTNER = 0, 1


def batch_indices(size: int, batch_size: int, seed: int, step: int, purpose: int = ORDER) -> np.ndarray:
    """Indices (batch_size,) int32 into `size` images for one step, counted from 0.

    The batches of successive steps run through one epoch order after the other, each drawn from (seed, purpose, epoch); a
    batch may span epochs, so every image is seen equally often whatever the batch size.
    """
    epochs, offsets = _positions(size, batch_size, step)
    indices = np.empty(batch_size, np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch_order(size, seed, purpose, int(epoch))[offsets[here]]
    return indices


def batch_views(size: int, batch_size: int, views: int, step: int) -> np.ndarray:
    """Which of its fixed views each image of a step is seen in, (batch_size,) int32: one after the other, epoch by epoch."""
    epochs, _ = _positions(size, batch_size, step)
    return (epochs % views).astype(np.int32)


@functools.lru_cache(maxsize=4)
def fixed_partners(size: int, views: int, seed: int) -> np.ndarray:
    """The image that each fixed view is blended with, (size, views) int32, each drawn from (seed, image, view)."""
    columns = [np.random.default_rng([seed, PARTNER, view]).integers(size, size=size, dtype=np.int32) for view in range(views)]
    return np.stack(columns, axis=1)


def _positions(size: int, batch_size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, place in the epoch's order) of each image of a step."""
    return np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), size)


@functools.lru_cache(maxsize=8)
def _epoch_order(size: int, seed: int, purpose: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, purpose, epoch]).permutation(size)


def evaluation_batches(size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices, mask), each (batch_size,), that cover 0..size-1 once; padding has index 0 and mask False."""
    for start in range(0, size, batch_size):
        positions = np.arange(start, start + batch_size)
        mask = positions < size
        yield np.where(mask, positions, 0).astype(np.int32), mask
