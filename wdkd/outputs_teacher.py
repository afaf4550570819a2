"""A teacher of which the outputs alone are known, one row for each training image, read from a file: one behind an API, say."""

import csv
import hashlib
import io
import zipfile
from collections.abc import Sequence

import numpy as np

from wdkd.config import TeacherInputConfig
from wdkd.errors import UsageError
from wdkd.files import read_file
from wdkd.teacher import Teacher
from wdkd.teacher_input import TINY, check_outputs, class_order
from wdkd.wording import shown

LIMIT = 2**31
"""Bytes of the largest file that is read."""
KINDS = ("logits", "probabilities")
ROW = ("index", "indices")
"""What a CSV file's column of the images' numbers may be called."""
SLACK = 1e-2
"""How far a row of probabilities may be from a sum of 1: files hold them rounded."""


def read_outputs_teacher(
    path: str,
    options: TeacherInputConfig,
    *,
    image_shape: tuple[int, ...],
    class_names: Sequence[str],
    indices: np.ndarray,
    total: int,
    given: str | None = None,
) -> Teacher:
    """The outputs in an .npz or .csv file as a teacher of the images `indices` (n,) of a training split of `total` images.

    An .npz file has an array `logits` or `probabilities` (m, classes) and, unless it has a row for each image of the whole training
    split in order, `indices` (m,) into that. A .csv file has a column `index` and one for each class by name; its values are
    probabilities where no row has a negative one and all sum to 1, else logits.

    Raises:
      UsageError: if the file cannot be read or does not hold a row of finite numbers for each of the images.
    """
    try:
        content = read_file(path, LIMIT)
    except FileNotFoundError:
        raise UsageError(f"teacher {path} does not exist; give an .npz or .csv file of outputs") from None
    except UsageError as error:
        raise UsageError(f"teacher: {error}") from error
    read = _read_csv if path.lower().endswith(".csv") else _read_npz
    kind, values, rows = read(content, path, options, class_names)
    check_outputs(values.shape, len(values), len(class_names), path)
    logits = _logits(kind, values, path)
    chosen = logits[_places(rows, len(values), indices, total, path)]
    return Teacher(
        apply=None,
        variables=None,
        classes=len(class_names),
        image_shape=tuple(image_shape),
        path=given or path,
        hash=hashlib.sha256(content).hexdigest(),
        accuracy=None,
        outputs=chosen,
    )


def _read_npz(
    content: bytes, path: str, options: TeacherInputConfig, class_names: Sequence[str]
) -> tuple[str, np.ndarray, np.ndarray | None]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > LIMIT:
            raise ValueError(f"{unpacked:,} bytes when unpacked")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*KINDS, "indices") if name in file.files}
            names = file.files
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as error:
        raise UsageError(f"teacher {path} is no .npz file or is damaged ({shown(error, 120)}); write it again with numpy.savez") from error
    found = [name for name in KINDS if name in arrays]
    if len(found) != 1:
        raise UsageError(
            f"teacher {path} has the arrays {shown(', '.join(names), 200) or 'none'}; it must have one of logits, probabilities"
        )
    values, rows = arrays[found[0]], arrays.get("indices")
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise UsageError(f"teacher {path}: {found[0]} is {values.dtype} {values.shape}; it must be numbers, (images, classes)")
    if rows is not None and (rows.dtype.kind not in "iu" or rows.shape != (len(values),)):
        raise UsageError(
            f"teacher {path}: indices is {rows.dtype} {rows.shape}; it must be whole numbers, one for each of {len(values)} rows"
        )
    order = class_order(options.classes, class_names)
    if order is not None and values.shape[1] == len(order):
        values = values[:, order]
    return found[0], values.astype(np.float64), rows


def _read_csv(content: bytes, path: str, options: TeacherInputConfig, class_names: Sequence[str]) -> tuple[str, np.ndarray, np.ndarray]:
    if options.classes is not None:
        raise UsageError(f"teacher_input.classes is given, but the columns of {path} have the classes' names; leave it out")
    try:
        head, *lines = [line for line in csv.reader(io.StringIO(content.decode("utf-8-sig"))) if line]
    except (ValueError, csv.Error) as error:
        raise UsageError(f"teacher {path} is no .csv file of a line of names and lines of numbers ({shown(error, 120)})") from error
    head = [name.strip() for name in head]
    column = next((name for name in ROW if name in head and name not in class_names), None)
    missing, foreign = [name for name in class_names if name not in head], [n for n in head if n != column and n not in class_names]
    if column is None or missing or foreign or len(set(head)) < len(head):
        wrong = [
            "" if column else "no column 'index'",
            f"no column for {shown(', '.join(missing), 200)}" if missing else "",
            f"columns of no class: {shown(', '.join(foreign), 200)}" if foreign else "",
            "a name twice" if len(set(head)) < len(head) else "",
        ]
        raise UsageError(f"teacher {path} has {'; '.join(filter(None, wrong))}; it must have 'index' and one column per class by name")
    at = [head.index(name) for name in class_names]
    rows, values = [], []
    for number, line in enumerate(lines, 2):
        try:
            rows.append(int(line[head.index(column)]))
            values.append([float(line[i]) for i in at])
        except (ValueError, IndexError):
            raise UsageError(f"teacher {path}: row {number} is not an index and {len(at)} numbers: {shown(','.join(line), 120)}") from None
    array = np.asarray(values, np.float64).reshape(len(values), len(at))
    sums = len(array) > 0 and (array >= 0).all() and np.abs(array.sum(1) - 1).max() <= SLACK
    return "probabilities" if sums else "logits", array, np.asarray(rows, np.int64)


def _logits(kind: str, values: np.ndarray, path: str) -> np.ndarray:
    """Float32 logits. Raises UsageError for what is not finite, and for probabilities that are none."""
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise UsageError(
            f"teacher {path}: {bad.sum()} of {len(bad)} rows are not finite, first row {np.flatnonzero(bad)[0]}; record them again"
        )
    if kind == "probabilities":
        bad = (values < 0).any(1) | (np.abs(values.sum(1) - 1) > SLACK)
        if bad.any():
            first = np.flatnonzero(bad)[0]
            example = f"first row {first}, which sums to {values[first].sum():.4g}"
            raise UsageError(f"teacher {path}: {bad.sum()} of {len(bad)} rows are no probabilities, {example}; store logits as logits")
        values = np.log(np.maximum(values, TINY))
    return values.astype(np.float32)


def _places(rows: np.ndarray | None, count: int, indices: np.ndarray, total: int, path: str) -> np.ndarray:
    """Which row of the file each image has."""
    if rows is None:
        if count != total:
            raise UsageError(
                f"teacher {path} has {count:,} rows and no indices, and the training split {total:,} images; "
                "add an array indices (n,) that says which image each row is of"
            )
        return indices
    if ((rows < 0) | (rows >= total)).any():
        wrong = rows[(rows < 0) | (rows >= total)][0]
        raise UsageError(f"teacher {path} has a row for image {wrong}; the training split has images 0 to {total - 1}")
    place = np.full(total, -1)
    place[rows] = np.arange(count)
    if len(np.unique(rows)) < count:
        values, counts = np.unique(rows, return_counts=True)
        raise UsageError(f"teacher {path} has {counts.max()} rows for image {values[counts.argmax()]}; keep one for each")
    absent = indices[place[indices] < 0]
    if len(absent):
        raise UsageError(
            f"teacher {path} has no row for {len(absent):,} of the {len(indices):,} images of this subset, first {absent[0]}; "
            "record the images whose indices subset.json lists"
        )
    return place[indices]
