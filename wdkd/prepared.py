"""Sets that TFDS has prepared on disk: finding and checking them, without tensorflow."""

import atexit
import contextlib
import dataclasses
import difflib
import io
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from wdkd.cache import cache_directory, publish, temporary_beside, warn_unwritable
from wdkd.config import MIN_SIDE
from wdkd.datasets.digits import Digits
from wdkd.declaration import check_declaration
from wdkd.errors import UsageError, unknown
from wdkd.wording import shown

MAX_BYTES = 2**31
"""Decoded size above which a set is refused: all of it is kept in memory, and on the device."""
MAX_CLASSES = 2000
"""A result has a matrix of classes by classes."""

_NAME = re.compile(r"[A-Za-z_]\w{0,99}(/\w[\w.\-]{0,99})?", re.ASCII)
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")

# Pillow is what the requirements ask for; that OpenCV would be faster is no news to the user.
logging.getLogger("absl").addFilter(lambda record: "OpenCV is not installed" not in record.getMessage())


def data_directory(data_dir: str | None) -> Path:
    """Where TFDS keeps prepared sets: the one given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the newest prepared version of `name` (`set` or `set/configuration`), or None.

    Looks at the disk only: TFDS itself would go on to ask the network. Raises UsageError where a configuration must be named.
    """
    if not _NAME.fullmatch(name):
        raise unknown_dataset(name, data_dir)
    versions = _versions(data_dir / name)
    if versions:
        return versions[-1]
    inside = [f"{name}/{path.name}" for path in _folders(data_dir / name) if _versions(path)]
    configurations = sorted(found for found in inside if _NAME.fullmatch(found))
    if configurations and "/" not in name:
        names = ", ".join(configurations[:8])
        raise UsageError(f"data set {name!r} has configurations; name one of those in {shown(data_dir, 300)}: {names}")
    return None


def prepared_directory(name: str, data_dir: Path) -> Path:
    """As `find_prepared`, but raises UsageError where there is nothing, with the way to get it."""
    directory = find_prepared(name, data_dir)
    if directory is not None:
        return directory
    if name.split("/")[0] not in known_datasets():
        raise unknown_dataset(name, data_dir)
    raise UsageError(
        f"data set {name!r} is not prepared in {shown(data_dir, 300)}; "
        f"run python launch/prepare_data.py --name {name} --data-dir {shown(data_dir, 300)}"
    )


def known_datasets() -> list[str]:
    """Names of the sets that TFDS has code for."""
    # Listing the community's sets would ask the network.
    return tfds.list_builders(with_community_datasets=False)


