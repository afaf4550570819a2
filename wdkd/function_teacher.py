"""A teacher from Python code: a function, module:function, that is called without arguments and returns (apply, variables)."""

import contextlib
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wdkd.checkpoint import tree_hash
from wdkd.config import TeacherInputConfig
from wdkd.errors import UsageError
from wdkd.teacher import Teacher
from wdkd.teacher_input import adapt, check_outputs, interface
from wdkd.wording import shown


def read_function_teacher(entry: str, options: TeacherInputConfig, *, image_shape: tuple[int, ...], class_names: Sequence[str]) -> Teacher:
    """What `entry`, module:function, returns as a teacher of the data's classes for images of its shape (H, W, C).

    The function returns (apply, variables): apply(variables, images) gives outputs (B, classes); images are as `options` say, the
    layout too: nchw, unless --teacher-input.layout is nhwc. Its hash is of the variables and of the module's source.

    Raises:
      UsageError: if it cannot be imported or called, returns something else, or its outputs do not match the data's classes.
    """
    with _working_directory_importable():
        module, function = _load(entry)
        with _words(entry, "raises"):
            made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise UsageError(f"teacher {entry} returns {shown(type(made).__name__)}; it must return (apply, variables)")
    network, variables = made
    with _words(entry, "returns variables that are no arrays:"):
        variables = jax.tree.map(_array, variables)
    between = interface(options, image_shape, class_names, where=entry)
    network = functools.partial(_called, entry, network)
    found = jax.eval_shape(network, variables, jax.ShapeDtypeStruct((2, *between.shape), jnp.float32))
    check_outputs(found.shape, 2, len(class_names), entry)
    return Teacher(
        apply=adapt(network, between),
        variables=variables,
        classes=len(class_names),
        image_shape=tuple(image_shape),
        path=entry,
        hash=hashlib.sha256(f"{entry} {tree_hash({'variables': variables})}".encode() + _source(module)).hexdigest(),
        accuracy=None,
        read_as=between.describe(),
    )


def _load(entry: str) -> tuple[ModuleType, Callable[[], Any]]:
    name, _, attribute = entry.partition(":")
    with _words(entry, "cannot be imported:"):
        module = importlib.import_module(name)
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "is no function" if hasattr(module, attribute) else "does not exist"
        raise UsageError(f"teacher {entry}: {attribute} {what} in {getattr(module, '__file__', name)}; give module:function")
    return module, function


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """A script's own folder is on sys.path, but not the working directory."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


@contextlib.contextmanager
def _words(entry: str, what: str) -> Iterator[None]:
    """Whatever other people's code raises, in one line."""
    try:
        yield
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"teacher {entry} {what} {type(error).__name__}: {shown(line, 200)}") from error


def _array(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype == object:
        raise TypeError(f"a leaf is a {type(leaf).__name__}")
    return array


def _called(entry: str, network: Callable[[Any, jax.Array], jax.Array], variables: Any, x: jax.Array) -> jax.Array:
    with _words(entry, f"does not run on images of {'×'.join(map(str, x.shape))} (see --teacher-input.layout and size):"):
        outputs = network(variables, x)
        if not hasattr(outputs, "shape"):
            raise TypeError(f"apply gives a {type(outputs).__name__}, not an array of logits")
        return outputs


def _source(module: ModuleType) -> bytes:
    file = inspect.getsourcefile(module)
    return b"" if file is None else Path(file).read_bytes()
