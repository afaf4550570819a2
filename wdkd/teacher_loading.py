"""Any teacher for a run's images: read by what it is given as, and, where it is from elsewhere, looked at first."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from wdkd.config import Config, TeacherInputConfig
from wdkd.data import Split
from wdkd.errors import UsageError
from wdkd.function_teacher import read_function_teacher
from wdkd.outputs_teacher import read_outputs_teacher
from wdkd.run_directory import Run, read_teacher
from wdkd.teacher import Teacher, check_agreement
from wdkd.teacher_check import check_teacher
from wdkd.teacher_input import given_names
from wdkd.teacher_source import Source, find_source
from wdkd.wording import shown


def load_teacher(config: Config, split: Split, total: int, *, show: bool) -> Teacher | None:
    """The teacher of a config for the split's images, checked; None where there is none. `show`: what was found, on stderr.

    Args:
      total: images of the data set's whole training split.

    Raises:
      UsageError: if it cannot be read, does not fit the data, or is no better than chance on the training images.
    """
    if config.teacher is None:
        return None
    source = find_source(config.teacher)
    read = reader(config.teacher, source, **shape_of(split, total))
    teacher = read(config.teacher_input)
    resizable = config.data.folder is not None
    check_agreement(teacher, classes=split.num_classes, image_shape=split.image_shape, resizable=resizable)
    # A run of wdkd has its test accuracy, and knows how it is given images.
    if source.kind != "run":
        method = config.method
        needs = method.name == "sobolev" or (method.radius > 0 and method.through_teacher)
        again = None if source.kind == "outputs" else read
        found = check_teacher(teacher, split, config.teacher_input, again, needs_gradients=needs)
        if show:
            print(found, file=sys.stderr, flush=True)
    return teacher


def with_classes(split: Split, config: Config) -> Split:
    """The split; of images without classes, with those of the teacher: numbers for a run's, else the names that are given.

    Raises:
      UsageError: if nothing says which classes the teacher has.
    """
    if split.class_names or config.teacher is None:
        return split
    source = find_source(config.teacher)
    if source.kind == "run":
        return split.with_classes([str(number) for number in range(read_teacher(source.location).classes)])
    if config.teacher_input.classes is None:
        raise UsageError(
            f"the images of {split.name} have no classes, so those of teacher {shown(config.teacher, 200)} must be named; "
            "give them, or a text file of them, to --teacher-input.classes"
        )
    return split.with_classes(given_names(config.teacher_input.classes))


def find_teacher(run: Run, given: str | None, *, answers: bool) -> tuple[str, Source] | None:
    """The teacher that is given, else the one that the run was trained with: as it is written, and what that is; None where it had none.

    Args:
      answers: whether it is needed for its answers to any images; a file of outputs has those to the training images alone.

    Raises:
      UsageError: if it is of no known kind or cannot answer, or is the run's own and gone or Python code.
    """
    named = given or run.teacher_directory
    if named is None:
        return None
    source, what = find_source(named), f"the teacher {shown(named, 300)}"
    if given is None and source.kind == "function":
        # A run's files may come from elsewhere, and would say which code is called.
        raise UsageError(f"{what} is Python code, which is called only if --teacher names it")
    if given is None and not source.exists:
        raise UsageError(f"{what} is no longer there; give --teacher")
    if answers and source.kind == "outputs":
        raise UsageError(f"of {what} the outputs alone are known; give one that can be asked to --teacher")
    return named, source


def shape_of(split: Split, total: int) -> dict[str, Any]:
    """What `reader` is told of a split of a training split of `total` images."""
    return {"image_shape": split.image_shape, "class_names": split.class_names, "rows": (split.train_indices, total)}


def reader(
    given: str,
    source: Source,
    *,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    rows: tuple[np.ndarray, int] | None = None,
) -> Callable[[TeacherInputConfig], Teacher]:
    """The function that reads a teacher, in the way that options say, for images (H, W, C) of these classes.

    Args:
      rows: the training images, as numbers into the whole training split, and how many that has; a file of outputs needs them.

    Raises:
      UsageError: where what reading it takes is not installed.
    """
    data = {"image_shape": tuple(image_shape), "class_names": class_names}
    if source.kind == "run":
        # Results say where it is as it was given, but for a shipped name.
        directory = given if os.path.abspath(given) == source.location else source.location
        return lambda options: read_teacher(directory)
    if source.kind == "function":
        return functools.partial(read_function_teacher, source.location, **data)
    if source.kind == "outputs":
        indices, total = rows
        return functools.partial(read_outputs_teacher, source.location, **data, indices=indices, total=total, given=given)
    try:
        from wdkd.onnx_teacher import read_onnx_teacher
    except ImportError as error:
        raise UsageError(
            f"teacher {given} is an ONNX file, and {error.name or 'what reads it'} is not installed; pip install 'wdkd[onnx]', "
            "or in a checkout: pip install -e '.[onnx]'"
        ) from error
    return functools.partial(read_onnx_teacher, source.location, **data, given=given)
