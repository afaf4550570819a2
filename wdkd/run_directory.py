"""A run's directory: what is written there about the run, and how a network is rebuilt from it."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from wdkd import checkpoint
from wdkd.config import Config, differences, from_dict, to_dict
from wdkd.errors import UsageError
from wdkd.models import create_model, initialize
from wdkd.result import read_json, read_result, write_json
from wdkd.teacher import Teacher, inference

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


@dataclasses.dataclass(frozen=True)
class Input:
    """What a network was made for: its classes, its images (H, W, C), and the mean and deviation of their pixels in [0, 1]."""

    class_names: list[str]
    image_shape: list[int]
    mean: list[float]
    std: list[float]


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of config.json: everything that is needed to go on with a run or to rebuild its network."""

    config: Config
    input: Input
    teacher_directory: str | None
    """The teacher's directory as an absolute path."""
    versions: dict[str, str]
    revision: str


def describe_run(config: Config, given: Input) -> Run:
    """The run as it is started now, by this code."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    directory = None if config.teacher is None else str(Path(config.teacher).absolute())
    return Run(config, given, directory, versions, _revision())


def _revision() -> str:
    """The commit of this code, with '+' where files differ from it; 'unknown' outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def claim(workdir: str | os.PathLike, run: Run, *, write: bool) -> Path:
    """Makes `workdir` this run's directory, or finds that it already is.

    Raises:
      UsageError: if it holds a run with another config (named field by field), or something else, or cannot be written.
    """
    directory = Path(workdir).absolute()
    stored = directory / "config.json"
    if stored.exists():
        if changed := differences(read_run(directory).config, run.config):
            raise UsageError(f"{directory} holds another run ({'; '.join(changed[:4])}, stored and given); give another --workdir")
        return directory
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; give a new --workdir")
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory} holds files but no run (no config.json); give an empty or new --workdir")
    if write:
        write_json(stored, to_dict(run))
    return directory


def read_run(directory: str | os.PathLike) -> Run:
    """Reads config.json. Raises UsageError if the directory is missing, empty or not a run's."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory; give the directory of a run")
    if not (directory / "config.json").exists():
        raise UsageError(f"{directory} holds no run (no config.json); give a directory that launch/train_teacher.py or distill.py wrote")
    return from_dict(Run, read_json(directory / "config.json"), where=str(directory / "config.json"))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network read back from its run: the module, the variables that are evaluated, and the step they are from."""

    run: Run
    model: nn.Module
    variables: Any
    step: int
    hash: str


def read_trained(directory: str | os.PathLike) -> Trained:
    """The network of a run's newest checkpoint. Raises UsageError if there is none or it does not fit the stored config."""
    run = read_run(directory)
    model = build_model(run.config, run.input)
    like = jax.eval_shape(lambda key: initialize(model, key, run.input.image_shape), jax.random.key(0))
    step, variables = checkpoint.read_network(Path(directory) / "checkpoints", like)
    return Trained(run, model, variables, step, checkpoint.tree_hash(variables))


def build_model(config: Config, given: Input, axis_name: str | None = None) -> nn.Module:
    """The run's network, as `models.create_model` makes it."""
    return create_model(config.model, classes=len(given.class_names), mean=given.mean, std=given.std, axis_name=axis_name)


def read_teacher(directory: str | os.PathLike) -> Teacher:
    """The network of a run as a teacher, with its test accuracy where the run is finished."""
    trained = read_trained(directory)
    finished = Path(directory) / "result.json"
    return Teacher(
        apply=inference(trained.model),
        variables=trained.variables,
        classes=len(trained.run.input.class_names),
        image_shape=tuple(trained.run.input.image_shape),
        path=str(directory),
        hash=trained.hash,
        accuracy=read_result(finished).evaluation.accuracy if finished.exists() else None,
    )
