"""What stands between a run's images and a teacher from elsewhere: pixels in its own form, its outputs as logits of the data's classes."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wdkd.config import TeacherInputConfig
from wdkd.errors import UsageError
from wdkd.files import read_file
from wdkd.models import Outputs
from wdkd.wording import shown

TINY = 1e-30
"""Probabilities below it are taken for it: their logarithm must be finite, and its derivative too in float32."""
LONGEST_NAMES = 2**20
"""Bytes of the largest file of class names that is read."""


@dataclasses.dataclass(frozen=True)
class Interface:
    """How one teacher is given images of one size, and what its outputs are. All of it is resolved: nothing is left to a default."""

    options: TeacherInputConfig
    channels: int
    """Of the teacher's input: 1 or 3."""
    size: tuple[int, int]
    """(H, W) of the teacher's input."""
    order: tuple[int, ...] | None
    """For each of the data's classes, the number of the teacher's output; None: the same order."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the teacher takes it."""
        return (*self.size, self.channels) if self.options.layout == "nhwc" else (self.channels, *self.size)

    def describe(self) -> str:
        """All that it depends on, in words: what is recorded of a teacher depends on it too."""
        return repr(dataclasses.astuple(self))

    def prepare(self, x: jax.Array) -> jax.Array:
        """Pixels (B, H, W, C) in [0, 1] as the teacher takes them: (scale * x - mean) / std, resized, in its layout. Differentiable.

        Resizing is bilinear, with antialiasing where images become smaller.
        """
        options = self.options
        if x.shape[-1] < self.channels:
            x = jnp.repeat(x, self.channels, axis=-1)
        if x.shape[1:3] != self.size:
            x = jax.image.resize(x, (x.shape[0], *self.size, self.channels), "bilinear")
        x = x[..., ::-1] if options.channels == "bgr" else x
        x = x * 255 if options.value_range == "0-255" else x
        x = x if options.mean is None else x - np.asarray(options.mean, np.float32)
        x = x if options.std is None else x / np.asarray(options.std, np.float32)
        return x if options.layout == "nhwc" else x.transpose(0, 3, 1, 2)

    def logits(self, outputs: jax.Array) -> jax.Array:
        """The teacher's outputs (B, classes) as logits of the data's classes, float32."""
        outputs = outputs.astype(jnp.float32)
        outputs = outputs if self.order is None else outputs[:, np.asarray(self.order)]
        return jnp.log(jnp.maximum(outputs, TINY)) if self.options.outputs == "probabilities" else outputs


def interface(
    options: TeacherInputConfig,
    image_shape: tuple[int, ...],
    class_names: Sequence[str],
    *,
    where: str,
    channels: int | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> Interface:
    """The interface of a teacher whose own input has so many channels and such a size, None where it takes any.

    Args:
      image_shape: (H, W, C) of the data.
      class_names: the data's.
      where: what the teacher is called in errors.

    Raises:
      UsageError: if the options, the teacher and the data do not go together.
    """
    if channels is None:
        channels = max(image_shape[2], len(options.mean or ()), len(options.std or ()))
    if channels not in (1, 3):
        raise UsageError(f"teacher {where} takes images of {channels} channels{_other_layout(options)}; only 1 and 3 are known")
    if channels < image_shape[2]:
        raise UsageError(f"teacher {where} takes grey images and the data has {image_shape[2]} channels; give a teacher of colour images")
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"teacher_input.{name} has {len(values)} numbers and teacher {where} {channels} channels; give one for each")
    if options.channels == "bgr" and channels == 1:
        raise UsageError(f"teacher_input.channels is bgr, but teacher {where} takes grey images; leave it out")
    sides = zip(size, options.size or (None, None), image_shape, strict=False)
    chosen = tuple(own or given or data for own, given, data in sides)
    if options.size is not None and chosen != options.size:
        raise UsageError(
            f"teacher_input.size is {_sides(options.size)} and teacher {where} takes {_sides(chosen)}{_other_layout(options)}; leave it out"
        )
    return Interface(options, channels, chosen, class_order(options.classes, class_names))


def _other_layout(options: TeacherInputConfig) -> str:
    return f" with --teacher-input.layout {options.layout}"


def _sides(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))


def class_order(theirs: tuple[str, ...] | None, ours: Sequence[str]) -> tuple[int, ...] | None:
    """For each of our classes, its place among theirs, which are names or one text file of names; None where the order is the same.

    Raises:
      UsageError: if they are not the same names, or the file cannot be read.
    """
    if theirs is None:
        return None
    names = given_names(theirs)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"teacher_input.classes has {_listed(repeated)} more than once; name each class once")
    missing, foreign = [name for name in ours if name not in names], [name for name in names if name not in ours]
    if missing or foreign:
        parts = [f"lacks {_listed(missing)}" if missing else "", f"has {_listed(foreign)}, which the data has not" if foreign else ""]
        raise UsageError(f"teacher_input.classes {' and '.join(filter(None, parts))}; name the data's classes: {_listed(ours)}")
    order = tuple(names.index(name) for name in ours)
    return None if order == tuple(range(len(order))) else order


def given_names(given: tuple[str, ...]) -> tuple[str, ...]:
    """The names of classes that were given: these, or those in one text file. Raises UsageError."""
    return read_names(given[0]) if len(given) == 1 else given


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(repr(shown(name)) for name in names[:10]) + more


def read_names(path: str) -> tuple[str, ...]:
    """The names in a text file, one a line, blank lines left out. Raises UsageError."""
    try:
        text = read_file(path, LONGEST_NAMES).decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(
            f"teacher_input.classes is {shown(path)!r}, which is no file; give all names of the teacher's classes, or a text file"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"teacher_input.classes: {Path(path)} is no text in UTF-8 ({error.reason}); write one name a line") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def adapt(network: Callable[[Any, jax.Array], jax.Array], between: Interface) -> Callable[[Any, jax.Array], Outputs]:
    """A network (variables, images as it takes them) -> outputs (B, classes) as a Teacher's apply."""

    def apply(variables: Any, x: jax.Array) -> Outputs:
        return Outputs(between.logits(network(variables, between.prepare(x))), {})

    return apply


def check_outputs(shape: Sequence[int], images: int, classes: int, where: str) -> None:
    """Raises UsageError unless outputs of this shape are a row for each image of one number per class."""
    if len(shape) != 2 or shape[0] != images:
        what = f"an array of {_sides(shape)}" if len(shape) else "one number"
        raise UsageError(
            f"teacher {where} gives {what} for {images} images; it must give a row of {classes} numbers, one per class, for each"
        )
    if shape[1] != classes:
        raise UsageError(f"teacher {where} has {shape[1]} classes and the data {classes}; give a teacher of the data's classes")
