"""TFDS -> arrays -> few-shot split. Reads prepared sets without tensorflow, and keeps them decoded in a cache of ours."""

import atexit
import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from wdkd.config import DataConfig
from wdkd.datasets.digits import Digits
from wdkd.errors import UsageError, unknown
from wdkd.subset import few_shot_indices, subset_hash, validation_split

MAX_BYTES = 2**31
"""Decoded size above which a set is refused: all of it is kept in memory, and on the device."""
MIN_SIDE = 8
"""Smallest height and width, in pixels, that the networks' three stages can halve."""

_CHUNK = 500
_NAME = re.compile(r"[A-Za-z_]\w*(/[\w.\-]+)?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")

# Pillow is what the requirements ask for; that OpenCV would be faster is no news to the user.
logging.getLogger("absl").addFilter(lambda record: "OpenCV is not installed" not in record.getMessage())


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A whole image classification set in memory; index i of a split is record i of its TFDS data source."""

    name: str
    version: str
    class_names: tuple[str, ...]
    train_images: np.ndarray
    """uint8 (n, H, W, C)."""
    train_labels: np.ndarray
    """int32 (n,), from 0 to num_classes - 1."""
    test_images: np.ndarray
    """uint8 (m, H, W, C)."""
    test_labels: np.ndarray
    """int32 (m,)."""

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
    train_images: np.ndarray
    """uint8 (n, H, W, C)."""
    train_labels: np.ndarray
    """int32 (n,)."""
    train_indices: np.ndarray
    """int64 (n,), sorted: where the training images are in the data set's whole training split."""
    subset_hash: str
    """SHA-256 of train_indices."""
    evaluation_images: np.ndarray
    """uint8 (m, H, W, C)."""
    evaluation_labels: np.ndarray
    """int32 (m,)."""
    evaluation_split: str
    """test or validation."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train_images.shape[1:]


def load_dataset(config: DataConfig) -> Dataset:
    """Reads a prepared TFDS set, or the embedded digits, which are prepared here on first use.

    Images come as uint8 (n, H, W, C), labels as int32 (n,). The first call decodes and fills the cache below
    `cache_directory()`; later calls read that. A cache that cannot be written is done without.

    Raises:
        UsageError: the set is unknown, not prepared, damaged, not in a random-access format, or not an image classification
            set with `train` and `test` splits of images of one size, at least 8x8 pixels and at most 2 GiB in all.
    """
    directory = digits_directory() if config.name == "digits" else prepared_directory(config.name, data_directory(config.data_dir))
    builder = open_prepared(config.name, directory)
    layout = _layout(config.name, builder.info)
    cache = _array_directory(config.name, directory)
    arrays = _read_arrays(cache, layout)
    if arrays is None:
        arrays = _decode(config.name, directory, builder, layout)
        _write_arrays(cache, arrays)
    return Dataset(config.name, str(builder.info.version), tuple(builder.info.features["label"].names), **arrays)


def few_shot_split(dataset: Dataset, config: DataConfig, seed: int) -> Split:
    """Draws n_per_class images of each class from the training images that are not set aside for validation.

    Raises:
        UsageError: n_per_class or validation_size does not fit the data set, or there is no validation split to evaluate on.
    """
    kept, aside = validation_split(dataset.train_labels, config.validation_size, num_classes=dataset.num_classes)
    if config.evaluate_on == "validation" and not len(aside):
        raise UsageError("data.validation_size is 0; it must be above 0 to evaluate on validation")
    chosen = kept[few_shot_indices(dataset.train_labels[kept], config.n_per_class, seed, num_classes=dataset.num_classes)]
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


# --- where sets are ----------------------------------------------------------------------------------------------------


def data_directory(data_dir: str | None) -> Path:
    """Where TFDS keeps prepared sets: the one given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def cache_directory() -> Path:
    """Where this package keeps what it can make again: $WDKD_CACHE_DIR, else ~/.cache/wdkd."""
    return Path(os.environ.get("WDKD_CACHE_DIR") or "~/.cache/wdkd").expanduser()


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the newest prepared version of `name` (`set` or `set/configuration`), or None.

    Looks at the disk only: TFDS itself would go on to ask the network. Raises UsageError where a configuration must be named.
    """
    if not _NAME.fullmatch(name):
        raise unknown_dataset(name, data_dir)
    versions = _versions(data_dir / name)
    if versions:
        return versions[-1]
    configurations = sorted(f"{name}/{path.name}" for path in _folders(data_dir / name) if _versions(path))
    if configurations and "/" not in name:
        raise UsageError(f"data set {name!r} has configurations; name one of those in {data_dir}: {', '.join(configurations[:8])}")
    return None


def prepared_directory(name: str, data_dir: Path) -> Path:
    """As `find_prepared`, but raises UsageError where there is nothing, with the way to get it."""
    directory = find_prepared(name, data_dir)
    if directory is not None:
        return directory
    if name.split("/")[0] not in known_datasets():
        raise unknown_dataset(name, data_dir)
    raise UsageError(
        f"data set {name!r} is not prepared in {data_dir}; run python launch/prepare_data.py --name {name} --data-dir {data_dir}"
    )


def known_datasets() -> list[str]:
    """Names of the sets that TFDS has code for."""
    # Listing the community's sets would ask the network.
    return tfds.list_builders(with_community_datasets=False)


def unknown_dataset(name: str, data_dir: Path) -> UsageError:
    """The error for a name that is neither TFDS's nor a folder of data_dir, with a few near ones."""
    names = {*known_datasets(), *(path.name for path in _folders(data_dir) if _versions(path))}
    near = difflib.get_close_matches(name, sorted(names), n=5, cutoff=0.5)
    return unknown("data set", name, near or ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped"))


def digits_directory() -> Path:
    """The folder of the prepared digits, in the cache; prepared now if need be, which any number of processes may do at once."""
    final = cache_directory() / "tfds" / "digits" / str(Digits.VERSION)
    if _is_prepared(final):
        return final
    try:
        with _temporary_beside(final) as temporary:
            _prepare_digits(temporary)
            _publish(temporary / "digits" / str(Digits.VERSION), final)
        return final
    except OSError as error:
        _warn_unwritable(final, error)
    scratch = Path(tempfile.mkdtemp(prefix="wdkd-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _prepare_digits(scratch)
    return scratch / "digits" / str(Digits.VERSION)


def _prepare_digits(data_dir: Path) -> None:
    # TFDS announces every step on both streams; this is over in seconds.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Digits(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _folders(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except OSError:
        return []


def _versions(directory: Path) -> list[Path]:
    """Folders of prepared versions, oldest first. Unfinished ones have other names."""
    found = [path for path in _folders(directory) if _VERSION.fullmatch(path.name) and _is_prepared(path)]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def _is_prepared(directory: Path) -> bool:
    return (directory / "dataset_info.json").is_file()


# --- what sets must be like --------------------------------------------------------------------------------------------


def open_prepared(name: str, directory: Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared folder. Raises UsageError where it is damaged, or is not a set of images that can be read here."""
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # Damaged JSON surfaces as whatever protobuf and TFDS raise.
        raise _damaged(name, directory, error) from error
    check_features(name, builder.info)
    formats = builder.info.available_file_formats()
    if not formats & tfds.core.FileFormat.with_random_access():
        stored = ", ".join(sorted(f.value for f in formats)) or "an unknown format"
        raise UsageError(
            f"data set {name!r} in {directory} is stored as {stored}, which needs tensorflow to read; "
            f"move that folder away and run python launch/prepare_data.py --name {name}"
        )
    return builder


def check_features(name: str, info: tfds.core.DatasetInfo) -> None:
    """Raises UsageError unless the set has images of one size, at least 8x8, and one class for each."""
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    if "image" not in features or "label" not in features:
        raise UsageError(f"data set {name!r} has the features {', '.join(features) or 'none'}; it must have 'image' and 'label'")
    image, label = features["image"], features["label"]
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UsageError(
            f"data set {name!r} has {type(image).__name__} images and {type(label).__name__} labels; it must have Image and ClassLabel"
        )
    if None in image.shape or np.dtype(image.np_dtype) != np.uint8:
        raise UsageError(
            f"data set {name!r} has images of shape {image.shape} and type {image.np_dtype}; choose a set of uint8 images of one size"
        )
    if min(image.shape[:2]) < MIN_SIDE:
        raise UsageError(
            f"data set {name!r} has images of {_by(image.shape)}; they must be at least {MIN_SIDE}x{MIN_SIDE} pixels: choose another set"
        )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a decoded set must look like: the number of images in each split, their shape, and the number of classes."""

    train: int
    test: int
    image_shape: tuple[int, int, int]
    num_classes: int

    def expected(self, array: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of one of _ARRAYS."""
        split, kind = array.split("_")
        count = getattr(self, split)
        return ((count, *self.image_shape), np.dtype(np.uint8)) if kind == "images" else ((count,), np.dtype(np.int32))


def _layout(name: str, info: tfds.core.DatasetInfo) -> _Layout:
    counts = {split: info.splits[split].num_examples for split in info.splits}
    for split in ("train", "test"):
        if not counts.get(split):
            raise UsageError(
                f"data set {name!r} has no {split!r} split, only {', '.join(counts) or 'none'}; choose a set with train and test"
            )
    height, width, *channels = info.features["image"].shape
    layout = _Layout(counts["train"], counts["test"], (height, width, *(channels or [1])), info.features["label"].num_classes)
    size = (layout.train + layout.test) * int(np.prod(layout.image_shape))
    if size > MAX_BYTES:
        raise UsageError(
            f"data set {name!r} has {layout.train + layout.test} images of {_by(layout.image_shape)}, {size / 2**30:.1f} GiB decoded; "
            f"at most {MAX_BYTES / 2**30:.0f} GiB fit: choose a smaller set"
        )
    return layout


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _damaged(name: str, directory: Path, error: Exception) -> UsageError:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return UsageError(
        f"data set {name!r} in {directory} cannot be read ({text:.200}); "
        f"delete that folder and run python launch/prepare_data.py --name {name}"
    )


# --- decoding ----------------------------------------------------------------------------------------------------------


def _decode(name: str, directory: Path, builder: tfds.core.DatasetBuilder, layout: _Layout) -> dict[str, np.ndarray]:
    """Every image and label, in the order of the data sources; the keys are _ARRAYS."""
    arrays = {}
    for split in ("train", "test"):
        images = np.empty(*layout.expected(f"{split}_images"))
        labels = np.empty(*layout.expected(f"{split}_labels"))
        try:
            _decode_split(builder, split, images, labels)
        except Exception as error:  # Damage surfaces as whatever protobuf, array_record or Pillow raise.
            raise _damaged(name, directory, error) from error
        if labels.min() < 0 or labels.max() >= layout.num_classes:
            raise UsageError(
                f"data set {name!r} has labels from {labels.min()} to {labels.max()} in {split}; they must be below {layout.num_classes}"
            )
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return arrays


def _decode_split(builder: tfds.core.DatasetBuilder, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Fills images (n, H, W, C) and labels (n,) with a split's records. Raises ValueError where an image has another shape."""
    # Only these two features: others may not decode without tensorflow, and take time.
    features = tfds.features.FeaturesDict({name: builder.info.features[name] for name in ("image", "label")})
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    if len(source) != len(labels):
        raise ValueError(f"{len(source)} records in {split}, not {len(labels)}")
    console = Console(stderr=True)
    starts = range(0, len(labels), _CHUNK)
    for start in track(starts, f"decoding {builder.info.name} {split}", console=console, disable=not sys.stderr.isatty(), transient=True):
        stop = min(start + _CHUNK, len(labels))
        for index, record in enumerate(source.__getitems__(list(range(start, stop))), start):
            example = features.deserialize_example_np(record)
            image = example["image"]
            if image.size != images[index].size or image.shape[:2] != images.shape[1:3]:
                raise ValueError(f"image {index} of {split} is {_by(image.shape)}, not {_by(images.shape[1:])}")
            images[index], labels[index] = image.reshape(images.shape[1:]), example["label"]


# --- the cache of decoded arrays ---------------------------------------------------------------------------------------


def _array_directory(name: str, directory: Path) -> Path:
    """Where the decoded arrays of a prepared set belong."""
    digest = hashlib.sha256((directory / "dataset_info.json").read_bytes())
    digest.update(str(directory.resolve()).encode())
    # A set prepared again with other images can have the same description, to the byte.
    for path in sorted(directory.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return cache_directory() / "arrays" / f"{name.replace('/', '-')}-{directory.name}-{digest.hexdigest()[:16]}"


def _read_arrays(cache: Path, layout: _Layout) -> dict[str, np.ndarray] | None:
    """The arrays of a cache folder, or None where one is missing or is not what was written."""
    try:
        digests = json.loads((cache / "sha256.json").read_text())
        arrays = {name: np.load(cache / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
        intact = all((a.shape, a.dtype) == layout.expected(name) and _digest(a) == digests[name] for name, a in arrays.items())
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return arrays if intact else None


def _write_arrays(cache: Path, arrays: dict[str, np.ndarray]) -> None:
    """Puts the arrays where `_read_arrays` finds them, all at once; only warns where that is not possible."""
    try:
        with _temporary_beside(cache) as temporary:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            (temporary / "sha256.json").write_text(json.dumps({name: _digest(array) for name, array in arrays.items()}))
            shutil.rmtree(cache, ignore_errors=True)
            _publish(temporary, cache)
    except OSError as error:
        _warn_unwritable(cache, error)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


@contextlib.contextmanager
def _temporary_beside(final: Path) -> Iterator[Path]:
    """A new folder on the same file system as `final`, gone at the end unless it was renamed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=final.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder. If another process was faster, its folder stays: it has the same contents."""
    temporary.chmod(0o755)
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _warn_unwritable(path: Path, error: OSError) -> None:
    logging.getLogger(__name__).warning(
        "cannot keep a cache in %s (%s); set WDKD_CACHE_DIR to a folder that can be written", path.parent, error.strerror or error
    )
