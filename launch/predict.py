"""Says what an exported network sees in image files: label, probability, the three most probable classes, and the teacher's word.

An ONNX export needs onnxruntime and neither JAX nor flax; the other formats what launch/export.py says of them.
"""

import dataclasses
import json
from typing import Annotated

import tyro

from wdkd import parsing
from wdkd.errors import UsageError
from wdkd.exported import Exported, read_exported
from wdkd.predict import Judge, Prediction, find_images, predict, read_judge, read_judge_as_in


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    model: str
    """File that launch/export.py wrote, of any format."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files of any size (png, jpg, webp, bmp), or folders of them."""
    teacher: str | None = None
    """Directory of the teacher's run, or an export of it: says whether it agrees."""
    run: str | None = None
    """Directory of the student's run: its teacher is asked, an ONNX file too; with it, --teacher takes all that training takes."""
    json: bool = False
    """Print one JSON object for each image instead."""


def main(arguments: Arguments) -> None:
    """Predicts and prints, image by image; those that cannot be read are named at the end."""
    if not arguments.images:
        raise UsageError("no images are given; give image files, or folders of them")
    student = read_exported(arguments.model)
    paths = find_images(arguments.images)
    judge = _judge(arguments, student)
    agreed, unread = [], []
    for answer in predict(student, paths, judge):
        if isinstance(answer, Prediction):
            agreed.append(answer.agrees)
            print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) if arguments.json else answer.line(), flush=True)
        else:
            unread.append(answer)
    if judge is not None and len(agreed) > 1 and not arguments.json:
        print(f"the teacher agrees on {sum(agreed)} of {len(agreed)} images")
    if unread:
        raise UsageError(f"{len(unread)} of {len(paths)} images cannot be read, first {unread[0]}")


def _judge(arguments: Arguments, student: Exported) -> Judge | None:
    if arguments.run is not None:
        return read_judge_as_in(arguments.run, arguments.teacher, student)
    return None if arguments.teacher is None else read_judge(arguments.teacher, student)


if __name__ == "__main__":
    parsing.main(Arguments, main, description=__doc__, flags=True)
