"""TFDS -> arrays -> few-shot split. Reads prepared sets without tensorflow, and keeps them decoded in a cache of ours."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wdkd.arrays import read_array, write_array
from wdkd.cache import cache_directory, discard, publish, temporary_beside, warn_unwritable
from wdkd.config import DataConfig
from wdkd.contents import Facts
from wdkd.decoding import decode
from wdkd.errors import UsageError
from wdkd.files import read_json
from wdkd.notes import note
from wdkd.prepared import ARRAYS, Layout, data_directory, digits_directory, layout_of, open_prepared, prepared_directory
from wdkd.prepared_folder import check_options, prepare_folder
from wdkd.subset import few_shot_indices, subset_hash, validation_split
from wdkd.wording import shown

UNLABELLED = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A whole image classification set in memory; index i of a split is record i of its TFDS data source."""

    name: str
    version: str
    class_names: tuple[str, ...]
    """Empty where no image has a label."""
    train_images: np.ndarray
    """uint8 (n, H, W, C)."""
    train_labels: np.ndarray
    """int32 (n,), from 0 to num_classes - 1; or all UNLABELLED."""
    test_images: np.ndarray
    """uint8 (m, H, W, C)."""
    test_labels: np.ndarray
    """int32 (m,), as train_labels."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train_images.shape[1:]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """What one run trains on and what it is measured on."""

    name: str
    class_names: tuple[str, ...]
    """Empty where no image has a label and no teacher has said how many classes there are (`with_classes`)."""
    train_images: np.ndarray
    """uint8 (n, H, W, C)."""
    train_labels: np.ndarray
    """int32 (n,); all UNLABELLED where there are none."""
    train_indices: np.ndarray
    """int64 (n,), sorted: where the training images are in the data set's whole training split."""
    subset_hash: str
    """SHA-256 of train_indices."""
    evaluation_images: np.ndarray
    """uint8 (m, H, W, C)."""
    evaluation_labels: np.ndarray
    """int32 (m,); all UNLABELLED where there are none."""
    evaluation_split: str
    """test or validation."""

    @property
    def train_labelled(self) -> bool:
        """Whether the training images have labels."""
        return bool((self.train_labels != UNLABELLED).all())

    @property
    def evaluation_labelled(self) -> bool:
        """Whether the evaluation images have labels."""
        return bool((self.evaluation_labels != UNLABELLED).all())

    def with_classes(self, names: Sequence[str]) -> "Split":
        """Itself, with these names of classes where it has none."""
        return self if self.class_names else dataclasses.replace(self, class_names=tuple(names))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train_images.shape[1:]


def load_dataset(config: DataConfig) -> Dataset:
    """Reads a prepared TFDS set, or the embedded digits or a folder of images, which are prepared here on first use.

    Images come as uint8 (n, H, W, C), labels as int32 (n,). The first call decodes and fills the cache below
    `cache_directory()`; later calls read that. A cache that cannot be written is done without.

    Raises:
        UsageError: the set is unknown, not prepared, damaged, not in a random-access format, or not an image classification
            set with `train` and `test` splits of images of one size, at least 8x8 pixels and at most 2 GiB in all; or the folder is
            not as `folder.list_folder` and `contents.read_contents` want it, or too much of it cannot be read.
    """
    check_options(config)
    if config.folder is not None:
        return _load_folder(config)
    if config.name != "digits":
        return _load(config.name, prepared_directory(config.name, data_directory(config.data_dir)))
    return _load_made(config.name, digits_directory)


def _load_folder(config: DataConfig) -> Dataset:
    """A folder's images; where they have no labels, those are -1, and where nothing names classes there are no names."""
    facts: list[Facts] = []

    def make() -> Path:
        directory, found = prepare_folder(config)
        facts.append(found)
        return directory

    dataset = _load_made(config.dataset, make)
    changed = {}
    if not facts[-1].train_labelled:
        changed["train_labels"] = np.full_like(dataset.train_labels, UNLABELLED)
    if not facts[-1].test_labelled:
        changed |= {"test_labels": np.full_like(dataset.test_labels, UNLABELLED), "class_names": ()}
    return dataclasses.replace(dataset, **changed)


