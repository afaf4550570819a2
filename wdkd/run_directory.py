"""A run's directory: what is written there about the run, and how a network is rebuilt from it."""

import dataclasses
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from wdkd import checkpoint, lock, parallel
from wdkd.checks import require, require_path
from wdkd.config import EARLIER, MAX_SIDE, Config, differences, from_dict, to_dict
from wdkd.data import Split
from wdkd.errors import UsageError
from wdkd.files import read_json, write_json
from wdkd.folding import fold
from wdkd.models import check_image_shape, create_model, variable_shapes
from wdkd.notes import note
from wdkd.prepared import MAX_CLASSES
from wdkd.result import read_result
from wdkd.teacher import Teacher, inference
from wdkd.teacher_source import find_source

MAX_CONFIG = 2**20
"""Bytes of the largest config.json that is read."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


@dataclasses.dataclass(frozen=True)
class Input:
    """What a network was made for: its classes, its images (H, W, C), and the mean and deviation of their pixels in [0, 1]."""

    class_names: list[str]
    image_shape: list[int]
    mean: list[float]
    std: list[float]

    def check(self) -> None:
        """Raises UsageError for what no data set has."""
        require(len(self.image_shape) == 3, "image_shape", self.image_shape, "height, width and channels")
        check_image_shape(self.image_shape)
        require(max(self.image_shape) <= MAX_SIDE, "image_shape", self.image_shape, f"at most {MAX_SIDE} pixels wide and high")
        require(1 <= len(self.class_names) <= MAX_CLASSES, "number of classes", len(self.class_names), f"between 1 and {MAX_CLASSES}")
        for name, values, least in (("mean", self.mean, 0.0), ("std", self.std, 1e-9)):
            require(len(values) == self.image_shape[2], name, values, "one number for each channel")
            require(all(least <= value <= 1 for value in values), name, values, f"between {least:g} and 1")

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Mean and deviation, (channels,) float32 each, as `models.apply_network` takes them."""
        return {"mean": np.asarray(self.mean, np.float32), "std": np.asarray(self.std, np.float32)}


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of config.json: everything that is needed to go on with a run or to rebuild its network."""

    config: Config
    input: Input
    teacher_directory: str | None
    """The teacher's directory or file as an absolute path; of Python code, module:function."""
    versions: dict[str, str]
    revision: str
    teacher_hash: str | None = dataclasses.field(default=None, metadata={EARLIER: None})
    """Of the teacher's parameters or file: a run goes on with the teacher that it began with."""
    data_folder: str | None = dataclasses.field(default=None, metadata={EARLIER: None})
    """The folder of the images, where they are of one, as an absolute path."""


def describe_run(config: Config, given: Input, teacher: Teacher | None = None) -> Run:
    """The run as it is started now, by this code."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    directory = None if config.teacher is None else find_source(config.teacher).location
    folder = None if config.data.folder is None else str(Path(config.data.folder).absolute())
    return Run(config, given, directory, versions, _revision(), teacher and teacher.hash, folder)


def _revision() -> str:
    """The commit of this code, with '+' where files differ from it; 'unknown' outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def check_workdir(workdir: str | os.PathLike, config: Config) -> Path:
    """The absolute path of a directory that is empty, not there yet, or this config's already.

    Raises:
      UsageError: if it holds a run with another config (named field by field), or something else.
    """
    directory = Path(workdir).absolute()
    try:
        found = sorted(directory.iterdir()) if directory.exists() else []
    except NotADirectoryError:
        raise UsageError(f"{directory} is a file; give a new --workdir") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(directory)!r:.300} cannot be read ({error}); give another --workdir or restore its permissions") from error
    names = {path.name for path in found}
    if "config.json" in names:
        if changed := differences(read_run(directory).config, config):
            raise UsageError(f"{directory} holds another run ({'; '.join(changed[:4])}, stored and given); give another --workdir")
        _refuse_links([*found, *(directory / "checkpoints").glob("*")])
    # Only the process that writes looks: to the others of a run, it may be just making the directory. What a run that was killed
    # at its very start has left does not count.
    elif parallel.is_main_process() and [name for name in names if name not in (lock.NAME, "subset.json") and not _is_temporary(name)]:
        raise UsageError(f"{directory} holds files but no run (no config.json); give an empty or new --workdir")
    return directory


def _refuse_links(paths: list[Path]) -> None:
    """A run writes and deletes below its directory, so nothing there may lead elsewhere."""
    for path in paths:
        if path.is_symlink():
            raise UsageError(f"{path} is a link; put what it points to in its place, or give another --workdir")


WRITTEN = ("config.json", "subset.json", "metrics.jsonl", "result.json")


def _is_temporary(name: str) -> bool:
    """Whether this is a file of ours that was being written when its process was killed."""
    return name.startswith(tuple(f".{written}." for written in WRITTEN))


