"""What a run or an evaluation found out, and the file it is kept in."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from wdkd.config import EARLIER, Config, from_dict, to_dict
from wdkd.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A network on one split, every image counted once.

    Accuracy, agreement and ece are fractions in [0, 1]; `confusion[i][j]` counts images of class i called j.
    """

    split: str
    count: int
    accuracy: float
    ece: float
    agreement: float | None
    """Share of images on which student and teacher name the same class; None without a teacher."""
    per_class_accuracy: list[float]
    confusion: list[list[int]]
    class_names: list[str]


@dataclasses.dataclass(frozen=True)
class Result:
    """All that a table needs to know about one run."""

    config: Config
    evaluation: Evaluation
    dataset: str
    track: str
    method: str
    n_per_class: int | None
    """None: all training images but the validation split."""
    seed: int
    epsilon: float
    train_size: int
    subset_hash: str
    teacher_path: str | None
    teacher_hash: str | None
    teacher_accuracy: float | None
    through_teacher: bool
    teacher_cached: bool | None = dataclasses.field(metadata={EARLIER: False})
    """Whether the teacher was recorded ahead of training; None where only a checkpoint was evaluated."""
    model: str
    parameters: int
    forward_flops: float | None
    """FLOPs of one forward pass of one image, as the compiler counts them; None where it does not."""
    parameter_hash: str
    steps: int
    examples_per_second: float | None
    """Training throughput, all processes together; None where only a checkpoint was evaluated, as for wall_seconds."""
    wall_seconds: float | None
    """From the start of `train.run` to the result, of the process that finished the run."""
    device_kind: str
    device_count: int
    versions: dict[str, str]
    revision: str


def results_path(root: str | os.PathLike, result: Result) -> Path:
    """Where the result belongs below `root`: <dataset>/<track>/<method>/n<M>/seed<k>.json (protocol's layout)."""
    n = "full" if result.n_per_class is None else result.n_per_class
    return Path(root) / result.dataset / result.track / result.method / f"n{n}" / f"seed{result.seed}.json"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file whole or not at all: to a temporary name beside it, then renamed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose a directory that you may write to") from error
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises UsageError when it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; give the directory of a run") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; restore it or run again in a new directory") from error


def write_result(path: str | os.PathLike, result: Result) -> None:
    """Writes a result as JSON, atomically."""
    write_json(path, to_dict(result))


def read_result(path: str | os.PathLike) -> Result:
    """Reads a result. Raises UsageError naming the file and the field that is wrong."""
    return from_dict(Result, read_json(path), where=str(path))