def unknown_dataset(name: str, data_dir: Path) -> UsageError:
    """The error for a name that is neither TFDS's nor a folder of data_dir, with a few near ones."""
    found = [path.name for path in _folders(data_dir) if _NAME.fullmatch(path.name) and _versions(path)]
    near = difflib.get_close_matches(name[:200], sorted({*known_datasets(), *found}), n=5, cutoff=0.5)
    return unknown("data set", name, near or ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped"))


def digits_directory() -> Path:
    """The folder of the prepared digits, in the cache; prepared now if need be, which any number of processes may do at once."""
    final = cache_directory() / "tfds" / "digits" / str(Digits.VERSION)
    return final if is_prepared(final) else keep(final, write_digits)


def keep(final: Path, write: Callable[[Path], Path]) -> Path:
    """Has a set written and returns where it is: at `final`, in the cache, or where that cannot be written in a folder that ends with
    this process.

    Args:
      write: (new folder) -> the prepared folder that it has made in it.

    Raises:
      UsageError: if there is no room anywhere.
    """
    try:
        with temporary_beside(final) as temporary:
            publish(write(temporary), final)
        return final
    except Exception as error:  # A full disk surfaces as whatever TFDS and array_record raise.
        warn_unwritable(final, error)
    scratch = Path(tempfile.mkdtemp(prefix="wdkd-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    try:
        return write(scratch)
    except Exception as error:
        raise UsageError(f"cannot write {scratch}: {shown(error, 200)}; make room there, or set TMPDIR to a folder that has it") from error


def write_digits(data_dir: Path) -> Path:
    """The digits, prepared in a new folder."""
    return build(Digits(data_dir=data_dir, file_format="array_record"))


def build(builder: tfds.core.DatasetBuilder) -> Path:
    """Has a builder of ours write its set. Returns the folder."""
    # TFDS announces every step on both streams; this is over in seconds.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return Path(builder.data_dir)


def _folders(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if os.path.isdir(path)]
    except OSError:
        return []


def _versions(directory: Path) -> list[Path]:
    """Folders of prepared versions, oldest first. Unfinished ones have other names."""
    found = [path for path in _folders(directory) if _VERSION.fullmatch(path.name) and is_prepared(path)]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def is_prepared(directory: Path) -> bool:
    """Whether a folder is that of a prepared set."""
    return os.path.isfile(directory / "dataset_info.json")


# --- what sets must be like --------------------------------------------------------------------------------------------


def open_prepared(name: str, directory: Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared folder. Raises UsageError where it is damaged, or is not a set of images that can be read here."""
    try:
        check_declaration(directory)
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # Damaged JSON surfaces as whatever protobuf and TFDS raise.
        raise damaged(name, directory, error) from error
    check_features(name, builder.info)
    formats = builder.info.available_file_formats()
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        stored = ", ".join(sorted(f.value for f in formats)) or "an unknown format"
        raise UsageError(
            f"data set {name!r} in {shown(directory, 300)} is stored as {stored}, which needs tensorflow to read; "
            f"move that folder away and run python launch/prepare_data.py --name {name}"
        )
    return builder


def check_features(name: str, info: tfds.core.DatasetInfo) -> None:
    """Raises UsageError unless the set has images of one size, at least 8x8, and one class for each."""
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    if "image" not in features or "label" not in features:
        raise UsageError(f"data set {name!r} has the features {shown(', '.join(features) or 'none')}; it must have 'image' and 'label'")
    image, label = features["image"], features["label"]
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UsageError(
            f"data set {name!r} has {type(image).__name__} images and {type(label).__name__} labels; it must have Image and ClassLabel"
        )
    if None in image.shape or len(image.shape) != 3 or np.dtype(image.np_dtype) != np.uint8:
        raise UsageError(
            f"data set {name!r} has images of shape {shown(image.shape)} and type {image.np_dtype}; "
            "choose a set of uint8 images of one size"
        )
    if min(image.shape[:2]) < MIN_SIDE:
        raise UsageError(
            f"data set {name!r} has images of {by(image.shape)}; they must be at least {MIN_SIDE}x{MIN_SIDE} pixels: choose another set"
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
    """What the set's description promises. Raises UsageError unless it has train and test, a class for every label, and fits memory."""
    counts = {split: info.splits[split].num_examples for split in info.splits}
    for split in ("train", "test"):
        if not counts.get(split):
            raise UsageError(
                f"data set {name!r} has no {split!r} split, only {shown(', '.join(counts) or 'none')}; choose a set with train and test"
            )
    classes = info.features["label"].num_classes
    if not isinstance(classes, int) or not 1 <= classes <= MAX_CLASSES:
        raise UsageError(f"data set {name!r} has {shown(classes)} classes; there must be 1 to {MAX_CLASSES:,}: choose another set")
    named = len(info.features["label"].names)
    if named != classes:
        raise UsageError(f"data set {name!r} has {classes} classes and the names of {named}; prepare it again")
    layout = Layout(counts["train"], counts["test"], tuple(info.features["image"].shape), classes)
    size = (layout.train + layout.test) * math.prod(layout.image_shape)
    if size > MAX_BYTES:
        raise UsageError(
            f"data set {name!r} has {layout.train + layout.test} images of {by(layout.image_shape)}, {size / 2**30:.1f} GiB decoded; "
            f"at most {MAX_BYTES / 2**30:.0f} GiB fit: choose a smaller set"
        )
    return layout


def by(shape: Iterable[int]) -> str:
    """A shape in words, as 32x32x3."""
    return "x".join(map(str, shape))


def damaged(name: str, directory: Path, error: Exception) -> UsageError:
    """The error for a prepared set that is not as it was written."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return UsageError(
        f"data set {name!r} in {shown(directory, 300)} cannot be read ({shown(text, 200)}); "
        f"delete that folder and run python launch/prepare_data.py --name {name}"
    )
