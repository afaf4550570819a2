"""A finished network made small enough to be kept with the code: parameters rounded to bfloat16, no state of training."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wdkd.checkpoint import write_network
from wdkd.config import to_dict
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_checkpoint
from wdkd.files import write_json
from wdkd.result import Result, read_result, write_result
from wdkd.run_directory import read_trained


def compact(directory: str | os.PathLike, out: str | os.PathLike, *, data_dir: str | None = None) -> Result:
    """Writes the network of the finished run `directory` to `out`, a directory that works as a teacher and evaluates like a run.

    Arrays keep their type, float32, with the numbers that bfloat16 has: 8 significant bits, so that compressed they take half as
    much. The accuracy in its result.json is measured anew, with these numbers.

    Raises:
      UsageError: if the run is not finished, `out` is there already, or it cannot be written.
    """
    directory, out = Path(directory), Path(out)
    if out.exists():
        raise UsageError(f"{out} is there already; give another --out")
    trained = read_trained(directory)
    before = read_result(directory / "result.json")
    if before.parameter_hash != trained.hash:
        raise UsageError(f"{directory / 'result.json'} is not of the newest checkpoint, step {trained.step}; let the run finish")
    network = rounded({name: tree for name, tree in trained.variables.items() if name != "input"})
    write_network(out / "checkpoints", trained.step, network)
    run = dataclasses.replace(trained.run, teacher_directory=None)
    write_json(out / "config.json", to_dict(run))
    measured = evaluate_checkpoint(out, data_dir=data_dir)
    result = dataclasses.replace(measured, wall_seconds=before.wall_seconds, examples_per_second=before.examples_per_second)
    write_result(out / "result.json", result)
    return result


def rounded(tree: Any) -> Any:
    """The tree's arrays rounded to the numbers that bfloat16 has, in their own type."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16).astype(np.asarray(leaf).dtype), tree)
