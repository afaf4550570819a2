"""run(config, workdir): from a config to a trained, checkpointed and evaluated network."""

import contextlib
import os
import time
from pathlib import Path

import numpy as np

from wdkd import parallel
from wdkd.checkpoint import tree_hash
from wdkd.config import Config
from wdkd.data import Split, few_shot_split, load_dataset
from wdkd.errors import Diverged, UsageError
from wdkd.evaluate import build_result, evaluate_network
from wdkd.files import writing
from wdkd.interruption import Interruption
from wdkd.lock import locked
from wdkd.methods import Stage, create_stages
from wdkd.models import check_image_shape, variable_shapes
from wdkd.notes import note
from wdkd.result import Result, read_result, write_result
from wdkd.run_directory import Input, check_workdir, describe_run, start, subset_of
from wdkd.teacher import inference
from wdkd.teacher_loading import load_teacher, with_classes
from wdkd.teacher_source import check_source
from wdkd.trainer import Trainer


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    cache: str | os.PathLike | None = None,
    show_progress: bool = True,
    interruption: Interruption | None = None,
) -> Result:
    """Trains what `config` says in `workdir`, or goes on where an earlier call stopped, and evaluates the last step.

    A finished run is returned as it is. The README says what the directory holds. Recorded teachers are kept in the directory
    `cache`; None: in teacher-cache/ beside `workdir`. Signals are those of `interruption`; None: of one that lasts as long as the call.

    Raises:
      UsageError: for an option out of range, data or teacher that is missing or does not fit, a directory of another run, a batch
        that the devices do not divide, or a disk that cannot be written; what was complete stays, and the same call goes on from there.
      Diverged: for a loss, gradient or parameter that is not finite, which the directory's result then says too.
      Busy: if another process is at work on `workdir`.
      Interrupted: after SIGTERM or Ctrl-C; the state is saved, and the same call goes on there.
    """
    began = time.monotonic()
    stages = check(config)
    with contextlib.ExitStack() as stack:
        interruption = interruption or stack.enter_context(Interruption())
        directory = check_workdir(workdir, config)
        if (finished := finished_result(directory, config)) is not None:
            return finished
        dataset = load_dataset(config.data)
        split = few_shot_split(dataset, config.data, config.seed)
        check_image_shape(split.image_shape)
        check_labels(split, stages, config)
        show = show_progress and parallel.is_main_process()
        split = with_classes(split, config)
        teacher = load_teacher(config, split, len(dataset.train_labels), show=show)
        described = describe_run(config, measure_input(split), teacher)
        trainer = Trainer(described, split, teacher, stages)
        if parallel.is_main_process():
            stack.enter_context(locked(directory))
        check_workdir(directory, config)  # Again: until it was locked, another process may have begun something there.
        start(directory, described, subset_of(split))
        trainer.record(directory.parent / "teacher-cache" if cache is None else Path(cache), show=show)
        try:
            result = conclude(trainer, directory, interruption, began, show=show)
        except Diverged as error:
            finish(directory, diverged_result(trainer, error))
            raise
        finish(directory, result)
        return result


def check(config: Config) -> tuple[Stage, ...]:
    """The method's stages. Raises UsageError for what is wrong with a config before any file is looked at."""
    stages = create_stages(config.check().method)
    if config.teacher is None and any(stage.needs_teacher for stage in stages):
        raise UsageError(f"method {config.method.name!r} needs a teacher; give --teacher DIRECTORY (launch/train_teacher.py makes one)")
    if config.teacher is not None:
        check_source(config, needs_hidden=any(stage.connectors is not None for stage in stages))
    parallel.check_batch(config.train.batch_size)
    parallel.check_precision(config.train.precision)
    return stages


def check_labels(split: Split, stages: tuple[Stage, ...], config: Config) -> None:
    """Raises UsageError where the method learns from labels, or the evaluation needs a teacher, and the images have none of it."""
    method = config.method
    if not split.train_labelled and (method.loss == "ce" or not all(stage.needs_teacher for stage in stages)):
        which = f"method {method.name!r}" if method.loss != "ce" else "method.loss 'ce'"
        raise UsageError(f"{which} learns from labels, and the training images of {split.name} have none; put them into folders of classes")


def finished_result(directory: Path, config: Config) -> Result | None:
    """The result of a run that has ended, or None. One that is damaged is made again, from the last checkpoint. Raises Diverged."""
    path = directory / "result.json"
    if not (directory / "config.json").exists() or not path.exists():
        return None
    try:
        result = read_result(path)
        if result.config != config:
            raise UsageError(f"{path} is the result of another run")
    except UsageError as error:
        note(f"{error}; it is made again")
        return None
    if result.status == "diverged":
        raise Diverged(f"{directory} has diverged: {result.reason}; change the options and give another --workdir")
    return result


def finish(directory: Path, result: Result) -> None:
    """Writes the result where the run is. Raises UsageError where that has been deleted."""
    if parallel.is_main_process():
        with writing(directory):
            (directory / "config.json").stat()
        write_result(directory / "result.json", result)


def conclude(trainer: Trainer, directory: Path, interruption: Interruption, began: float, *, show: bool) -> Result:
    """Trains to the end and evaluates."""
    outcome = trainer.train(directory, interruption, show=show)
    variables = outcome.variables | {"input": trainer.input}
    # In float32 whatever it was trained in, so that an evaluation elsewhere finds the same.
    apply = inference(trainer.student.clone(dtype=None))
    return build_result(
        trainer.described,
        trainer.split,
        trainer.teacher,
        evaluate_network(apply, variables, trainer.teacher, trainer.split),
        apply=apply,
        variables=variables,
        teacher_cached=trainer.choice.reads is not None,
        parameter_hash=tree_hash(outcome.variables),
        step=trainer.config.train.steps,
        skipped_updates=outcome.skipped,
        wall_seconds=time.monotonic() - began,
        examples_per_second=outcome.rate,
    )


def diverged_result(trainer: Trainer, error: Diverged) -> Result:
    """What is known of a run that stopped at a value that is not finite: all but an evaluation."""
    variables = variable_shapes(trainer.student, trainer.split.image_shape) | {"input": trainer.input}
    return build_result(
        trainer.described,
        trainer.split,
        trainer.teacher,
        None,
        apply=inference(trainer.student.clone(dtype=None)),
        variables=variables,
        teacher_cached=trainer.choice.reads is not None,
        parameter_hash=None,
        step=error.step,
        reason=str(error),
    )


def measure_input(split: Split) -> Input:
    """What the network must know of its images; mean and deviation are those of the training images' pixels."""
    x = split.train_images.reshape(-1, split.image_shape[-1])
    # Channel by channel: a float64 copy of all pixels of a large set would not fit.
    channels = [x[:, c] for c in range(x.shape[1])]
    mean = [float(c.mean(dtype=np.float64)) / 255 for c in channels]
    std = [max(float(c.std(dtype=np.float64)) / 255, 1 / 255) for c in channels]
    return Input(list(split.class_names), list(split.image_shape), mean, std)
