"""run(config, workdir): from a config to a trained, checkpointed and evaluated network."""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wdkd import parallel
from wdkd.augment import create_augmentation
from wdkd.batches import ORDER, PARTNER, batch_indices, batch_views, fixed_partners
from wdkd.checkpoint import Checkpoints, tree_hash
from wdkd.config import AugmentConfig, Config, MethodConfig, OptimizerConfig
from wdkd.data import Split, few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.evaluate import build_result, evaluate_network
from wdkd.methods import Stage, create_stages, stage_ends
from wdkd.models import check_image_shape, initialize
from wdkd.progress import Log, Recorder
from wdkd.recording import record_teacher
from wdkd.result import Result, read_result, write_result
from wdkd.run_directory import Input, Run, build_model, check_workdir, describe_run, read_teacher, start
from wdkd.state import TrainState, create_optimizer, create_state, initialize_connectors
from wdkd.steps import Data, Draw, TeacherApply, make_train_step, repeated
from wdkd.teacher import Record, Teacher, TeacherAt, check_agreement, inference, live, recorded
from wdkd.teacher_cache import Choice, choose

INITIAL, CONNECTORS, AUGMENTATION = 0, 1, 2
COMPUTED_IN = {"float32": None, "bfloat16": jnp.bfloat16}


def run(config: Config, workdir: str | os.PathLike, *, cache: str | os.PathLike | None = None, show_progress: bool = True) -> Result:
    """Trains what `config` says in `workdir`, or goes on where an earlier call stopped, and evaluates the last step.

    A finished run is returned as it is. See `architecture` in the README for what the directory holds. Recorded teachers are kept
    in the directory `cache`; None: in teacher-cache/ beside `workdir`.

    Raises:
      UsageError: for an option out of range, data or teacher that is missing or does not fit, a directory of another run,
        a batch that the devices do not divide, or a loss that is not finite.
    """
    began = time.monotonic()
    stages = create_stages(config.check().method)
    if config.teacher is None and any(stage.needs_teacher for stage in stages):
        raise UsageError(f"method {config.method.name!r} needs a teacher; give --teacher DIRECTORY (launch/train_teacher.py makes one)")
    parallel.check_batch(config.train.batch_size)
    parallel.check_precision(config.train.precision)
    directory = check_workdir(workdir, config)
    finished = directory / "result.json"
    if finished.exists():
        return read_result(finished)
    split = few_shot_split(load_dataset(config.data), config.data, config.seed)
    check_image_shape(split.image_shape)
    teacher = None if config.teacher is None else read_teacher(config.teacher)
    if teacher is not None:
        check_agreement(teacher, classes=split.num_classes, image_shape=split.image_shape)
    described = describe_run(config, measure_input(split))
    trainer = Trainer(described, split, teacher, stages)
    start(directory, described, {"sha256": split.subset_hash, "indices": split.train_indices.tolist()})
    show = show_progress and parallel.is_main_process()
    trainer.record(directory.parent / "teacher-cache" if cache is None else Path(cache), show=show)
    trained, rate = trainer.train(directory, show=show)
    variables = trained | {"input": described.input.arrays}
    # In float32 whatever it was trained in, so that an evaluation elsewhere finds the same.
    apply = inference(trainer.student.clone(dtype=None))
    evaluation = evaluate_network(apply, variables, teacher, split)
    result = build_result(
        described,
        split,
        teacher,
        evaluation,
        apply=apply,
        variables=variables,
        teacher_cached=trainer.choice.reads is not None,
        parameter_hash=tree_hash(trained),
        step=config.train.steps,
        wall_seconds=time.monotonic() - began,
        examples_per_second=rate,
    )
    if parallel.is_main_process():
        write_result(finished, result)
    return result


