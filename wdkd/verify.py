"""Whether everything in a run's directory is what was written: config, subset, metrics, checkpoints, result."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wdkd.checkpoint import MIB, Damaged, flat, restore, saved_steps, tree_hash, unfinished_saves, verified
from wdkd.errors import UsageError
from wdkd.files import read_json
from wdkd.models import variable_shapes
from wdkd.progress import read_lines
from wdkd.result import read_result
from wdkd.run_directory import Run, build_model, read_run
from wdkd.subset import subset_hash

STATE_LIMIT = 32
"""A training state has the network, its average, two moments of the optimiser and connectors: less than this many networks."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One part of a run's directory: what is wrong with it, or None, and what else there is to say."""

    part: str
    problem: str | None
    remark: str = ""


def verify(directory: str | os.PathLike) -> list[Finding]:
    """Checks every part of a run's directory against its digest, its config or the other parts. Reads only.

    Raises:
      UsageError: if it is not the directory of a run.
    """
    directory = Path(directory)
    run = read_run(directory)
    ended = (directory / "result.json").exists()
    hashes: dict[int, str] = {}
    steps = saved_steps(directory / "checkpoints")
    found = [Finding("config.json", None)]
    for name, check in (("subset.json", _subset), ("metrics.jsonl", lambda path: _metrics(path, max(steps, default=0), run))):
        kept = (directory / name).exists() or not ended
        found.append(_look(name, lambda name=name, check=check: check(directory / name)) if kept else Finding(name, None, "not kept"))
    like = functools.cache(lambda: variable_shapes(build_model(run.config, run.input), run.input.image_shape))
    for step in sorted(steps):
        found.append(
            _look(f"checkpoints/{step}", lambda step=step: _checkpoint(directory / "checkpoints" / str(step), like(), hashes, ended))
        )
    if ended:
        found.append(_look("result.json", lambda: _result(directory / "result.json", run, hashes)))
    return found + list(_leftovers(directory))


def _look(part: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(part, None, check())
    except (UsageError, Damaged) as error:
        return Finding(part, str(error))


def _subset(path: Path) -> str:
    stored = read_json(path)
    try:
        indices = np.asarray(stored["indices"], np.int64)
        intact = indices.ndim == 1 and subset_hash(indices) == stored["sha256"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Damaged("it does not hold indices and their SHA-256") from error
    if not intact:
        raise Damaged("its indices are not those that its SHA-256 is of")
    return f"{len(indices):,} images"


def _checkpoint(folder: Path, like: Any, hashes: dict[int, str], ended: bool) -> str:
    network, _ = restore(folder, "network", like)
    hashes[int(folder.name)] = tree_hash(network)
    if not (folder / "state").exists() and ended:
        return "network; its training state was not kept"
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(network))
    state, _ = verified(folder, "state", STATE_LIMIT * size + 64 * MIB)
    return f"network and state, {(size + sum(leaf.nbytes for leaf in flat(state).values())) / MIB:.1f} MiB"


def _metrics(path: Path, last: int, run: Run) -> str:
    known = [step for step, _ in read_lines(path, last)]
    settings = run.config.train
    expected = {*range(settings.log_every, last + 1, settings.log_every)} | ({last} & {settings.steps})
    missing = sorted(expected - set(known))
    if missing:
        raise Damaged(f"{len(missing)} of the steps up to the checkpoint of step {last} are missing, first {missing[0]}")
    return f"{len(known):,} steps"


def _result(path: Path, run: Run, hashes: dict[int, str]) -> str:
    result = read_result(path)
    if result.config != run.config:
        raise Damaged("it is of another run than config.json")
    if result.status == "diverged":
        return f"diverged: {result.reason}"
    if result.steps not in hashes:
        raise Damaged(f"there is no intact checkpoint of its step, {result.steps}")
    if result.parameter_hash != hashes[result.steps]:
        raise Damaged(f"it is of other parameters than checkpoint {result.steps}")
    return "of the parameters in the last checkpoint"


def _leftovers(directory: Path) -> Iterator[Finding]:
    for path in sorted((directory / "damaged").glob("*")):
        yield Finding(f"damaged/{path.name}", None, "a checkpoint that did not verify and was set aside; it may be deleted")
    for path in unfinished_saves(directory / "checkpoints"):
        yield Finding(f"checkpoints/{path.name}", None, "a save that was cut off; the next call that trains removes it")


def summary(findings: list[Finding]) -> list[str]:
    """A line for each part."""
    width = max(len(finding.part) for finding in findings)
    return [f"{f.part:<{width}}  {'ok' if f.problem is None else 'DAMAGED'}  {f.problem or f.remark}".rstrip() for f in findings]