def _load_made(name: str, make: Callable[[], Path]) -> Dataset:
    """A set that `make` can prepare again, which it does where it is damaged."""
    directory = make()
    try:
        return _load(name, directory)
    except UsageError as error:
        note(f"the prepared {name} in {directory} are damaged ({shown(error.__cause__ or error, 120)}); they are made again")
        discard(directory)
        return _load(name, make())


def _load(name: str, directory: Path) -> Dataset:
    """The set that is prepared in a folder."""
    info = open_prepared(name, directory).info
    layout = layout_of(name, info)
    cache = _array_directory(name, directory)
    arrays = _read_arrays(cache, layout)
    if arrays is None:
        arrays = decode(name, directory, info, layout)
        _write_arrays(cache, arrays)
    return Dataset(name, str(info.version), tuple(info.features["label"].names), **arrays)


def few_shot_split(dataset: Dataset, config: DataConfig, seed: int) -> Split:
    """Draws n_per_class images of each class from the training images that are not set aside for validation.

    Raises:
        UsageError: n_per_class or validation_size does not fit the data set, or there is no validation split to evaluate on.
    """
    labels, classes = dataset.train_labels, dataset.num_classes
    if len(labels) and (labels == UNLABELLED).all():
        if config.n_per_class is not None:
            raise UsageError(
                f"data.n_per_class is {config.n_per_class}, but the training images of {dataset.name} have no classes; "
                "use --data.n-per-class None, for all of them"
            )
        labels, classes = np.zeros_like(labels), 1
    kept, aside = validation_split(labels, config.validation_size, num_classes=classes)
    if config.evaluate_on == "validation" and not len(aside):
        raise UsageError("data.validation_size is 0; it must be above 0 to evaluate on validation")
    chosen = kept[few_shot_indices(labels[kept], config.n_per_class, seed, num_classes=classes)]
    images, labels = dataset.test_images, dataset.test_labels
    if config.evaluate_on == "validation":
        images, labels = dataset.train_images[aside], dataset.train_labels[aside]
    return Split(
        name=dataset.name,
        class_names=dataset.class_names,
        train_images=dataset.train_images[chosen],
        train_labels=dataset.train_labels[chosen],
        train_indices=chosen,
        subset_hash=subset_hash(chosen),
        evaluation_images=images,
        evaluation_labels=labels,
        evaluation_split=config.evaluate_on,
    )


# --- the cache of decoded arrays ---------------------------------------------------------------------------------------


def _array_directory(name: str, directory: Path) -> Path:
    """Where the decoded arrays of a prepared set belong."""
    digest = hashlib.sha256((directory / "dataset_info.json").read_bytes())
    digest.update(os.fsencode(directory.resolve()))
    # A set prepared again with other images can have the same description, to the byte.
    for path in sorted(directory.iterdir()):
        if path.exists():
            digest.update(os.fsencode(path.name) + f" {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return cache_directory() / "arrays" / f"{name.replace('/', '-')}-{directory.name}-{digest.hexdigest()[:16]}"


def _read_arrays(cache: Path, layout: Layout) -> dict[str, np.ndarray] | None:
    """The arrays of a cache folder, or None where one is missing or is not what was written."""
    try:
        digests = read_json(cache / "sha256.json", 4096)
        arrays = {name: read_array(cache / f"{name}.npy", *layout.expected(name)) for name in ARRAYS}
        intact = all(_digest(array) == digests[name] for name, array in arrays.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return arrays if intact else None


def _write_arrays(cache: Path, arrays: dict[str, np.ndarray]) -> None:
    """Puts the arrays where `_read_arrays` finds them, all at once; only warns where that is not possible."""
    try:
        with temporary_beside(cache) as temporary:
            for name, array in arrays.items():
                write_array(temporary / f"{name}.npy", array)
            (temporary / "sha256.json").write_text(json.dumps({name: _digest(array) for name, array in arrays.items()}))
            discard(cache)
            publish(temporary, cache)
    except OSError as error:
        warn_unwritable(cache, error)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
