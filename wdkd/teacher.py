"""A teacher is x -> Outputs, always in inference mode, whatever it was loaded from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from wdkd.errors import UsageError
from wdkd.models import Outputs, apply_network


@dataclasses.dataclass(frozen=True)
class Teacher:
    """`apply(variables, x)` gives the teacher's Outputs for pixels x (B, H, W, C) in [0, 1].

    The variables are an argument, never a constant of the compiled step. The rest says where the teacher came from.
    """

    apply: Callable[[Any, jax.Array], Outputs]
    variables: Any
    classes: int
    image_shape: tuple[int, ...]
    path: str
    hash: str
    accuracy: float | None


@functools.lru_cache(maxsize=64)
def inference(model: nn.Module) -> Callable[[Any, jax.Array], Outputs]:
    """A Linen network as (variables, x) -> Outputs with its running statistics fixed; equal networks give the same function."""

    def apply(variables: Any, x: jax.Array) -> Outputs:
        return apply_network(model, variables, x, train=False)

    return apply


def check_agreement(teacher: Teacher, *, classes: int, image_shape: tuple[int, ...]) -> None:
    """Raises UsageError unless the teacher has the student's classes and image shape."""
    if teacher.classes != classes:
        raise UsageError(f"teacher {teacher.path} has {teacher.classes} classes and the data {classes}; train a teacher on this data set")
    if tuple(teacher.image_shape) != tuple(image_shape):
        theirs, ours = ("×".join(map(str, shape)) for shape in (teacher.image_shape, image_shape))
        raise UsageError(f"teacher {teacher.path} takes {theirs} images and the data has {ours}; train a teacher on this data set")
