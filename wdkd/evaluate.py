"""Evaluating a network on a split, every image once; and a checkpoint directory, from its own stored config."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from wdkd import metrics, parallel
from wdkd.batches import evaluation_batches
from wdkd.data import Split, few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.models import parameter_count
from wdkd.notes import note
from wdkd.result import Evaluation, Result
from wdkd.run_directory import Run, read_run, read_trained
from wdkd.steps import Data, EvaluationDraw, TeacherApply, make_eval_step
from wdkd.teacher import Teacher, check_agreement, inference
from wdkd.teacher_loading import reader
from wdkd.teacher_source import find_source
from wdkd.wording import shown

BATCH = 256
TRACKS = {"none": "plain", "flip_crop": "flip_crop", "matching": "matching"}
"""The protocol's track by augmentation."""


def evaluate_network(apply: TeacherApply, variables: Any, teacher: Teacher | None, split: Split) -> Evaluation:
    """Accuracy, calibration, confusion and (with a teacher that runs) agreement over exactly the split's evaluation images.

    Args:
      apply: (variables, pixels (B, H, W, C) in [0, 1]) -> Outputs, in inference form.
    """
    teacher = None if teacher is None or teacher.apply is None else teacher
    devices = parallel.device_count()
    batch_size = -(-BATCH // devices) * devices
    step = _mapped_step(apply, teacher and teacher.apply)
    data = parallel.replicate(Data(split.evaluation_images, split.evaluation_labels))
    variables, teacher_variables = parallel.replicate((variables, teacher and teacher.variables))
    sums = None
    for index, mask in evaluation_batches(len(split.evaluation_labels), batch_size):
        draw = EvaluationDraw(parallel.share(index), parallel.share(mask))
        part = step(variables, teacher_variables, data, draw)
        sums = part if sums is None else metrics.add(sums, part)
    return metrics.summarize(sums, split.evaluation_split, split.class_names, teacher is not None)


@functools.lru_cache(maxsize=32)
def _mapped_step(apply: TeacherApply, teacher_apply: TeacherApply | None) -> Callable[..., metrics.Sums]:
    # Kept: the runs of a sweep that share a process share the compiled program too.
    return parallel.map_over_devices(make_eval_step(apply=apply, teacher_apply=teacher_apply, axis_name=parallel.AXIS), arguments=4)


def build_result(
    run: Run,
    split: Split,
    teacher: Teacher | None,
    evaluation: Evaluation | None,
    *,
    apply: TeacherApply,
    variables: Any,
    parameter_hash: str | None,
    step: int,
    skipped_updates: int = 0,
    reason: str | None = None,
    teacher_cached: bool | None = None,
    wall_seconds: float | None = None,
    examples_per_second: float | None = None,
) -> Result:
    """All that is known of a run after `step` steps, its network being `apply` with `variables` (arrays or shape structs).

    `reason`: why it diverged, if it did.
    """
    config = run.config
    return Result(
        config=config,
        evaluation=evaluation,
        dataset=config.data.name,
        track=TRACKS[config.augment.name],
        method=config.method.name,
        n_per_class=config.data.n_per_class,
        seed=config.seed,
        epsilon=config.method.radius,
        train_size=len(split.train_labels),
        subset_hash=split.subset_hash,
        teacher_path=teacher and teacher.path,
        teacher_hash=teacher and teacher.hash,
        teacher_accuracy=_teacher_accuracy(teacher, evaluation),
        through_teacher=config.method.through_teacher and (teacher is None or teacher.apply is not None),
        teacher_cached=teacher_cached,
        model=f"{config.model.name} width {config.model.width} {config.model.norm} norm",
        parameters=parameter_count(variables["params"]),
        forward_flops=parallel.forward_flops(apply, variables, split.image_shape),
        parameter_hash=parameter_hash,
        steps=step,
        examples_per_second=examples_per_second,
        wall_seconds=wall_seconds,
        device_kind=parallel.device_kind(),
        device_count=parallel.device_count(),
        versions=run.versions,
        revision=run.revision,
        status="complete" if reason is None else "diverged",
        reason=reason,
        skipped_updates=skipped_updates,
    )


def _teacher_accuracy(teacher: Teacher | None, evaluation: Evaluation | None) -> float | None:
    """The accuracy that came with the teacher, else that on the evaluation's images, if any is known."""
    if teacher is None or teacher.accuracy is not None:
        return teacher and teacher.accuracy
    return evaluation and evaluation.teacher_accuracy


def evaluate_checkpoint(
    directory: str | os.PathLike, *, split: str | None = None, data_dir: str | None = None, teacher: str | None = None
) -> Result:
    """Evaluates the newest checkpoint of a run, rebuilt from the config that is stored with it.

    Args:
      split: "test" or "validation"; None: the one in the stored config.
      data_dir: where TFDS keeps the data here; None: the stored one, else $TFDS_DATA_DIR.
      teacher: the teacher, in any form that training takes; None: that of training. Agreement is None where it is no longer there.

    Raises:
      UsageError: if there is no such run, checkpoint or data.
    """
    run = read_run(directory)
    stored = run.config.data
    config = dataclasses.replace(stored, evaluate_on=split or stored.evaluate_on, data_dir=data_dir or stored.data_dir)
    config.check()
    trained = read_trained(directory)
    for reason in trained.passed_over:
        note(reason)
    dataset = load_dataset(config)
    data = few_shot_split(dataset, config, run.config.seed)
    if list(data.image_shape) != run.input.image_shape or list(data.class_names) != run.input.class_names:
        raise UsageError(f"{directory} was trained on other images or classes than {data.name} has; restore that data set")
    loaded = _find_teacher(teacher, run, data, len(dataset.train_labels))
    if loaded is not None:
        check_agreement(loaded, classes=data.num_classes, image_shape=data.image_shape)
    apply = inference(trained.model)
    evaluation = evaluate_network(apply, trained.variables, loaded, data)
    known = {"variables": trained.variables, "parameter_hash": trained.hash, "step": trained.step}
    return build_result(run, data, loaded, evaluation, apply=apply, **known)


def _find_teacher(given: str | None, run: Run, split: Split, total: int) -> Teacher | None:
    """The teacher that is given, else the one of training, for a split of a training split of `total` images; None where it is gone."""
    stored = run.teacher_directory
    if given is None and stored is None:
        return None
    source = find_source(given or stored)
    if given is None and source.kind == "function":
        # A run's files may come from elsewhere, and would say which code is called.
        note(f"the teacher is Python code, {shown(stored, 200)}, so agreement is not measured; give --teacher if it may be run")
        return None
    if given is None and not source.exists:
        note(f"the teacher is no longer at {stored}, so agreement is not measured; give --teacher")
        return None
    if source.kind == "outputs":
        note(f"of the teacher {shown(given or stored, 200)} the outputs alone are known, so agreement is not measured")
    return reader(given or stored, source, split, total)(run.config.teacher_input)
