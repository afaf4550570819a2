"""What a run or an evaluation found out, and the file it is kept in."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from wdkd.checks import MAX_RADIUS, require, require_count, require_fraction, require_name, require_number, require_path, require_text
from wdkd.config import EARLIER, Config, from_dict, to_dict
from wdkd.errors import UsageError
from wdkd.files import read_json, write_json
from wdkd.wording import shown

MAX_BYTES = 32 * 2**20
"""Of the largest result file that is read: the confusion matrix of two thousand classes."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A network on one split, every image counted once.

    Accuracy, agreement and ece are fractions in [0, 1]; `confusion[i][j]` counts images of class i called j. Of images without labels
    agreement alone is known: accuracy and ece are None, and the lists by class are empty.
    """

    split: str
    count: int
    accuracy: float | None
    ece: float | None
    agreement: float | None
    """Share of images on which student and teacher name the same class; None without a teacher."""
    per_class_accuracy: list[float]
    confusion: list[list[int]]
    class_names: list[str]
    teacher_accuracy: float | None = dataclasses.field(default=None, metadata={EARLIER: None})
    """Of the teacher on the same images; None without one, and where nobody looked."""

    def check(self) -> None:
        """Raises UsageError on the first field that no network on no split can have."""
        require_text("evaluation.split", self.split)
        require_count("evaluation.count", self.count)
        for name in ("accuracy", "ece", "agreement", "teacher_accuracy"):
            require_fraction(f"evaluation.{name}", getattr(self, name))
        for value in self.per_class_accuracy:
            require_fraction("evaluation.per_class_accuracy", value)
        if self.accuracy is None:
            known = self.ece is not None or self.per_class_accuracy or self.confusion or self.agreement is None
            require(not known, "evaluation.accuracy", None, "a number, unless agreement is all that is known")
            return
        require(self.ece is not None, "evaluation.ece", self.ece, "a number where accuracy is one")
        sizes = {len(self.class_names), len(self.per_class_accuracy), len(self.confusion), *map(len, self.confusion)}
        require(len(sizes) == 1 and 0 not in sizes, "evaluation.confusion", f"for {shown(sorted(sizes))} classes", "for one number of them")
        for row in self.confusion:
            worst = min(row) if min(row) < 0 else max(row)
            require_count("evaluation.confusion", worst, least=0, most=self.count)


@dataclasses.dataclass(frozen=True)
class Result:
    """All that a table needs to know about one run."""

    config: Config
    evaluation: Evaluation | None
    """None where the run diverged."""
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
    """Of a run's own result; of a teacher from elsewhere, on the images that the student was evaluated on."""
    through_teacher: bool
    """Whether input gradients went through the teacher: never where its outputs alone are known."""
    teacher_cached: bool | None = dataclasses.field(metadata={EARLIER: False})
    """Whether the teacher was recorded ahead of training; None where only a checkpoint was evaluated."""
    model: str
    parameters: int
    forward_flops: float | None
    """FLOPs of one forward pass of one image, as the compiler counts them; None where it does not."""
    parameter_hash: str | None
    """None where the run diverged."""
    steps: int
    """Optimiser steps of all stages; where the run diverged, the one at which it did."""
    examples_per_second: float | None
    """Training throughput, all processes together; None where only a checkpoint was evaluated, as for wall_seconds."""
    wall_seconds: float | None
    """From the start of `train.run` to the result, of the process that finished the run."""
    device_kind: str
    device_count: int
    versions: dict[str, str]
    revision: str
    status: Literal["complete", "diverged"] = dataclasses.field(default="complete", metadata={EARLIER: "complete"})
    reason: str | None = dataclasses.field(default=None, metadata={EARLIER: None})
    """Of a run that diverged: what was not finite, and at which step."""
    skipped_updates: int = dataclasses.field(default=0, metadata={EARLIER: 0})
    """Updates that were not finite and left out (optimizer.max_skipped)."""

    def check(self) -> "Result":
        """Raises UsageError on the first field that no run can have; returns self."""
        self.config.check()
        require((self.evaluation is None) == (self.status == "diverged"), "status", self.status, "diverged where nothing was evaluated")
        if self.evaluation is not None:
            self.evaluation.check()
        for name in ("dataset", "track", "method"):
            require_name(name, getattr(self, name))
        for name, least in {"n_per_class": 1, "seed": 0, "train_size": 1, "steps": 0, "device_count": 1, "skipped_updates": 0}.items():
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name), least=least)
        require_count("parameters", self.parameters, least=0, most=2**50)
        require_number("epsilon", self.epsilon, MAX_RADIUS)
        for name in ("forward_flops", "examples_per_second", "wall_seconds"):
            require_number(name, getattr(self, name))
        require_fraction("teacher_accuracy", self.teacher_accuracy)
        require_path("teacher_path", self.teacher_path)
        for name in ("subset_hash", "teacher_hash", "model", "parameter_hash", "device_kind", "revision", "reason"):
            require_text(name, getattr(self, name))
        return self


def place(dataset: str) -> str:
    """The directory of a data set's runs and results: of a TFDS set with a configuration, as emnist/balanced, emnist-balanced."""
    return dataset.replace("/", "-")


def results_path(root: str | os.PathLike, result: Result) -> Path:
    """Where the result belongs below `root`: <dataset>/<track>/<method>/n<M>/seed<k>.json (protocol's layout).

    Raises:
      UsageError: for a name that could lead out of there.
    """
    n = "full" if result.n_per_class is None else result.n_per_class
    path = Path(root)
    for part in (result.dataset, result.track, result.method, f"n{n}", f"seed{result.seed}"):
        require_name("a part of the result's path", part)
        path /= place(part)
    return path.with_name(f"{path.name}.json")


def write_result(path: str | os.PathLike, result: Result) -> None:
    """Writes a result as JSON, atomically."""
    write_json(path, to_dict(result))


def read_result(path: str | os.PathLike) -> Result:
    """Reads a result. Raises UsageError naming the file and the field that is wrong."""
    where = shown(path, 300)
    result = from_dict(Result, read_json(path, MAX_BYTES), where=where)
    try:
        return result.check()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
