"""The records of a prepared set as arrays."""

import io
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from wdkd.errors import UsageError
from wdkd.files import open_regular
from wdkd.isolation import answers
from wdkd.prepared import Layout, by, damaged

FORMATS = ("PNG", "JPEG", "BMP", "GIF")
"""What TFDS stores. Of Pillow's other formats, one has Ghostscript run what is in the file."""


def decode(name: str, directory: Path, info: tfds.core.DatasetInfo, layout: Layout) -> dict[str, np.ndarray]:
    """Every image and label, in the order of the data sources; the keys are ARRAYS."""
    arrays = {}
    for split in ("train", "test"):
        images = np.empty(*layout.expected(f"{split}_images"))
        labels = np.empty(*layout.expected(f"{split}_labels"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                _decode_split(info, split, images, labels)
        except Exception as error:  # Damage surfaces as whatever protobuf, array_record or Pillow raise.
            raise damaged(name, directory, error) from error
        if labels.min() < 0 or labels.max() >= layout.num_classes:
            raise UsageError(
                f"data set {name!r} has labels from {labels.min()} to {labels.max()} in {split}; they must be below {layout.num_classes}"
            )
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return arrays


def _decode_split(info: tfds.core.DatasetInfo, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Fills images (n, H, W, C) and labels (n,) with a split's records. Raises ValueError where an image has another shape."""
    # Only these two features: others may not decode without tensorflow, and take time.
    encoded = tfds.features.Tensor(shape=(), dtype=np.object_)
    features = tfds.features.FeaturesDict({"image": encoded, "label": info.features["label"]})
    records = answers("read_records", _shards(info, split))
    console, title = Console(stderr=True), f"decoding {info.name} {split}"
    shown = track(records, title, len(labels), console=console, disable=not sys.stderr.isatty(), transient=True)
    for index, record in enumerate(shown):
        example = features.deserialize_example_np(record)
        try:
            images[index] = _pixels(example["image"], images.shape[1:])
        except ValueError as error:
            raise ValueError(f"image {index} of {split} {error}") from error
        labels[index] = example["label"]


def _shards(info: tfds.core.DatasetInfo, split: str) -> bytes:
    """A split's files as `read_records` takes them. Raises UsageError where one is no regular file."""
    found, shards = info.splits[split], []
    template = found.filename_template.replace(filetype_suffix=tfds.core.FileFormat.ARRAY_RECORD.file_suffix)
    for count, path in zip(found.shard_lengths, template.sharded_filepaths(found.num_shards), strict=True):
        with open_regular(path):
            shards.append(f"{count} ".encode() + os.fsencode(path))
    return b"\0".join(shards)


def _pixels(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """An image as uint8 of `shape` (H, W, C); a grey one has equal channels. Raises ValueError for another size before decoding it."""
    with PIL.Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        found = (image.height, image.width, len(image.getbands()))
        if found[:2] != shape[:2] or found[2] not in (1, shape[2]):
            raise ValueError(f"is {by(found)}, not {by(shape)}")
        return np.broadcast_to(np.asarray(image, np.uint8).reshape(found), shape)
