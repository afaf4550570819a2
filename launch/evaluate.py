"""Evaluates the newest checkpoint of a run from its directory alone: accuracy, agreement, calibration, confusion matrix."""

import dataclasses
from pathlib import Path
from typing import Literal

from wdkd import command_line
from wdkd.evaluate import evaluate_checkpoint
from wdkd.figures import confusion_figure
from wdkd.result import write_result


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: str
    """Directory of a run."""
    split: Literal["test", "validation"] | None = None
    """Split to evaluate on; None: the run's own."""
    data_dir: str | None = None
    """Where TFDS keeps the data; None: as in the run, else $TFDS_DATA_DIR."""
    teacher: str | None = None
    """Directory of the teacher that agreement is measured with; None: where it was in training."""
    out: str | None = None
    """Directory for evaluation.json and confusion.png; None: the run's directory."""


def main(arguments: Arguments) -> None:
    """Evaluates, prints and writes."""
    result = evaluate_checkpoint(arguments.run, split=arguments.split, data_dir=arguments.data_dir, teacher=arguments.teacher)
    out = Path(arguments.out or arguments.run)
    write_result(out / "evaluation.json", result)
    picture = confusion_figure(result.evaluation, out / "confusion.png")
    print(command_line.summary(result))
    for name, accuracy in zip(result.evaluation.class_names, result.evaluation.per_class_accuracy, strict=True):
        print(f"  {name:<24} {accuracy:.2%}")
    print(f"written: {out / 'evaluation.json'}, {picture}")


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__)
