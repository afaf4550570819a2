"""The training of one run: its stages, one compiled step after the other, saved as it goes."""

import contextlib
import dataclasses
import functools
import sys
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
from wdkd.checkpoint import Checkpoints
from wdkd.config import AugmentConfig, MethodConfig, OptimizerConfig
from wdkd.data import Split
from wdkd.errors import Interrupted, UsageError
from wdkd.interruption import Interruption
from wdkd.methods import Stage, create_stages, stage_ends
from wdkd.models import initialize, with_whitening
from wdkd.pace import STOP, Pace
from wdkd.progress import Log, Recorder
from wdkd.recording import record_teacher
from wdkd.resumption import circumstances, resume
from wdkd.run_directory import Run, build_model
from wdkd.state import TrainState, create_optimizer, create_state, initialize_connectors
from wdkd.steps import Data, Draw, TeacherApply, make_train_step, repeated
from wdkd.teacher import Record, Teacher, TeacherAt, inference, live, recorded
from wdkd.teacher_cache import Choice, choose

INITIAL, CONNECTORS, AUGMENTATION = 0, 1, 2
COMPUTED_IN = {"float32": None, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training that went to its end has to say: the variables to evaluate, images per second of this call, skipped updates."""

    variables: Any
    rate: float
    skipped: int


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
        self.described = described
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
        if self.teacher is not None and self.teacher.outputs is not None:
            self.known = Record(self.teacher.outputs, None, {})
        elif self.choice.reads is not None:
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

    def begin(self, index: int, plan: StagePlan, student_variables: Any, skipped: Any = 0) -> TrainState:
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
        options = self.config.optimizer
        return create_state(
            variables,
            plan.optimizer,
            step=self.starts[index],
            averaged=options.ema_decay is not None,
            skipped=skipped if options.max_skipped else None,
        )

    def first(self, index: int) -> TrainState:
        """The first state of a stage whose student has not learned anything."""
        variables = initialize(self.student, self.key(INITIAL), self.split.image_shape)
        return self.begin(index, self.plan(index), with_whitening(variables, self.split.train_images, self.input))

    def stage_of(self, step: int) -> int:
        """The index of the stage that goes on after `step` steps; after the last step, of the last."""
        return next(index for index, end in enumerate(self.ends) if step < end or end == self.config.train.steps)

    def key(self, purpose: int) -> jax.Array:
        """The key that everything random of one purpose is folded from."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    # --- the loop

    def train(self, directory: Path, interruption: Interruption, *, show: bool) -> Outcome:
        """Trains to the last step, from the newest checkpoint that verifies.

        Raises:
          Diverged: at a value that is not finite; what was saved before stays.
          Interrupted: after a signal, when the step in progress is finished and saved.
          UsageError: if the disk cannot be written.
        """
        settings, leads, several = self.config.train, parallel.is_main_process(), parallel.process_count() > 1
        data = parallel.replicate(Data(padded(self.split.train_images), padded(self.split.train_labels), self.input))
        key = parallel.replicate(jax.random.key_data(self.key(AUGMENTATION)))
        with contextlib.ExitStack() as stack:
            stack.enter_context(interruption.deferred())
            step, state = resume(directory / "checkpoints", self.first, self.stage_of)
            checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints"))
            if show and step:
                print(f"goes on from step {step} of {settings.steps}", file=sys.stderr, flush=True)
            kept = directory if leads else None
            recorder = stack.enter_context(Recorder(kept, title=self.title(), start=step, steps=settings.steps, show=show))
            log = Log(recorder, settings, step, self.config.optimizer.max_skipped)
            pace = Pace(settings, interruption, leads=leads, several=several)
            state, index = parallel.replicate(state), self.stage_of(step)
            plan, known = self.plan(index), self.what_is_known(index)
            while step < settings.steps:
                draws = self.draws(step, index, pace.wish() if several else None)
                state, measured = plan.step(state, known, data, key, draws)
                step += draws.index.shape[1]
                log.add(measured)
                if step == self.ends[index] < settings.steps:
                    index += 1
                    plan, known = self.plan(index), self.what_is_known(index)
                    state = parallel.replicate(self.begin(index, plan, state.variables["student"], state.skipped))
                if due := pace.due(step, log.wish):
                    facts = {"stage": index, "objective": log.secure()} | circumstances()
                    checkpoints.save(step, network=state.evaluated, state=state, facts=facts)
                    pace.saved()
                if due == STOP:
                    raise Interrupted(f"stopped by a signal; step {step} of {settings.steps} is saved, and the same command goes on there")
        return Outcome(jax.tree.map(np.asarray, state.evaluated), log.rate, int(state.skipped or 0))

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
        return f"{config.data.dataset} {config.method.name} n={config.data.n_per_class or 'full'} seed={config.seed}"

    def draws(self, step: int, index: int, wish: int | None = None) -> Draw:
        """This process's part of the next call's global batches, (devices, steps, b): one step, or as many as fit before
        something is saved or the stage ends. With its `wish`, where the processes agree on one."""
        together, every = parallel.steps_per_call(self.config.train.steps_per_call), self.config.train.checkpoint_every
        fits = step + together <= min(self.ends[index], (step // every + 1) * every)
        one = [self.draw(s) for s in range(step, step + (together if fits else 1))]
        draws = jax.tree.map(lambda *columns: np.stack([parallel.share(column) for column in columns], axis=1), *one)
        return draws if wish is None else draws.replace(wish=np.full(draws.index.shape[:2], wish, np.int32))

    def draw(self, step: int) -> Draw:
        """The global batch of a step."""
        size, batch, seed = len(self.split.train_labels), self.config.train.batch_size, self.config.seed
        index, position = batch_indices(size, batch, seed, step, ORDER), np.arange(batch, dtype=np.int32)
        views = self.config.augment.finite_views
        if views is None:
            return Draw(index, batch_indices(size, batch, seed, step, PARTNER), position, np.zeros(batch, np.int32))
        view = batch_views(size, batch, views, step)
        return Draw(index, fixed_partners(size, views, seed)[index, view], position, view)
