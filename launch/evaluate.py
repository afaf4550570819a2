"""Evaluates the newest checkpoint of a run from its directory alone: accuracy, agreement, calibration, confusion matrix.

With --verify it only checks that all files of the run are what was written, and exits with code 2 if one is not.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from wdkd import command_line
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_checkpoint
from wdkd.figures import confusion_figure
from wdkd.result import write_result
from wdkd.verify import summary, verify


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: str
    """Directory of a run."""
    split: Literal["test", "validation"] | None = None
    """Split to evaluate on; None: the run's own."""
    data_dir: str | None = None
    """Where TFDS keeps the data; None: as in the run, else $TFDS_DATA_DIR."""
    folder: str | None = None
    """The folder of the images, of a run with --data.folder whose folder has moved; None: as in the run."""
    teacher: str | None = None
    """Teacher that agreement is measured with, in any form that distill.py takes; None: that of training."""
    out: str | None = None
    """Directory for evaluation.json and confusion.png; None: the run's directory."""
    verify: bool = False
    """Check the directory instead: every checkpoint bit by bit, config, subset, metrics and result against each other."""


def main(arguments: Arguments) -> None:
    """Verifies, or evaluates, prints and writes."""
    if arguments.verify:
        verify_all(arguments.run)
        return
    result = evaluate_checkpoint(
        arguments.run, split=arguments.split, data_dir=arguments.data_dir, folder=arguments.folder, teacher=arguments.teacher
    )
    out = Path(arguments.out or arguments.run)
    write_result(out / "evaluation.json", result)
    print(command_line.summary(result))
    if result.evaluation.accuracy is None:
        print(f"written: {out / 'evaluation.json'}")
        return
    picture = confusion_figure(result.evaluation, out / "confusion.png")
    for name, accuracy in zip(result.evaluation.class_names, result.evaluation.per_class_accuracy, strict=True):
        print(f"  {name:<24} {accuracy:.2%}")
    print(f"written: {out / 'evaluation.json'}, {picture}")


def verify_all(run: str) -> None:
    """Prints a line for each part of the run's directory. Raises UsageError if one is damaged."""
    findings = verify(run)
    print("\n".join(summary(findings)))
    damaged = [finding.part for finding in findings if finding.problem is not None]
    if damaged:
        raise UsageError(f"{len(damaged)} of {len(findings)} parts of {run} are damaged: {', '.join(damaged)}; the lines above say how")


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__, flags=True)
