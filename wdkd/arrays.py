"""Arrays in .npy files. A header is compared with the one that is expected and never parsed, so it cannot lie."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from wdkd.files import open_regular


def header(shape: Sequence[int], dtype: np.dtype) -> bytes:
    """What `np.save` writes before the bytes of an array in C order."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)})
    return file.getvalue()


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array's file. Raises OSError."""
    with open(path, "wb") as file:
        file.write(header(array.shape, array.dtype))
        file.write(np.ascontiguousarray(array).data)


def read_array(path: Path, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """The array of exactly that shape and type in a file. Raises ValueError or OSError where there is none."""
    with open_regular(path) as file:
        _skip_header(file, shape, dtype)
        return np.fromfile(file, dtype, math.prod(shape)).reshape(shape)


def map_array(path: Path, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """As `read_array`, but left in the file, to be read when it is looked at."""
    with open_regular(path) as file:
        return np.memmap(file, dtype, "r", _skip_header(file, shape, dtype), tuple(shape))


def _skip_header(file: BinaryIO, shape: Sequence[int], dtype: np.dtype) -> int:
    """The header's length. Raises ValueError where the file is not one of that shape and type, from its first byte to its size."""
    expected = header(shape, dtype)
    size = len(expected) + math.prod(shape) * np.dtype(dtype).itemsize
    if os.fstat(file.fileno()).st_size != size or file.read(len(expected)) != expected:
        raise ValueError(f"{Path(file.name).name} holds no array of shape {tuple(shape)} and type {np.dtype(dtype).name}")
    return len(expected)
