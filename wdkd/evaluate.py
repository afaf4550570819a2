"""Evaluating a network on a split, every image once; and a checkpoint directory, from its own stored config."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from wdkd import metrics, parallel
from wdkd.batches import evaluation_batches
from wdkd.checkpoint import tree_hash
from wdkd.data import Split, few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.models import parameter_count
from wdkd.notes import note
from wdkd.result import Evaluation, Result
from wdkd.run_directory import Run, read_run, read_trained
from wdkd.steps import Data, EvaluationDraw, TeacherApply, make_eval_step, make_naming_step
from wdkd.teacher import Teacher, check_agreement, inference
from wdkd.teacher_loading import find_teacher, reader, shape_of
from wdkd.wording import shown

BATCH = 256
NAMED = 4
"""Teachers and sets of images whose answers are kept."""
_NAMED: dict[Any, np.ndarray] = {}
TRACKS = {"none": "plain", "flip_crop": "flip_crop", "matching": "matching"}
"""The protocol's track by augmentation."""


def evaluate_network(apply: TeacherApply, variables: Any, teacher: Teacher | None, split: Split) -> Evaluation:
    """Accuracy, calibration, confusion and (with a teacher that runs) agreement over exactly the split's evaluation images.

    Args:
      apply: (variables, pixels (B, H, W, C) in [0, 1]) -> Outputs, in inference form.
    """
    teacher = None if teacher is None or teacher.apply is None else teacher
    data = parallel.replicate(Data(split.evaluation_images, split.evaluation_labels))
    taught = parallel.replicate(None if teacher is None else teacher_classes(teacher, split, data))
    step, variables, sums = _mapped_step(apply), parallel.replicate(variables), None
    for draw in _draws(len(split.evaluation_labels)):
        part = step(variables, data, taught, draw)
        sums = part if sums is None else metrics.add(sums, part)
    return metrics.summarize(sums, split.evaluation_split, split.class_names, teacher is not None, split.evaluation_labelled)


def _draws(size: int) -> Iterator[EvaluationDraw]:
    """This process's parts of batches that cover `size` images."""
    devices = parallel.device_count()
    for index, mask in evaluation_batches(size, -(-BATCH // devices) * devices):
        yield EvaluationDraw(parallel.share(index), parallel.share(mask))


def teacher_classes(teacher: Teacher, split: Split, data: Data) -> np.ndarray:
    """What a teacher calls each evaluation image of a split, (m,); `data` holds them on the devices.

    Kept: in a sweep, every run asks the same of one teacher.
    """
    images = hashlib.sha256(np.ascontiguousarray(split.evaluation_images).data).hexdigest()
    key = (teacher.apply, tree_hash(teacher.variables), images)
    if key not in _NAMED:
        step, variables = _mapped_naming_step(teacher.apply), parallel.replicate(teacher.variables)
        parts = [np.asarray(step(variables, data, draw)).reshape(-1) for draw in _draws(len(data.labels))]
        while len(_NAMED) >= NAMED:
            del _NAMED[next(iter(_NAMED))]
        _NAMED[key] = np.concatenate(parts)[: len(data.labels)]
    return _NAMED[key]


@functools.lru_cache(maxsize=32)
def _mapped_step(apply: TeacherApply) -> Callable[..., metrics.Sums]:
    # Kept: the runs of a sweep that share a process share the compiled program too.
    return parallel.map_over_devices(make_eval_step(apply=apply, axis_name=parallel.AXIS), arguments=4)


@functools.lru_cache(maxsize=32)
def _mapped_naming_step(apply: TeacherApply) -> Callable[..., jax.Array]:
    return parallel.map_over_devices(make_naming_step(apply=apply, axis_name=parallel.AXIS), arguments=3)


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
        dataset=config.data.dataset,
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
        model=config.model.words,
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
    directory: str | os.PathLike,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    folder: str | None = None,
    teacher: str | None = None,
) -> Result:
    """Evaluates the newest checkpoint of a run, rebuilt from the config that is stored with it.

    Args:
      split: "test" or "validation"; None: the one in the stored config.
      data_dir: where TFDS keeps the data here; None: the stored one, else $TFDS_DATA_DIR.
      folder: where the images are now that the run took from a folder; None: where they were in training.
      teacher: the teacher, in any form that training takes; None: that of training. Agreement is None where it is no longer there.

    Raises:
      UsageError: if there is no such run, checkpoint or data.
    """
    run = read_run(directory)
    stored = run.config.data
    if folder is not None and stored.folder is None:
        raise UsageError(f"{directory} was trained on the data set {stored.name}, not on a folder; leave --folder out")
    config = dataclasses.replace(
        stored,
        evaluate_on=split or stored.evaluate_on,
        data_dir=data_dir or stored.data_dir,
        folder=folder or run.data_folder or stored.folder,
    )
    config.check()
    trained = read_trained(directory)
    for reason in trained.passed_over:
        note(reason)
    dataset = load_dataset(config)
    data = few_shot_split(dataset, config, run.config.seed).with_classes(run.input.class_names)
    if list(data.image_shape) != run.input.image_shape or list(data.class_names) != run.input.class_names:
        where = "" if config.folder is None else f" in {shown(config.folder, 200)}"
        raise UsageError(f"{directory} was trained on other images or classes than {data.name} has{where}; restore that data set")
    loaded = _find_teacher(teacher, run, data, len(dataset.train_labels))
    if loaded is not None:
        check_agreement(loaded, classes=data.num_classes, image_shape=data.image_shape)
    apply = inference(trained.model)
    evaluation = evaluate_network(apply, trained.variables, loaded, data)
    known = {"variables": trained.variables, "parameter_hash": trained.hash, "step": trained.step}
    return build_result(run, data, loaded, evaluation, apply=apply, **known)


def _find_teacher(given: str | None, run: Run, split: Split, total: int) -> Teacher | None:
    """The teacher that is given, else the one of training, for a split of a training split of `total` images; None without one."""
    try:
        found = find_teacher(run, given, answers=False)
    except UsageError as error:
        if given is not None:
            raise
        note(f"agreement with the teacher is not measured: {error}")
        return None
    if found is None:
        return None
    named, source = found
    if source.kind == "outputs":
        note(f"agreement is not measured: of the teacher {shown(named, 200)} the outputs alone are known")
    return reader(named, source, **shape_of(split, total))(run.config.teacher_input)