def subset_of(split: Split) -> dict[str, Any]:
    """The content of subset.json: which images, and SHA-256 of their indices and of their pixels and labels."""
    content = hashlib.sha256(np.ascontiguousarray(split.train_images).data)
    content.update(np.ascontiguousarray(split.train_labels).data)
    return {"sha256": split.subset_hash, "images": content.hexdigest(), "indices": split.train_indices.tolist()}


def start(directory: Path, run: Run, subset: dict[str, Any]) -> None:
    """Writes config.json and subset.json; where they are there already, compares the teacher and the images with theirs.

    Raises:
      UsageError: if the directory cannot be written, or the run began with another teacher or other images.
    """
    if not parallel.is_main_process():
        return
    for path in directory.iterdir():
        if _is_temporary(path.name):
            path.unlink(missing_ok=True)
    begun = (directory / "config.json").exists()
    if begun:
        known = read_run(directory).teacher_hash
        if known not in (None, run.teacher_hash):
            raise UsageError(
                f"{directory} began with another teacher than is now at {run.teacher_directory}; restore it or give another --workdir"
            )
    if begun and (directory / "subset.json").exists():
        _compare_subset(directory / "subset.json", subset)
    else:
        write_json(directory / "subset.json", subset)
    if not begun:
        write_json(directory / "config.json", to_dict(run))


def _compare_subset(path: Path, subset: dict[str, Any]) -> None:
    stored = read_json(path)
    if not isinstance(stored, dict) or "sha256" not in stored:
        raise UsageError(f"{path} is no subset; delete it, and it is made again")
    for name in ("sha256", "images", "indices"):
        if name in stored and name in subset and stored[name] != subset[name]:
            raise UsageError(
                f"{path} is of other images than the data set now has ({name} differ); restore the data or give another --workdir"
            )


def read_run(directory: str | os.PathLike) -> Run:
    """Reads config.json. Raises UsageError if the directory is missing, empty or not a run's, or an option is out of range."""
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory; give the directory of a run")
    if not path.exists():
        raise UsageError(f"{directory} holds no run (no config.json); give a directory that launch/train_teacher.py or distill.py wrote")
    run = from_dict(Run, read_json(path, MAX_CONFIG), where=str(path))
    try:
        run.config.check()
        run.input.check()
        require_path("data_folder", run.data_folder)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    return run


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network read back from its run: the module, the variables for `models.apply_network`, and the step they are from.

    `hash` is that of what was trained, without the statistics of the input.
    """

    run: Run
    model: nn.Module
    variables: Any
    step: int
    hash: str
    passed_over: tuple[str, ...] = ()
    """Why checkpoints that are newer were not taken."""


def read_trained(directory: str | os.PathLike) -> Trained:
    """The network of a run's newest checkpoint. Raises UsageError if there is none or it does not fit the stored config."""
    run = read_run(directory)
    model = build_model(run.config, run.input)
    like = variable_shapes(model, run.input.image_shape)
    step, variables, passed_over = checkpoint.read_network(Path(directory) / "checkpoints", like)
    return Trained(run, model, variables | {"input": run.input.arrays}, step, checkpoint.tree_hash(variables), passed_over)


def build_model(config: Config, given: Input, **options: Any) -> nn.Module:
    """The run's network, as `models.create_model` makes it."""
    return create_model(config.model, classes=len(given.class_names), mean=given.mean, std=given.std, **options)


def read_teacher(directory: str | os.PathLike) -> Teacher:
    """The network of a run as a teacher, its batch norm folded, with its test accuracy where the run is finished.

    Raises:
      UsageError: as `read_trained`, or if a finished run's checkpoint is not the one that its result is of.
    """
    try:
        trained = read_trained(directory)
        finished = Path(directory) / "result.json"
        result = read_result(finished) if finished.exists() else None
        if result is not None and result.status == "diverged":
            raise UsageError(f"{directory} has diverged: {result.reason}; train another")
        if result is not None and result.parameter_hash != trained.hash:
            why = "".join(f" ({reason})" for reason in trained.passed_over[:1])
            raise UsageError(
                f"{finished} is of other parameters than the checkpoint of step {trained.step}, the newest that verifies; restore the last "
                f"one, or delete result.json and give the command that trained it again{why}"
            )
    except UsageError as error:
        raise UsageError(f"teacher: {error}") from error
    for reason in trained.passed_over:
        note(reason)
    model, variables = fold(trained.model, trained.variables, tuple(trained.run.input.image_shape))
    return Teacher(
        apply=inference(model),
        apply_bfloat16=inference(model.clone(dtype=jnp.bfloat16)),
        variables=variables,
        classes=len(trained.run.input.class_names),
        image_shape=tuple(trained.run.input.image_shape),
        path=str(directory),
        hash=trained.hash,
        accuracy=result and result.evaluation.accuracy,
    )