def measure_input(split: Split) -> Input:
    """What the network must know of its images; mean and deviation are those of the training images' pixels."""
    x = split.train_images.reshape(-1, split.image_shape[-1])
    # Channel by channel: a float64 copy of all pixels of a large set would not fit.
    channels = [x[:, c] for c in range(x.shape[1])]
    mean = [float(c.mean(dtype=np.float64)) / 255 for c in channels]
    std = [max(float(c.std(dtype=np.float64)) / 255, 1 / 255) for c in channels]
    return Input(list(split.class_names), list(split.image_shape), mean, std)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage made ready to run: its modules, and the step mapped over the devices."""

    connectors: nn.Module | None
    optimizer: optax.GradientTransformation
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@functools.lru_cache(maxsize=32)
def plan_stage(
    method: MethodConfig,
    index: int,
    *,
    steps: int,
    student: nn.Module,
    teacher_at: TeacherAt | None,
    augment: AugmentConfig,
    optimizer: OptimizerConfig,
    classes: int,
    image_shape: tuple[int, ...],
) -> StagePlan:
    """Stage `index` of a method, over `steps` steps. Kept: runs in one process that differ in seed or subset share the compiled step."""
    stage = create_stages(method)[index]
    connectors = None if stage.connectors is None else stage.connectors(axis_name=parallel.AXIS)
    transformation = create_optimizer(optimizer, steps=steps, decay=stage.decays)
    step = make_train_step(
        student=student,
        connectors=connectors,
        teacher_at=teacher_at,
        objective=stage.objective,
        optimizer=transformation,
        augmentation=create_augmentation(augment, image_shape),
        views=augment.finite_views,
        ema_decay=optimizer.ema_decay,
        classes=classes,
        axis_name=parallel.AXIS,
    )
    return StagePlan(connectors, transformation, parallel.map_over_devices(repeated(step), arguments=5, donate_first=True))


def padded(rows: np.ndarray) -> np.ndarray:
    """Rows of zeros up to a multiple of 128: no index points there, and subsets of like size then share the compiled step."""
    return np.pad(rows, [(0, -len(rows) % 128), *[(0, 0)] * (rows.ndim - 1)])


class Trainer:
    """The training of one run: its stages one after the other. Holds what stays the same from step to step."""

    def __init__(self, described: Run, split: Split, teacher: Teacher | None, stages: tuple[Stage, ...]) -> None:
        config = described.config
        self.config, self.split, self.teacher, self.stages = config, split, teacher, stages
        self.input = described.input.arrays
        create_augmentation(config.augment, split.image_shape)
        # The pixels' statistics travel with the data (see `models.apply_network`), so these are never used.
        neutral = dataclasses.replace(described.input, mean=[0.0] * split.image_shape[-1], std=[1.0] * split.image_shape[-1])
        self.student = build_model(config, neutral, axis_name=parallel.AXIS, dtype=COMPUTED_IN[config.train.precision])
        self.ends = stage_ends(stages, config.train.steps)
        self.starts = (0, *self.ends[:-1])
        if min(self.lengths) < 1:
            raise UsageError(f"train.steps is {config.train.steps}; {len(stages)} stages need at least {len(stages)}")
        none = Choice(None, "")
        self.choice = none if teacher is None else choose(config, stages, self.lengths, len(split.train_labels), teacher)
        self.known: Record | None = None
        self._on_devices: dict[bool, Any] = {}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each stage."""
        return tuple(end - start for start, end in zip(self.starts, self.ends, strict=True))

    def record(self, folder: Path, *, show: bool) -> None:
        """Records the teacher, where that was chosen (see `teacher_cache.choose`)."""
        if show and self.choice.why:
            print(self.choice.why, file=sys.stderr, flush=True)
        if self.choice.reads is not None:
            key = np.asarray(jax.random.key_data(self.key(AUGMENTATION)))
            self.known = record_teacher(self.config, self.choice.reads, self.teacher, self.split, key, folder, show=show)

    # --- stages

    def recorded(self, index: int) -> bool:
        """Whether a stage takes the teacher from its record."""
        return self.choice.reads is not None and self.stages[index].reads is not None

    def plan(self, index: int) -> StagePlan:
        """The stage's modules, optimiser and compiled step."""
        needed = self.stages[index].needs_teacher
        return plan_stage(
            self.config.method,
            index,
            steps=self.lengths[index],
            student=self.student,
            teacher_at=None if not needed else recorded if self.recorded(index) else live(self.teacher_apply()),
            augment=self.config.augment,
            optimizer=self.config.optimizer,
            classes=self.split.num_classes,
            image_shape=tuple(self.split.image_shape),
        )

    def teacher_apply(self) -> TeacherApply:
        """The live teacher, in the precision of the training."""
        low = self.config.train.precision == "bfloat16" and self.teacher.apply_bfloat16
        return low or self.teacher.apply

    def begin(self, index: int, plan: StagePlan, student_variables: Any) -> TrainState:
        """The first state of a stage: fresh connectors and optimiser around the student's variables."""
        variables = {"student": student_variables}
        if plan.connectors is not None:
            image = jax.ShapeDtypeStruct((1, *self.split.image_shape), np.float32)
            ours, theirs = (
                jax.eval_shape(apply, tree, image).hidden
                for apply, tree in ((inference(self.student), student_variables), (self.teacher.apply, self.teacher.variables))
            )
            key = jax.random.fold_in(self.key(CONNECTORS), self.starts[index])
            variables |= initialize_connectors(plan.connectors, key, ours, theirs)
        return create_state(variables, plan.optimizer, step=self.starts[index], averaged=self.config.optimizer.ema_decay is not None)

    def key(self, purpose: int) -> jax.Array:
        """The key that everything random of one purpose is folded from."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    # --- the loop

    def train(self, directory: Path, *, show: bool) -> tuple[Any, float]:
        """Trains to the last step. Returns the variables to evaluate and the images per second of this call."""
        data = parallel.replicate(Data(padded(self.split.train_images), padded(self.split.train_labels), self.input))
        key = parallel.replicate(jax.random.key_data(self.key(AUGMENTATION)))
        with Checkpoints(directory / "checkpoints") as checkpoints:
            step = checkpoints.latest() or 0
            index = next(i for i, end in enumerate(self.ends) if step < end or end == self.config.train.steps)
            plan, known = self.plan(index), self.what_is_known(index)
            state = self.begin(index, plan, initialize(self.student, self.key(INITIAL), self.split.image_shape))
            if step:
                state = checkpoints.restore(step, "state", state)
            state = parallel.replicate(state)
            kept = directory if parallel.is_main_process() else None
            with Recorder(kept, title=self.title(), start=step, steps=self.config.train.steps, show=show) as recorder:
                log = Log(recorder, self.config.train, step)
                while step < self.config.train.steps:
                    if step == self.ends[index]:
                        index += 1
                        plan, known = self.plan(index), self.what_is_known(index)
                        state = parallel.replicate(self.begin(index, plan, state.variables["student"]))
                    draws = self.draws(step, index)
                    state, measured = plan.step(state, known, data, key, draws)
                    step += draws.index.shape[1]
                    log.add(measured)
                    if step % self.config.train.checkpoint_every == 0 and step < self.ends[index] or step == self.config.train.steps:
                        log.flush()
                        checkpoints.save(step, network=state.evaluated, state=state)
        return jax.tree.map(np.asarray, state.evaluated), log.rate

    def what_is_known(self, index: int) -> Any:
        """What a stage's step is given of the teacher, on every device: its record, its variables, or nothing."""
        if not self.stages[index].needs_teacher:
            return None
        recorded = self.recorded(index)
        if recorded not in self._on_devices:  # A record may take gigabytes: stages share one copy.
            self._on_devices[recorded] = parallel.replicate(self.known if recorded else self.teacher.variables)
        return self._on_devices[recorded]

    def title(self) -> str:
        config = self.config
        return f"{config.data.name} {config.method.name} n={config.data.n_per_class or 'full'} seed={config.seed}"

    def draws(self, step: int, index: int) -> Draw:
        """This process's part of the next call's global batches, (devices, steps, b): one step, or as many as fit before
        something is saved or the stage ends."""
        together, every = parallel.steps_per_call(self.config.train.steps_per_call), self.config.train.checkpoint_every
        fits = step + together <= min(self.ends[index], (step // every + 1) * every)
        one = [self.draw(s) for s in range(step, step + (together if fits else 1))]
        return jax.tree.map(lambda *columns: np.stack([parallel.share(column) for column in columns], axis=1), *one)

    def draw(self, step: int) -> Draw:
        """The global batch of a step."""
        size, batch, seed = len(self.split.train_labels), self.config.train.batch_size, self.config.seed
        index, position = batch_indices(size, batch, seed, step, ORDER), np.arange(batch, dtype=np.int32)
        views = self.config.augment.finite_views
        if views is None:
            return Draw(index, batch_indices(size, batch, seed, step, PARTNER), position, np.zeros(batch, np.int32))
        view = batch_views(size, batch, views, step)
        return Draw(index, fixed_partners(size, views, seed)[index, view], position, view)
