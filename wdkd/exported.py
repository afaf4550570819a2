"""An exported network: one file that says what it takes and what its classes are. Read and run without this project's networks.

ONNX needs onnxruntime, safetensors needs that package and NumPy, StableHLO needs JAX; none needs flax.
"""

import dataclasses
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wdkd import numpy_network
from wdkd.checks import require, require_fraction, require_text
from wdkd.errors import UsageError
from wdkd.files import parse_json, read_file
from wdkd.typed_json import from_dict
from wdkd.wording import shown

Format = Literal["onnx", "stablehlo", "safetensors"]
VERSION = 1
MAX_BYTES = 2**31 - 1
"""Of the largest file: that of protobuf, in which ONNX is written."""
MAX_SIDE = 4096
MODEL, METADATA = "model.jax_export", "metadata.json"
"""What a StableHLO export, a zip archive, holds: a function of pixels as jax.export serialises it, and the description."""
GRAPH = "graph"
"""Key of a safetensors file's metadata: the operations, as `numpy_network.run` takes them."""
BATCH = 256

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Pixels (B, H, W, C) float32 -> (logits, probabilities), (B, classes) each."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What an exported file says about itself; each field is JSON under its name in the file's metadata."""

    version: int
    class_names: list[str]
    input: str
    """The input in words."""
    layout: Literal["NCHW", "NHWC"]
    """Of the input, float32 pixels in [0, 1]: the first axis is the batch, of any length."""
    image_shape: list[int]
    """Height, width and channels (RGB, or 1 for grey), whatever the layout."""
    mean: list[float]
    std: list[float]
    """Of the pixels, by channel; (pixels - mean) / std is part of the network."""
    precision: Literal["float32", "int8"]
    model: str
    """The network's family, width and normalisation."""
    parameters: int
    parameter_hash: str
    """Of the checkpoint, as in its run's result."""
    dataset: str
    accuracy: float
    """Of the checkpoint on the data set's test images."""
    test_images: int

    def check(self) -> "Description":
        """Raises UsageError for what no export says; returns self."""
        require(self.version == VERSION, "version", self.version, f"{VERSION}: this wdkd reads no other")
        require(len(self.image_shape) == 3, "image_shape", self.image_shape, "height, width and channels")
        require(all(1 <= side <= MAX_SIDE for side in self.image_shape[:2]), "image_shape", self.image_shape, f"of 1 to {MAX_SIDE} pixels")
        require(self.image_shape[2] in (1, 3), "image_shape", self.image_shape, "of 1 or 3 channels")
        require(bool(self.class_names), "class_names", "empty", "one name for each class")
        require_fraction("accuracy", self.accuracy)
        for name in ("model", "dataset", "parameter_hash"):
            require_text(name, getattr(self, name))
        return self

    def texts(self) -> dict[str, str]:
        """The metadata of a file."""
        return {name: json.dumps(value, ensure_ascii=False) for name, value in dataclasses.asdict(self).items()}


def input_in_words(layout: str, image_shape: list[int]) -> str:
    """What to do with an image before the network sees it."""
    height, width, channels = image_shape
    axes = {"NCHW": f"(batch, {channels}, {height}, {width})", "NHWC": f"(batch, {height}, {width}, {channels})"}[layout]
    return (
        f"float32 {axes}, {'RGB' if channels == 3 else 'grey'} values divided by 255, upright; resize until the image just covers "
        f"{width}x{height} and crop its centre; mean and deviation are taken care of inside"
    )


