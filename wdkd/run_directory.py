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
import jax.numpy as jnp
import numpy as np

from wdkd import checkpoint, parallel
from wdkd.config import Config, differences, from_dict, to_dict
from wdkd.errors import UsageError
from wdkd.folding import fold
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


def check_workdir(workdir: str | os.PathLike, config: Config) -> Path:
    """The absolute path of a directory that is empty, not there yet, or this config's already.

    Raises:
      UsageError: if it holds a run with another config (named field by field), or something else.
    """
    directory = Path(workdir).absolute()
    if (directory / "config.json").exists():
        if changed := differences(read_run(directory).config, config):
            raise UsageError(f"{directory} holds another run ({'; '.join(changed[:4])}, stored and given); give another --workdir")
    elif directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; give a new --workdir")
    # Only the process that writes looks: to the others of a run, it may be just making the directory.
    elif parallel.is_main_process() and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory} holds files but no run (no config.json); give an empty or new --workdir")
    return directory


def start(directory: Path, run: Run, subset: dict[str, Any]) -> None:
    """Writes config.json and subset.json, unless they are there. Raises UsageError if the directory cannot be written."""
    if parallel.is_main_process() and not (directory / "config.json").exists():
        write_json(directory / "subset.json", subset)
        write_json(directory / "config.json", to_dict(run))


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
    """A network read back from its run: the module, the variables for `models.apply_network`, and the step they are from.

    `hash` is that of what was trained, without the statistics of the input.
    """

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
    return Trained(run, model, variables | {"input": run.input.arrays}, step, checkpoint.tree_hash(variables))


def build_model(config: Config, given: Input, **options: Any) -> nn.Module:
    """The run's network, as `models.create_model` makes it."""
    return create_model(config.model, classes=len(given.class_names), mean=given.mean, std=given.std, **options)


def read_teacher(directory: str | os.PathLike) -> Teacher:
    """The network of a run as a teacher, its batch norm folded, with its test accuracy where the run is finished.

    Raises UsageError as `read_trained`.
    """
    try:
        trained = read_trained(directory)
        finished = Path(directory) / "result.json"
        accuracy = read_result(finished).evaluation.accuracy if finished.exists() else None
    except UsageError as error:
        raise UsageError(f"teacher: {error}") from error
    model, variables = fold(trained.model, trained.variables, tuple(trained.run.input.image_shape))
    return Teacher(
        apply=inference(model),
        apply_bfloat16=inference(model.clone(dtype=jnp.bfloat16)),
        variables=variables,
        classes=len(trained.run.input.class_names),
        image_shape=tuple(trained.run.input.image_shape),
        path=str(directory),
        hash=trained.hash,
        accuracy=accuracy,
    )
