"""Recording a teacher: what it says of each view, computed with a progress bar, kept in files and read back only if intact."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wdkd import parallel
from wdkd.arrays import header, map_array
from wdkd.augment import create_augmentation
from wdkd.batches import fixed_partners
from wdkd.cache import discard, publish, temporary_beside
from wdkd.checkpoint import tree_hash
from wdkd.config import AugmentConfig, Config
from wdkd.data import Split
from wdkd.files import read_json
from wdkd.methods import Reads
from wdkd.notes import note
from wdkd.progress import track
from wdkd.steps import Data, Draw, make_views
from wdkd.teacher import Record, Teacher
from wdkd.teacher_cache import DTYPES, MIB, Contents, contents
from wdkd.wording import shown

CHUNK = 640
"""Images that one call passes backward: views times classes."""
DAMAGED = (OSError, ValueError, KeyError, TypeError)
"""What reading a record that is not as it was written raises."""


def record_teacher(config: Config, reads: Reads, teacher: Teacher, split: Split, key: np.ndarray, folder: Path, *, show: bool) -> Record:
    """The record of all fixed views of the split's training images, read from `folder` where an equal one was kept.

    Args:
      key: the augmentation's key data.
      folder: holds one folder per content hash of (teacher, images, views, what is recorded). One that cannot be written is
        done without, one that is damaged is made again; a line on stderr says so.
    """
    holds = contents(reads, len(split.train_labels) * config.augment.finite_views, teacher, config.cache.precision)
    described = describe(config, holds, teacher, split)
    final = folder / hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    if os.path.lexists(final):
        try:
            return pack(read_files(final, described, holds))
        except DAMAGED as error:
            note(f"the teacher cache {final} is damaged or stale ({shown(error, 120)}); it is made again")
            discard(final)
    chunks = functools.partial(compute, config, reads, teacher, split, key, show=show)
    try:
        with temporary_beside(final) as temporary:
            write_files(temporary, described, holds, chunks())
            publish(temporary, final)
        return pack(read_files(final, described, holds))
    except DAMAGED as error:
        why = shown(getattr(error, "strerror", None) or error, 120)
        note(f"cannot keep the teacher cache in {folder} ({why}); it is made in memory, for this run alone")
    parts = list(chunks())
    return pack({name: np.concatenate([part[name] for part in parts]) for name in holds.shapes})


def describe(config: Config, holds: Contents, teacher: Teacher, split: Split) -> dict[str, Any]:
    """Everything that a record depends on."""
    augment = dataclasses.asdict(config.augment)
    return {
        "teacher": [teacher.hash, tree_hash(teacher.variables), *filter(None, [teacher.read_as])],
        "subset": split.subset_hash,
        "images": hashlib.sha256(np.ascontiguousarray(split.train_images).data).hexdigest(),
        "augment": {"name": "none"} if config.augment.name == "none" else augment | {"seed": config.seed},
        "arrays": {name: [holds.views, *shape, holds.dtypes[name].name] for name, shape in holds.shapes.items()},
        "computed by": [jax.default_backend(), jax.__version__],
    }


def write_files(folder: Path, described: dict[str, Any], holds: Contents, chunks: Iterator[dict[str, np.ndarray]]) -> None:
    """Writes arrays chunk by chunk, so that they are never in memory twice, and their digests."""
    digests = {name: hashlib.sha256() for name in holds.shapes}
    for index, chunk in enumerate(chunks):
        for name, digest in digests.items():
            rows = np.ascontiguousarray(chunk[name]).view(_stored(holds.dtypes[name]))
            with (folder / f"{name}.npy").open("ab") as file:
                if index == 0:
                    file.write(header((holds.views, *holds.shapes[name]), rows.dtype))
                file.write(rows.data)
            digest.update(rows.data)
    text = json.dumps({"described": described, "sha256": {name: digest.hexdigest() for name, digest in digests.items()}})
    (folder / "description.json").write_text(text)


def read_files(folder: Path, described: dict[str, Any], holds: Contents) -> dict[str, np.ndarray]:
    """The arrays of a record, mapped from their files. Raises ValueError where they are not what was asked for, or were changed."""
    text = read_json(folder / "description.json", MIB)
    if text["described"] != described:
        raise ValueError("it is of another teacher, subset or set of views")
    arrays = {}
    for name, shape in holds.shapes.items():
        array = map_array(folder / f"{name}.npy", (holds.views, *shape), _stored(holds.dtypes[name]))
        digest = hashlib.sha256()
        for start in range(0, holds.views, 256):
            digest.update(np.ascontiguousarray(array[start : start + 256]).data)
        if digest.hexdigest() != text["sha256"][name]:
            raise ValueError(f"the bytes of {name} are not those that were written")
        arrays[name] = array.view(holds.dtypes[name])
    return arrays


def _stored(dtype: np.dtype) -> np.dtype:
    """The type in the file: numpy's format does not know bfloat16."""
    return np.dtype(np.uint16) if dtype == DTYPES["bfloat16"] else dtype


