"""Whether to compute what the teacher says of each view once, ahead of training: what it would hold, cost and save."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from wdkd.config import CacheConfig, Config
from wdkd.errors import UsageError
from wdkd.methods import Reads, Stage
from wdkd.teacher import Teacher

MIB = 2**20
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a record holds: of `views` views, every array's shape (without the views' axis) and type."""

    views: int
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.views * math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())


def contents(reads: Reads, views: int, teacher: Teacher, precision: str) -> Contents:
    """The contents of a record for what stages read: logits in float32, all else in `precision`."""
    image = jax.ShapeDtypeStruct((1, *teacher.image_shape), jnp.float32)
    hidden = jax.eval_shape(teacher.apply, teacher.variables, image).hidden
    shapes = {"logits": (teacher.classes,)}
    if reads.jacobian:
        shapes["jacobian"] = (teacher.classes, *teacher.image_shape)
    shapes |= {f"hidden-{stage}": hidden[stage].shape[1:] for stage in reads.hidden}
    return Contents(views, shapes, {name: DTYPES["float32" if name == "logits" else precision] for name in shapes})


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to record, None for nothing, and why, in a line for the user."""

    reads: Reads | None
    why: str


def choose(config: Config, stages: tuple[Stage, ...], steps: tuple[int, ...], images: int, teacher: Teacher) -> Choice:
    """Whether to record the teacher, for stages of so many steps on so many training images.

    Costs are in passes of the teacher over one image: recording takes 1, and 1 more per class for the Jacobian; a step with
    the live teacher takes `Reads.passes` for each image of the batch.
    It depends on nothing but the config and the data, so a resumed run does as it did before. A teacher of outputs alone is its record.

    Raises:
      UsageError: the cache is demanded (mode "on") and there are no fixed views, nothing can be recorded, or it is over budget.
    """
    taught = [(stage, count) for stage, count in zip(stages, steps, strict=True) if stage.needs_teacher]
    reads = merge([stage.reads for stage, _ in taught if stage.reads])
    views = config.augment.finite_views
    if not taught:
        return Choice(None, "")
    if teacher.outputs is not None:
        return Choice(Reads(), "")
    if config.cache.mode == "off":
        return Choice(None, "")
    if reads is None:
        return refuse(config.cache, "the objective needs more of the teacher than can be recorded", "use --cache.mode off")
    if views is None:
        why = f"augmentation {config.augment.name!r} draws a fresh view at every visit"
        return refuse(config.cache, why, "fix some with --augment.views K")
    size = contents(reads, images * views, teacher, config.cache.precision).size
    needs = f"{images * views:,} views need {size / MIB:,.1f} MiB"
    if size > config.cache.budget * MIB:
        remedy = "raise --cache.budget, use --cache.precision bfloat16 or fewer views"
        return refuse(config.cache, f"{needs}, over the budget of {config.cache.budget:,} MiB", remedy)
    cost = images * views * (1 + teacher.classes * reads.jacobian)
    saved = config.train.batch_size * sum(count * stage.reads.passes for stage, count in taught if stage.reads)
    passes = f"recording takes {cost:,} passes of the teacher and saves {saved:,} in {sum(steps):,} steps"
    if config.cache.mode == "auto" and saved <= cost:
        return Choice(None, f"teacher cache not used: {passes}, so it would not pay")
    return Choice(reads, f"teacher cache: {needs} ({config.cache.precision}); {passes}")


def merge(reads: list[Reads]) -> Reads | None:
    """All that any of them takes."""
    if not reads:
        return None
    hidden = sorted({stage for one in reads for stage in one.hidden})
    return Reads(any(one.jacobian for one in reads), tuple(hidden), max(one.passes for one in reads))


def refuse(config: CacheConfig, why: str, remedy: str) -> Choice:
    """No cache, or an error where it is demanded."""
    if config.mode == "on":
        raise UsageError(f"cache.mode is on, but {why}; {remedy}")
    return Choice(None, f"teacher cache not used: {why} ({remedy}); the teacher runs in every step")
