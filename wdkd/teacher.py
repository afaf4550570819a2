"""A teacher is x -> Outputs, always in inference mode, whatever it was loaded from; and what was recorded of it says the same."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import struct

from wdkd.errors import UsageError
from wdkd.models import Outputs, apply_network


@dataclasses.dataclass(frozen=True)
class Teacher:
    """`apply(variables, x)` gives the teacher's Outputs for pixels x (B, H, W, C) in [0, 1].

    The variables are an argument, never a constant of the compiled step. The rest says where the teacher came from. Where its
    outputs alone are known, `apply` is None and `outputs` has them.
    """

    apply: Callable[[Any, jax.Array], Outputs] | None
    variables: Any
    classes: int
    image_shape: tuple[int, ...]
    path: str
    hash: str
    accuracy: float | None
    apply_bfloat16: Callable[[Any, jax.Array], Outputs] | None = None
    """The same with convolutions in bfloat16, where the network has such a form."""
    read_as: str = ""
    """Of a teacher from elsewhere: how it is given images and its outputs are read, as far as `variables` do not say it."""
    outputs: np.ndarray | None = None
    """Logits (n, classes) float32 of the run's training images, one view each, where nothing else is known of it."""


@functools.lru_cache(maxsize=64)
def inference(model: nn.Module) -> Callable[[Any, jax.Array], Outputs]:
    """A Linen network as (variables, x) -> Outputs with its running statistics fixed; equal networks give the same function."""

    def apply(variables: Any, x: jax.Array) -> Outputs:
        return apply_network(model, variables, x, train=False)

    return apply


# --- the teacher at the views of a batch --------------------------------------------------------------------------------

TeacherAt = Callable[[Any, jax.Array], Callable[[jax.Array], Outputs]]
"""(what is known of the teacher, rows (b,) of the views in a batch) -> (x -> Outputs), valid around those views."""


@functools.lru_cache(maxsize=64)
def live(apply: Callable[[Any, jax.Array], Outputs]) -> TeacherAt:
    """The teacher itself, at any x; what is known of it are its variables."""

    def at(variables: Any, rows: jax.Array) -> Callable[[jax.Array], Outputs]:
        return functools.partial(apply, variables)

    return at


@struct.dataclass
class Record:
    """What a teacher says of each of V views. The parts that nobody asked for are None or absent."""

    logits: jax.Array
    """(V, classes) float32."""
    jacobian: jax.Array | None
    """(V, classes, H, W, C): of the logits with respect to the pixels, in logits per pixel unit."""
    hidden: dict[str, jax.Array]
    """By stage, (V, h, w, c)."""


def recorded(record: Record, rows: jax.Array) -> Callable[[jax.Array], Outputs]:
    """The teacher's linearisation logits + J (x' - x) at each recorded view x.

    No more than the teacher's value and first derivative at x ever enters mean l + epsilon * mean ||grad_x l|| or its parameter
    gradient, so those are what the live teacher gives. Hidden features are constants here.
    """
    logits = record.logits[rows]
    jacobian = None if record.jacobian is None else record.jacobian[rows].astype(logits.dtype)
    hidden = {stage: features[rows].astype(logits.dtype) for stage, features in record.hidden.items()}
    return lambda x: Outputs(logits if jacobian is None else _linearized(logits, jacobian, x), hidden)


@jax.custom_jvp
def _linearized(logits: jax.Array, jacobian: jax.Array, x: jax.Array) -> jax.Array:
    """logits + J (x' - x) at x' = x: the value without the product that is 0, the derivative with J."""
    return logits


@_linearized.defjvp
def _linearized_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    logits, jacobian, _ = primals
    moved = tangents[2]
    # A sum of products: as a batch of matrix products, XLA would first transpose the Jacobian.
    return logits, tangents[0] + (jacobian * moved[:, None]).sum((2, 3, 4))


def check_agreement(teacher: Teacher, *, classes: int, image_shape: tuple[int, ...], resizable: bool = False) -> None:
    """Raises UsageError unless the teacher has the student's classes and image shape; `resizable` images can be had in its shape."""
    if teacher.classes != classes:
        raise UsageError(f"teacher {teacher.path} has {teacher.classes} classes and the data {classes}; train a teacher on this data set")
    if tuple(teacher.image_shape) != tuple(image_shape):
        theirs, ours = ("×".join(map(str, shape)) for shape in (teacher.image_shape, image_shape))
        height, width, channels = teacher.image_shape
        remedy = f"give --data.image-size {height} {width} --data.channels {channels}" if resizable else "train a teacher on this data set"
        raise UsageError(f"teacher {teacher.path} takes {theirs} images and the data has {ours}; {remedy}")
