"""Saving and restoring: the only file that says orbax. What is restored has been verified, bit by bit."""

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from wdkd.errors import UsageError
from wdkd.files import read_json
from wdkd.noise import quieten

KEEP = 2
MIB = 2**20
quieten()


class Damaged(ValueError):
    """A checkpoint is not what was saved, or not of this run; the text says why in a few words."""


class Checkpoints:
    """The checkpoints of one run: the newest two, and the best. Use as a context manager: leaving it waits for pending saves.

    A step holds two trees, `network`, the variables that are evaluated, and `state`, all that training goes on from; and `digest`,
    JSON with the hash of each and what else must be known of the step, because orbax restores a file with a flipped bit without
    a word. The best step is that of the last stage with the lowest mean objective since the step saved before it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        if jax.process_index() == 0:
            for path in unfinished_saves(self.directory):  # Of a call that was cut off; orbax skips it, but it would fill the disk.
                shutil.rmtree(path, ignore_errors=True)
        self._policy = NewestAndBest({step: score(self.directory / str(step)) for step in saved_steps(self.directory)})
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy)
        with one_line(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("network", "state", "digest"))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        with one_line(self.directory):
            self._manager.close()

    def save(self, step: int, *, network: Any, state: Any, facts: Mapping[str, Any]) -> None:
        """Saves in the background, unless the step is there already.

        Args:
          facts: JSON values that `restore` gives back; "stage" and "objective" say which step is the best.

        Raises:
          UsageError: if this save or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        # Copies: on CPU an array's memory would be shared, and the next step, to which the state is donated, writes over it.
        trees = {"network": jax.tree.map(np.array, network), "state": {name: np.array(leaf) for name, leaf in flat(state).items()}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        digest = ocp.args.JsonSave({name: tree_hash(tree) for name, tree in trees.items()} | {"step": step, "facts": dict(facts)})
        self._policy.scores[step] = _score(facts)
        _check_room(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
        with one_line(self.directory):
            self._manager.save(step, args=ocp.args.Composite(**items, digest=digest))


def write_network(directory: Path, step: int, network: Any) -> None:
    """Saves what is evaluated of a step, without the state of its training, in an empty `checkpoints/` directory.

    Raises:
      UsageError: if it cannot be written.
    """
    items = {"network": ocp.args.StandardSave(network), "digest": ocp.args.JsonSave({"network": tree_hash(network), "step": step})}
    with one_line(directory), ocp.CheckpointManager(directory.absolute(), item_names=tuple(items)) as manager:
        manager.save(step, args=ocp.args.Composite(**items))


def _check_room(directory: Path, size: int) -> None:
    """Raises UsageError where arrays of `size` bytes do not fit: half-written ones would only take what is left from others."""
    with one_line(directory):
        free = shutil.disk_usage(directory).free
    if free < 1.1 * size + 2**16:
        raise UsageError(
            f"cannot write the checkpoints in {directory}: it needs {size / MIB:.1f} MiB and the disk has {free / MIB:.1f}; make room, "
            "then the same command goes on from the last checkpoint"
        )


class NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `KEEP` steps and the one with the highest score; a step without a score is never the best."""

    def __init__(self, scores: dict[int, tuple[float, float] | None]) -> None:
        self.scores = scores

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in steps if self.scores.get(step) is not None]
        best = max(scored, key=lambda step: self.scores[step], default=None)
        kept = {*sorted(steps)[-KEEP:], best}
        return [step in kept for step in steps]


def score(step: Path) -> tuple[float, float] | None:
    """What a saved step is judged by, or None where that cannot be read: it is not worth stopping for."""
    try:
        return _score(read_digest(step)["facts"])
    except Damaged:
        return None


def _score(facts: Mapping[str, Any]) -> tuple[float, float] | None:
    stage, objective = facts.get("stage"), facts.get("objective")
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in (stage, objective))
    return (stage, -objective) if numbers else None


@contextlib.contextmanager
def one_line(directory: Path) -> Iterator[None]:
    """Turns what orbax raises while it writes, of many kinds and some with hundreds of lines, into one line."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        full = "no space left on the disk" if "No space left" in text else f"{text:.200}"
        raise UsageError(
            f"cannot write the checkpoints in {directory} ({full}); make room or restore the directory and its permissions, "
            "then the same command goes on from the last checkpoint"
        ) from error


def unfinished_saves(directory: Path) -> list[Path]:
    """What a save that is at work, or was cut off, has below a `checkpoints/` directory."""
    return sorted(directory.glob("*.orbax-checkpoint-tmp*"))


def set_aside(directory: Path, step: int) -> None:
    """Moves a damaged step out of the way of the one that will be saved in its place, to `damaged/` beside `directory`."""
    place = directory.parent / "damaged" / str(step)
    with one_line(directory):
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        (directory / str(step)).rename(place)


# --- reading ------------------------------------------------------------------------------------------------------------


def saved_steps(directory: Path) -> list[int]:
    """The steps of a `checkpoints/` directory, newest first. A save that was cut off has another name; links are not followed."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted((int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 12), reverse=True)


Found = tuple[int, Any, dict[str, Any]]
"""Step, tree of NumPy arrays, and the step's facts."""


def newest(directory: Path, item: str, like: Callable[[int], Any]) -> tuple[Found | None, dict[int, str]]:
    """The newest step that verifies, None if there is none, and why those that are newer were passed over.

    Args:
      item: "network" or "state".
      like: step -> tree of arrays or shape structs that says what is expected.
    """
    passed_over: dict[int, str] = {}
    for step in saved_steps(directory):
        try:
            return (step, *restore(directory / str(step), item, like(step))), passed_over
        except Damaged as error:
            passed_over[step] = f"checkpoint {directory / str(step)} is passed over: {error}"
    return None, passed_over


def read_network(directory: Path, like: Any) -> tuple[int, Any, tuple[str, ...]]:
    """(step, evaluated variables) of the newest checkpoint below a run's `checkpoints/` that verifies, and why newer ones do not.

    Raises:
      UsageError: if there is none.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory of checkpoints; give the directory of a run that has saved one")
    found, passed_over = newest(directory, "network", lambda step: like)
    if found is None and not passed_over:
        raise UsageError(f"{directory} holds no complete checkpoint; let the run reach its first one")
    if found is None:
        raise UsageError(f"no checkpoint verifies; restore one from a copy, or train again: {next(iter(passed_over.values()))}")
    return *found[:2], tuple(passed_over.values())


def restore(step: Path, item: str, like: Any) -> tuple[Any, dict[str, Any]]:
    """One verified tree of a step, as NumPy arrays in the structure of `like`, and the step's facts.

    Raises:
      Damaged: if it is missing, unreadable, of other names, shapes or types than `like`, or not what was saved.
    """
    expected = flat(like)
    tree, digest = verified(step, item, sum(map(_size, expected.values())), expected)
    arrays = _named(item, tree)
    leaves = [np.asarray(arrays[name]) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), digest["facts"]


def verified(step: Path, item: str, limit: int, expected: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """(the tree as it is stored, the step's digest), if its bytes are those that were saved.

    Args:
      limit: bytes that its arrays may have. Files are looked at before orbax reads them, and shapes before it makes the arrays.
      expected: arrays or shape structs by name; None: whatever was saved.

    Raises:
      Damaged: as `restore`.
    """
    step = step.absolute()  # Orbax reads from no other path.
    digest = read_digest(step)
    _check_files(step / item, limit)
    handler = ocp.StandardCheckpointHandler()
    try:
        described = _named(item, handler.metadata(step / item).tree)
        _check_description(described, limit, expected)
        tree = handler.restore(step / item, args=ocp.args.StandardRestore())
    except Damaged:
        raise
    except Exception as error:  # orbax raises many kinds, some with hundreds of lines.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(f"its {item} cannot be read ({reason:.120})") from error
    if tree_hash(tree) != digest.get(item):
        raise Damaged(f"the bytes of its {item} are not those that were saved")
    return tree, digest


def read_digest(step: Path) -> dict[str, Any]:
    """{"network": hash, "state": hash, "facts": {...}} of a saved step. Raises Damaged where it has none or it cannot be read."""
    try:
        digest = read_json(step / "digest" / "metadata", limit=MIB)
    except UsageError as error:
        raise Damaged("its digest is missing or cannot be read") from error
    if not isinstance(digest, dict) or not isinstance(digest.setdefault("facts", {}), dict):
        raise Damaged("its digest is not one")
    if "step" in digest and digest["step"] != int(step.name):
        raise Damaged(f"it is of step {str(digest['step']):.20}")
    return digest


def _check_files(folder: Path, limit: int) -> None:
    """Raises Damaged for links, for what is no file, and for more bytes than arrays of `limit` bytes can take."""
    if not folder.is_dir() or folder.is_symlink():
        raise Damaged(f"it has no {folder.name}")
    total = 0
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise Damaged(f"{path.relative_to(folder.parent)} is neither a file nor a directory")
        total += path.stat().st_size
        if total > 2 * limit + 16 * MIB:
            raise Damaged(f"its {folder.name} has files of more than {total / MIB:,.0f} MiB, for arrays of {limit / MIB:,.1f}")


def _check_description(described: Mapping[str, Any], limit: int, expected: Mapping[str, Any] | None) -> None:
    """Raises Damaged unless what orbax says of the arrays is what is expected, and they and their chunks fit into `limit` bytes."""
    if expected is not None and described.keys() != expected.keys():
        name = sorted(described.keys() ^ expected.keys())[0]
        raise Damaged(f"{name:.80} is in {'it' if name in described else 'this run'} alone, so it is of another run or version")
    for name, array in described.items():
        shape, dtype = tuple(array.shape), np.dtype(array.dtype)
        if expected is not None and (shape, dtype) != (tuple(expected[name].shape), np.dtype(expected[name].dtype)):
            raise Damaged(f"{name:.80} has type {dtype} and shape {shape}, not {expected[name].dtype} and {expected[name].shape}")
        chunk = tuple(array.storage.chunk_shape or shape)
        if any(part > max(whole, 1) for part, whole in zip(chunk, shape, strict=True)):
            raise Damaged(f"{name:.80} has chunks of {chunk}, larger than its shape {shape}")
    if sum(map(_size, described.values())) > limit:
        raise Damaged(f"its arrays have more than {limit / MIB:,.1f} MiB")


def _named(item: str, tree: Any) -> dict[str, Any]:
    """The leaves of a stored tree by name: a state is stored by name already, a network as it is."""
    return tree if item == "state" else flat(tree)


def _size(array: Any) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of their places, in the tree's order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tree_hash(tree: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of a tree's leaves, in the order of their names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flat(tree).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