def describe(texts: Mapping[str, str]) -> Description:
    """The description in a file's metadata. Raises UsageError where there is none, or ValueError for texts that are no JSON."""
    if "version" not in texts or "class_names" not in texts:
        raise UsageError("its metadata are not those of an export")
    names = {field.name for field in dataclasses.fields(Description)}
    return from_dict(Description, {name: parse_json(text) for name, text in texts.items() if name in names}, "metadata").check()


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 pixels in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """A file that was read: call it with pixels (n, H, W, C) float32 in [0, 1], n >= 1, to get (logits, probabilities), (n, classes)."""

    path: Path
    format: Format
    description: Description
    run: Run

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [self.run(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
        logits, probabilities = (np.concatenate(part) for part in zip(*parts, strict=True))
        return logits, probabilities


def read_exported(path: str | os.PathLike) -> Exported:
    """Reads what `export.export_run` wrote, whatever its name ends with, and runs it once.

    Raises:
      UsageError: if it is no export, is damaged, does not do what it says, or a package to run it with is missing.
    """
    path = Path(path)
    where = shown(path, 300)
    try:
        content = read_file(path, MAX_BYTES)
    except FileNotFoundError:
        raise UsageError(f"{where} does not exist; give a file that launch/export.py wrote") from None
    format = _format(content)
    try:
        texts, run = READERS[format](content)
        exported = Exported(path, format, describe(texts), run)
        _try_once(exported)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        raise UsageError(f"{where} is {NAMES[format]}, which needs the package {package}; pip install 'wdkd[onnx]'") from error
    except Exception as error:  # Damage surfaces as whatever three readers and an interpreter raise.
        why = shown(" ".join(str(error).split()) or type(error).__name__, 200)
        raise UsageError(f"{where} is no export of wdkd, or damaged ({why}); give a file that launch/export.py wrote") from error
    return exported


NAMES = {"onnx": "an ONNX file", "stablehlo": "a StableHLO export", "safetensors": "a safetensors file"}


def _format(content: bytes) -> Format:
    """What a file is by its first bytes; what is nothing else is left for the reader of ONNX to refuse."""
    if content[:4] == b"PK\3\4":
        return "stablehlo"
    if len(content) > 8 and struct.unpack("<Q", content[:8])[0] <= len(content) and content[8:9] == b"{":
        return "safetensors"
    return "onnx"


def session(model: bytes | str, threads: int = 0) -> Any:
    """An onnxruntime session of a model's content, or its file, on the CPU, with a thread per core, or `threads`; it says errors alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _read_onnx(content: bytes) -> tuple[Mapping[str, str], Run]:
    opened = session(content)

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = opened.run(["logits", "probabilities"], {"pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})
        return logits, probabilities

    return opened.get_modelmeta().custom_metadata_map, run


def _read_stablehlo(content: bytes) -> tuple[Mapping[str, str], Run]:
    from jax import export

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in (MODEL, METADATA):
            if archive.getinfo(name).file_size > len(content):
                raise ValueError(f"{name} is compressed")
        texts, model = parse_json(archive.read(METADATA)), archive.read(MODEL)
    call = export.deserialize(bytearray(model)).call

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = map(np.asarray, call(pixels))
        return logits, probabilities

    return texts, run


def _read_safetensors(content: bytes) -> tuple[Mapping[str, str], Run]:
    import safetensors.numpy

    values = safetensors.numpy.load(content)
    (length,) = struct.unpack("<Q", content[:8])
    texts = parse_json(content[8 : 8 + length])["__metadata__"]
    nodes = parse_json(texts[GRAPH])

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = numpy_network.run(nodes, values, pixels)
        return logits, numpy_network.softmax(logits)

    return texts, run


READERS: dict[str, Callable[[bytes], tuple[Mapping[str, str], Run]]] = {
    "onnx": _read_onnx,
    "stablehlo": _read_stablehlo,
    "safetensors": _read_safetensors,
}
"""A file's content -> (its metadata, the network)."""


def _try_once(exported: Exported) -> None:
    """Raises ValueError unless two images give the numbers that the description says."""
    described = exported.description
    for numbers in exported(np.zeros((2, *described.image_shape), np.float32)):
        if numbers.shape != (2, len(described.class_names)):
            raise ValueError(f"it gives {shown(numbers.shape)} numbers for two images and {len(described.class_names)} classes")
        if not np.isfinite(numbers).all():
            raise ValueError("it gives numbers that are not finite")