def pack(arrays: dict[str, np.ndarray]) -> Record:
    """The arrays by name as a Record."""
    hidden = {name.removeprefix("hidden-"): array for name, array in arrays.items() if name.startswith("hidden-")}
    return Record(arrays["logits"], arrays.get("jacobian"), hidden)


# --- computing it -------------------------------------------------------------------------------------------------------


def compute(
    config: Config, reads: Reads, teacher: Teacher, split: Split, key: np.ndarray, *, show: bool
) -> Iterator[dict[str, np.ndarray]]:
    """The record's arrays, some views at a time, with a progress bar."""
    views, images = config.augment.finite_views, len(split.train_labels)
    size = max(1, CHUNK // (teacher.classes if reads.jacobian else 1))
    dtype = DTYPES[config.cache.precision]
    step = _chunk_step(teacher.apply, reads, config.augment, tuple(split.image_shape), teacher.classes)
    partners = fixed_partners(images, views, config.seed).reshape(-1)
    fixed = jax.device_put((teacher.variables, Data(split.train_images, split.train_labels), key), jax.local_devices()[0])
    starts = range(0, images * views, size)
    for start in track(starts, title=f"teacher cache, {size} views a step", total=len(starts), show=show):
        rows = np.arange(start, start + size).clip(max=images * views - 1).astype(np.int32)
        draw = Draw(rows // views, partners[rows], rows, rows % views)
        said = step(*fixed, draw)
        kept = min(size, images * views - start)
        yield {name: np.asarray(array)[:kept].astype(np.float32 if name == "logits" else dtype) for name, array in said.items()}


@functools.lru_cache(maxsize=16)
def _chunk_step(apply: Callable, reads: Reads, augment: AugmentConfig, image_shape: tuple[int, ...], classes: int) -> Callable:
    """The compiled function (teacher's variables, data, key data, draw) -> arrays by name of the draw's views."""
    augmentation = create_augmentation(augment, image_shape)

    def step(variables: Any, data: Data, key: jax.Array, draw: Draw) -> dict[str, jax.Array]:
        x, _ = make_views(data, draw, jax.random.wrap_key_data(key), augmentation, augment.finite_views)

        def logits(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            outputs = apply(variables, x)
            return outputs.logits, outputs.hidden

        said, pull, hidden = jax.vjp(logits, x, has_aux=True)
        arrays = {"logits": said} | {f"hidden-{stage}": hidden[stage] for stage in reads.hidden}
        if reads.jacobian:
            # Row c of every view's Jacobian is the input gradient of the sum of the views' logits c.
            one_hot = jnp.broadcast_to(jnp.eye(classes)[:, None], (classes, *said.shape))
            arrays["jacobian"] = jnp.moveaxis(jax.vmap(pull)(one_hot)[0], 0, 1)
        return arrays

    return parallel.on_one_device(step)
