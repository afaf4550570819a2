"""ONNX files as others may have left them: read whole, with the parameters beside them, or refused in a line."""

import dataclasses
import hashlib
from pathlib import Path

import onnx
import onnx.inliner
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from wdkd.errors import UsageError
from wdkd.files import read_file
from wdkd.wording import shown

LIMIT = 2**31 - 1
"""Most bytes of a file and its external data together: protobuf's own limit."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was read: the model, its path, and of its bytes with its external data's their SHA-256 and number."""

    model: onnx.ModelProto
    path: Path
    hash: str
    size: int


def read_onnx(path: Path) -> File:
    """The content of a file, checked as far as it can be without running it. Raises UsageError."""
    content = _content(path, LIMIT)
    digest, left = hashlib.sha256(content), LIMIT - len(content)
    try:
        model = onnx.load_model_from_string(content)
        if not model.graph.node or not model.opset_import:
            raise ValueError("it has no graph of operators")
    except Exception as error:  # protobuf's own errors have no common class.
        raise UsageError(f"teacher {path} is no ONNX file or is truncated ({shown(error, 120)}); export it again") from error
    for name in _external_files(model, path):
        more = _content(path.parent / name, left, of=path)
        digest.update(more)
        left -= len(more)
    try:
        load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
        model = onnx.inliner.inline_local_functions(model)
    except Exception as error:
        raise UsageError(f"teacher {path} is damaged or no valid ONNX ({shown(first_line(error), 200)}); export it again") from error
    return File(model, path, digest.hexdigest(), LIMIT - left)


def _content(path: Path, limit: int, of: Path | None = None) -> bytes:
    try:
        return read_file(path, limit)
    except FileNotFoundError:
        if of is None:
            raise UsageError(f"teacher {path} does not exist; give an .onnx file") from None
        raise UsageError(f"teacher {of} keeps its parameters in {path.name}, which is missing; put it beside the file") from None
    except UsageError as error:
        raise UsageError(f"teacher: {error}") from error


def _external_files(model: onnx.ModelProto, path: Path) -> list[str]:
    """Names of the files, beside the model's own, that hold its parameters, sorted."""
    tensors = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    names = sorted({entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"})
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or (path.parent / name).is_symlink():
            raise UsageError(f"teacher {path} keeps its parameters outside of its folder ({shown(name)}); export it into one folder")
    return names


def first_line(error: Exception) -> str:
    """What an error says, as far as it fits on a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
