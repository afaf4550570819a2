"""Saving and restoring: the only file that says orbax."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from wdkd.errors import UsageError

KEEP = 2
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run, the newest two of them. Use as a context manager: leaving it waits for pending saves.

    A step holds two trees, `network`, the variables that are evaluated, and `state`, all that training goes on from; and the
    `digest` of each, because orbax restores a file with a flipped bit without a word.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        policy = None if read_only else ocp.checkpoint_managers.LatestN(KEEP)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, read_only=read_only, create=not read_only)
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=("network", "state", "digest"))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, *, network: Any, state: Any) -> None:
        """Saves in the background, unless the step is there already."""
        if step in self._manager.all_steps():
            return
        # Copies: on CPU an array's memory would be shared, and the next step, to which the state is donated, writes over it.
        trees = {"network": jax.tree.map(np.array, network), "state": jax.tree.map(np.array, state)}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        digest = ocp.args.JsonSave({name: tree_hash(tree) for name, tree in trees.items()})
        self._manager.save(step, args=ocp.args.Composite(**items, digest=digest))

    def restore(self, step: int, item: str, like: Any) -> Any:
        """One tree of a step, as NumPy arrays.

        Args:
          item: "network" or "state".
          like: tree of arrays or shape structs that says what is expected.

        Raises:
          UsageError: if the step cannot be read, holds other names or shapes, or is not what was saved.
        """
        target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        try:
            tree = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}))[item]
            # orbax gives NumPy arrays the shapes that were saved, whatever was asked for.
            jax.tree.map(_check_shape, tree, target)
            # Steps saved before there were digests have none.
            if (self._directory / str(step) / "digest").exists():
                digest = self._manager.restore(step, args=ocp.args.Composite(digest=ocp.args.JsonRestore()))["digest"]
                if tree_hash(tree) != digest[item]:
                    raise ValueError("its bytes are not those that were saved")
            return tree
        except Exception as error:  # orbax raises many kinds, some with hundreds of lines.
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UsageError(
                f"checkpoint {self._directory / str(step)} does not hold the {item} of this run ({reason[0]:.120}); "
                "delete that step to go on from an older one"
            ) from error


def _check_shape(found: np.ndarray, expected: np.ndarray) -> None:
    if found.shape != expected.shape:
        raise ValueError(f"it has an array of shape {found.shape} in the place of {expected.shape}")


def read_network(directory: Path, like: Any) -> tuple[int, Any]:
    """(step, evaluated variables) of the newest checkpoint below a run's `checkpoints/`. Raises UsageError if there is none."""
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory of checkpoints; give the directory of a run that has saved one")
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UsageError(f"{directory} holds no complete checkpoint; let the run reach its first one")
        return step, checkpoints.restore(step, "network", like)


def tree_hash(tree: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of a tree's leaves, in the order of their names."""
    digest = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
