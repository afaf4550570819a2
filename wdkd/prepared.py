"""Sets that TFDS has prepared on disk: finding, checking and decoding them, without tensorflow."""

import atexit
import contextlib
import dataclasses
import difflib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from wdkd.cache import cache_directory, publish, temporary_beside, warn_unwritable
from wdkd.datasets.digits import Digits
from wdkd.errors import UsageError, unknown

MAX_BYTES = 2**31
"""Decoded size above which a set is refused: all of it is kept in memory, and on the device."""
MIN_SIDE = 8
"""Smallest height and width, in pixels, that the networks' three stages can halve."""

_CHUNK = 500
_NAME = re.compile(r"[A-Za-z_]\w*(/[\w.\-]+)?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")

# Pillow is what the requirements ask for; that OpenCV would be faster is no news to the user.
logging.getLogger("absl").addFilter(lambda record: "OpenCV is not installed" not in record.getMessage())


def data_directory(data_dir: str | None) -> Path:
    """Where TFDS keeps prepared sets: the one given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


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
        with temporary_beside(final) as temporary:
            _prepare_digits(temporary)
            publish(temporary / "digits" / str(Digits.VERSION), final)
        return final
    except OSError as error:
        warn_unwritable(final, error)
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
class Layout:
    """What a decoded set must look like: the number of images in each split, their shape, and the number of classes."""

    train: int
    test: int
    image_shape: tuple[int, int, int]
    num_classes: int

    def expected(self, array: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of one of ARRAYS."""
        split, kind = array.split("_")
        count = getattr(self, split)
        return ((count, *self.image_shape), np.dtype(np.uint8)) if kind == "images" else ((count,), np.dtype(np.int32))


def layout_of(name: str, info: tfds.core.DatasetInfo) -> Layout:
    counts = {split: info.splits[split].num_examples for split in info.splits}
    for split in ("train", "test"):
        if not counts.get(split):
            raise UsageError(
                f"data set {name!r} has no {split!r} split, only {', '.join(counts) or 'none'}; choose a set with train and test"
            )
    height, width, *channels = info.features["image"].shape
    layout = Layout(counts["train"], counts["test"], (height, width, *(channels or [1])), info.features["label"].num_classes)
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


def decode(name: str, directory: Path, builder: tfds.core.DatasetBuilder, layout: Layout) -> dict[str, np.ndarray]:
    """Every image and label, in the order of the data sources; the keys are ARRAYS."""
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
