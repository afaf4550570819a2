"""(labels, n_per_class, seed) -> indices: which training images a student gets to see. NumPy only."""

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from wdkd.errors import UsageError

_FEW_SHOT, _VALIDATION = 0, 1
"""First word of the entropy of each kind of draw, so that no seed makes one kind repeat the other."""


def few_shot_indices(labels: np.ndarray, n_per_class: int | None, seed: int, *, num_classes: int | None = None) -> np.ndarray:
    """Draws exactly n_per_class images of each class.

    Nested: for one seed, the subset for n is contained in the subset for every larger n. The draw depends on the labels
    and the seed, and on nothing else.

    Args:
        labels: integers (N,), class of each image, 0 to num_classes - 1.
        n_per_class: images per class; None for all N.
        seed: which draw; at least 0.
        num_classes: number of classes; None: the largest label plus one.

    Returns:
        int64 (n_per_class * num_classes,), sorted indices into labels; (N,) for None.

    Raises:
        UsageError: labels are not 1-D integers, a class has no image or fewer than n_per_class, n_per_class < 1, seed < 0.
    """
    labels, counts = _counted(labels, num_classes)
    if not _is_int(seed) or seed < 0:
        raise UsageError(f"seed is {seed!r}; it must be an integer, at least 0")
    if n_per_class is None:
        return np.arange(len(labels), dtype=np.int64)
    if not _is_int(n_per_class) or n_per_class < 1:
        raise UsageError(f"n_per_class is {n_per_class!r}; it must be an integer, at least 1, or None for all images")
    smallest = int(counts.argmin())
    if n_per_class > counts[smallest]:
        raise UsageError(
            f"n_per_class is {n_per_class}, but class {smallest} has only {counts[smallest]} training images left after validation; "
            f"use at most {counts[smallest]}, or none for all images"
        )
    chosen = [_shuffled(labels, label, (_FEW_SHOT, int(seed), label))[:n_per_class] for label in range(len(counts))]
    return np.sort(np.concatenate(chosen))


def validation_split(labels: np.ndarray, size: int, *, num_classes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sets images aside for validation: the same ones always, with equal numbers of each class.

    Where the number of classes does not divide size, the first classes give one image more.

    Args:
        labels: integers (N,), class of each image, 0 to num_classes - 1.
        size: images to set aside; 0 for none.
        num_classes: number of classes; None: the largest label plus one.

    Returns:
        (train_indices (N - size,), validation_indices (size,)), both int64, sorted, disjoint, together all of 0 to N - 1.

    Raises:
        UsageError: labels are not 1-D integers, size < 0, or a class would have no image on one of the two sides.
    """
    labels, counts = _counted(labels, num_classes)
    classes = len(counts)
    if not _is_int(size) or size < 0:
        raise UsageError(f"validation_size is {size!r}; it must be an integer, at least 0")
    if 0 < size < classes:
        raise UsageError(f"validation_size is {size}, which leaves some of the {classes} classes out; use 0, or at least {classes}")
    quotas = [size // classes + (label < size % classes) for label in range(classes)]
    for label, quota in enumerate(quotas):
        if quota >= counts[label]:
            raise UsageError(
                f"validation_size is {size}, which takes {quota} images of each class, but class {label} has only {counts[label]} "
                f"and must keep one; use at most {classes * (int(counts.min()) - 1)}"
            )
    chosen = [_shuffled(labels, label, (_VALIDATION, label))[:quota] for label, quota in enumerate(quotas)]
    validation = np.sort(np.concatenate(chosen))
    return np.delete(np.arange(len(labels), dtype=np.int64), validation), validation


def held_out(names: Sequence[str], labels: np.ndarray, share: float) -> np.ndarray:
    """Which images are held out for evaluation: about `share` of each class, by a hash of each name.

    Adding or removing images moves no other, and names decide alone, but for a class of which that would leave one side empty:
    then its image with the smallest hash is held out, or the one with the largest is not.

    Args:
        names: of the N images, equal ones where they are equal in Unicode's NFC.
        labels: integers (N,), class of each image.
        share: above 0 and below 1.

    Returns:
        bool (N,), True on what is held out; a class of one image has none.
    """
    hashes = [hashlib.sha256(unicodedata.normalize("NFC", name).encode(errors="surrogateescape")).digest()[:8] for name in names]
    places = np.array([int.from_bytes(digest, "big") for digest in hashes], np.float64) / 2**64
    chosen = places < share
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(places[members], kind="stable")]
        if len(members) > 1:
            chosen[members[0]], chosen[members[-1]] = True, False
    return chosen & (np.bincount(labels - labels.min())[labels - labels.min()] > 1)


def subset_hash(indices: np.ndarray) -> str:
    """SHA-256 (64 hexadecimal digits) of the indices (n,) as little-endian int64 bytes, in the order given."""
    return hashlib.sha256(np.asarray(indices).astype("<i8").tobytes()).hexdigest()


def _shuffled(labels: np.ndarray, label: int, entropy: tuple[int, ...]) -> np.ndarray:
    """The indices of one class in an order that the entropy decides; int64 (count,)."""
    members = np.flatnonzero(labels == label).astype(np.int64)
    # NumPy may change what Generator.permutation draws (NEP 19), but not a bit generator's stream: results must stay comparable.
    keys = np.random.PCG64(entropy).random_raw(len(members))
    return members[np.argsort(keys, kind="stable")]


def _counted(labels: np.ndarray, num_classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N,), images per class (num_classes,)), once the labels are found to be good."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.size == 0:
        raise UsageError(f"labels have shape {labels.shape} and type {labels.dtype}; they must be integers in one dimension, at least one")
    if labels.min() < 0:
        raise UsageError(f"labels contain {labels.min()}; they must be at least 0: leave images without a class out")
    if num_classes is not None and labels.max() >= num_classes:
        raise UsageError(f"labels contain {labels.max()}, but there are {num_classes} classes; labels must be below that")
    counts = np.bincount(labels, minlength=num_classes or 0)
    if not counts.all():
        raise UsageError(f"class {counts.argmin()} of {len(counts)} has no images; number the classes from 0 without gaps")
    return labels, counts


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
