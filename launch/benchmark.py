"""Times every method's step, beside PyTorch, and how long a run takes to its first one: numbers, a table with targets, a plot."""

import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Literal

from wdkd import command_line, parallel
from wdkd.benchmark import Setup
from wdkd.benchmark_report import judge, write_report
from wdkd.config import MethodConfig
from wdkd.errors import UsageError
from wdkd.files import write_json
from wdkd.measure import describe_setup, measure_growth, measure_start, measure_steps
from wdkd.methods import METHODS, create_stages
from wdkd.models import MIN_SIDE


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: str = "results/benchmarks"
    """Directory for <device>.json, .md and .png."""
    parts: tuple[Literal["steps", "growth", "start"], ...] = ("steps", "growth", "start")
    """What to measure; all of it takes five to ten minutes on two cores."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Whose steps to time; kd and wdkd, which ratios are taken of, always are."""
    rounds: int = 9
    """Times that each step is timed, in turn with all others."""
    pytorch: Literal["auto", "on", "off"] = "auto"
    """Whether to time PyTorch's steps too; auto: where it is installed (pip install 'wdkd[benchmark]')."""
    batch_size: int = 128
    """Images in a batch, over all devices."""
    images_per_class: int = 50
    """Images whose teacher is recorded."""
    student_width: int = 16
    """Channels of the student's first stage (cnn, group norm)."""
    teacher_width: int = 32
    """Channels of the teacher's first stage (resnet20, batch norm)."""
    side: int = 32
    """Height and width of an image."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What convolutions are computed in."""
    steps_per_call: int = 1
    """Steps in one compiled call; more than 1 is for GPU and TPU."""


def main(arguments: Arguments) -> None:
    """Measures, prints and writes."""
    for name in ("rounds", "batch_size", "images_per_class", "student_width", "teacher_width", "steps_per_call"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"{name} is {getattr(arguments, name)}; it must be at least 1")
    if not arguments.parts:
        raise UsageError("parts is empty; name at least one of steps, growth, start")
    for name in arguments.methods:
        create_stages(MethodConfig(name=name))
    if arguments.side < MIN_SIDE:
        raise UsageError(f"side is {arguments.side}; it must be at least {MIN_SIDE}")
    parallel.check_batch(arguments.batch_size)
    parallel.check_precision(arguments.precision)
    found = measured(arguments)
    path = Path(arguments.out) / f"{found['device'].replace(' ', '-').lower()}.json"
    write_json(path, found)
    table, picture = write_report(found, path)
    print(table.read_text())
    missed = [row["target"] for row in judge(found) if row["met"] is False]
    print(f"written: {path}, {table}, {picture}; {len(missed)} targets missed{': ' + '; '.join(missed) if missed else ''}")


def measured(arguments: Arguments) -> dict:
    """The parts that were asked for."""
    setup = Setup(
        images_per_class=arguments.images_per_class,
        batch_size=arguments.batch_size,
        side=arguments.side,
        precision=arguments.precision,
        steps_per_call=arguments.steps_per_call,
    )
    setup = dataclasses.replace(
        setup,
        student=dataclasses.replace(setup.student, width=arguments.student_width),
        teacher=dataclasses.replace(setup.teacher, width=arguments.teacher_width),
    )
    installed = importlib.util.find_spec("torch") is not None
    if arguments.pytorch == "on" and not installed:
        raise UsageError("pytorch is on, but PyTorch is not installed; pip install 'wdkd[benchmark]', or use --pytorch off")
    found = describe_setup(setup, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        # First, while this process holds no other threads than it needs.
        if "start" in arguments.parts:
            found["start"] = measure_start(setup, Path(folder) / "start")
        if "steps" in arguments.parts:
            with_torch = installed and arguments.pytorch != "off"
            methods = tuple(dict.fromkeys((*arguments.methods, "kd", "wdkd")))
            found |= measure_steps(setup, methods, arguments.rounds, Path(folder) / "record", with_torch=with_torch, show=True)
        if "growth" in arguments.parts:
            found["growth"] = measure_growth(setup, max(1, arguments.rounds // 3), show=True)
    return found


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__)
