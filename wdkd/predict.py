"""What an exported network says of image files, and whether its teacher agrees."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wdkd.errors import UsageError
from wdkd.exported import Exported, pixels, read_exported
from wdkd.images import SUFFIXES, read_image
from wdkd.wording import shown

TOP = 3
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was said of one image."""

    path: str
    label: str
    probability: float
    top: list[tuple[str, float]]
    """The most probable classes, at most `TOP`, each with its probability."""
    teacher: str | None = None
    """What the teacher calls it; None without one."""
    agrees: bool | None = None

    def line(self) -> str:
        """All of it."""
        others = ", ".join(f"{name} {probability:.1%}" for name, probability in self.top[1:])
        said = f"{shown(self.path, 300)}: {self.label} {self.probability:.1%}" + (f" ({others})" if others else "")
        if self.teacher is None:
            return said
        return said + ("; the teacher agrees" if self.agrees else f"; the teacher says {self.teacher}")


@dataclasses.dataclass(frozen=True)
class Judge:
    """A teacher to compare with: images of its size -> the name of each one's class."""

    size: tuple[int, int]
    channels: int
    names: Sequence[str]
    logits: Callable[[np.ndarray], np.ndarray]


def find_images(given: Sequence[str | os.PathLike]) -> list[Path]:
    """The files given, and of each folder those below it, in the order of their names, that end like images and are not hidden.

    Raises:
      UsageError: for a path that is not there, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not _is_hidden(file, path))
            if not below:
                raise UsageError(f"{shown(path, 300)} has no image ({', '.join(SUFFIXES)}); give another folder, or the files themselves")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise UsageError(f"{shown(path, 300)} does not exist; give image files, or folders of them")
    return found


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def read_judge(path: str | os.PathLike, student: Exported) -> Judge:
    """A teacher, from its run's directory or an exported file.

    Raises:
      UsageError: if it cannot be read, or its classes are not the student's, in any order.
    """
    if Path(path).is_dir():
        judge = _judge_of_run(path)
    else:
        try:
            exported = read_exported(path)
        except UsageError as error:
            raise UsageError(f"teacher {error}; for any other teacher, give the student's run to --run too") from error
        height, width, channels = exported.description.image_shape
        judge = Judge((height, width), channels, exported.description.class_names, lambda pixels: exported(pixels)[0])
    return _of_same_classes(judge, path, student)


def read_judge_as_in(directory: str | os.PathLike, given: str | None, student: Exported) -> Judge:
    """A teacher in any form that training takes, given images as in the student's run.

    Args:
      directory: of that run.
      given: the teacher; None: that of the run. Python code must be given: a run's files may come from elsewhere.

    Raises:
      UsageError: if there is none, it is gone or cannot be read, its outputs alone are known, or its classes are not the student's.
    """
    from wdkd.run_directory import read_run
    from wdkd.teacher_loading import find_teacher, reader

    run = read_run(directory)
    found = find_teacher(run, given, answers=True)
    if found is None:
        raise UsageError(f"{shown(directory, 300)} has no teacher; leave --run out")
    named, source = found
    shape = {"image_shape": run.input.image_shape, "class_names": run.input.class_names}
    teacher = reader(named, source, **shape)(run.config.teacher_input)
    return _of_same_classes(_judge(teacher, **shape), named, student)


def _of_same_classes(judge: Judge, path: str | os.PathLike, student: Exported) -> Judge:
    ours = student.description.class_names
    if sorted(judge.names) != sorted(ours):
        strange = sorted(set(judge.names) ^ set(ours))
        raise UsageError(
            f"teacher {shown(path, 300)} has {len(judge.names)} classes and {shown(student.path, 300)} {len(ours)}, which differ in "
            f"{shown(', '.join(strange[:5]), 200) or 'number'}; give the teacher that it was distilled from"
        )
    return judge


def _judge_of_run(path: str | os.PathLike) -> Judge:
    # An exported network does without these.
    from wdkd.run_directory import read_run, read_teacher

    given = read_run(path).input
    return _judge(read_teacher(path), image_shape=given.image_shape, class_names=given.class_names)


def _judge(teacher: Any, *, image_shape: Sequence[int], class_names: Sequence[str]) -> Judge:
    import jax

    apply = jax.jit(lambda variables, pixels: teacher.apply(variables, pixels).logits)
    height, width, channels = image_shape
    return Judge((height, width), channels, class_names, lambda pixels: np.asarray(apply(teacher.variables, pixels)))


def predict(student: Exported, paths: Sequence[Path], judge: Judge | None = None) -> Iterator[Prediction | UsageError]:
    """For each image in turn what is said of it, or why it cannot be read.

    An image of any size is made as large as the network takes as `images.read_image` says, just as folders of training images are.
    """
    for start in range(0, len(paths), BATCH):
        yield from _predict_batch(student, paths[start : start + BATCH], judge)


def _predict_batch(student: Exported, paths: Sequence[Path], judge: Judge | None) -> list[Prediction | UsageError]:
    height, width, channels = student.description.image_shape
    answers: list[Prediction | UsageError | None] = [None] * len(paths)
    read, seen = [], []
    for index, path in enumerate(paths):
        try:
            image = read_image(path, (height, width), channels).pixels
            seen.append(None if judge is None else read_image(path, judge.size, judge.channels).pixels)
            read.append((index, image))
        except ValueError as error:
            answers[index] = UsageError(f"{shown(path, 300)}: {error}")
    if read:
        _, probabilities = student(pixels(np.stack([image for _, image in read])))
        said = [None] * len(read) if judge is None else [judge.names[row.argmax()] for row in judge.logits(pixels(np.stack(seen)))]
        for (index, _), row, teacher in zip(read, probabilities, said, strict=True):
            answers[index] = _prediction(paths[index], row, student.description.class_names, teacher)
    return answers


def _prediction(path: Path, probabilities: np.ndarray, names: Sequence[str], teacher: str | None) -> Prediction:
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    top = [(names[index], float(probabilities[index])) for index in order]
    label, probability = top[0]
    return Prediction(str(path), label, probability, top, teacher, None if teacher is None else teacher == label)
