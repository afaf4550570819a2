"""What saving costs a step: the demo's student trained in turn with and without checkpoints, in one process."""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax

from wdkd import parallel
from wdkd.checkpoint import Checkpoints
from wdkd.config import STUDENTS, MethodConfig
from wdkd.data import few_shot_split, load_dataset
from wdkd.methods import create_stages
from wdkd.run_directory import describe_run, read_teacher
from wdkd.steps import Data
from wdkd.train import measure_input
from wdkd.trainer import AUGMENTATION, Trainer, padded

STEPS, EVERY_SECONDS, ROUNDS = 400, 0.5, 9


def measure(teacher_directory: Path) -> dict[str, float]:
    """Seconds per step with a save every `EVERY_SECONDS` and without, saves in all, and the median ratio over the rounds."""
    config = dataclasses.replace(STUDENTS["digits"], method=MethodConfig(name="wdkd"), teacher=str(teacher_directory))
    teacher, split = read_teacher(teacher_directory), few_shot_split(load_dataset(config.data), config.data, config.seed)
    trainer = Trainer(describe_run(config, measure_input(split), teacher), split, teacher, create_stages(config.method))
    with tempfile.TemporaryDirectory() as folder:
        trainer.record(Path(folder) / "record", show=False)
        segments = Segments(trainer, Path(folder) / "checkpoints")
        segments.run(save=False)
        rounds = [(segments.run(save=False), segments.run(save=True)) for _ in range(ROUNDS)]
    without, with_saves = zip(*rounds, strict=True)
    ratio = statistics.median(b / a for a, b in rounds)
    return {
        "without": statistics.median(without),
        "with": statistics.median(with_saves),
        "ratio": ratio,
        "saves": segments.saves,
        "every": EVERY_SECONDS,
        "at_default": 1 + (ratio - 1) * EVERY_SECONDS / config.train.checkpoint_seconds,
    }


class Segments:
    """Pieces of one training, each of `STEPS` steps."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder, self.saves, self._step = trainer, folder, 0, 0
        data = Data(padded(trainer.split.train_images), padded(trainer.split.train_labels), trainer.input)
        self._rest = parallel.replicate(data), parallel.replicate(jax.random.key_data(trainer.key(AUGMENTATION)))
        self._state, self._plan = parallel.replicate(trainer.first(0)), trainer.plan(0)

    def run(self, *, save: bool) -> float:
        """Seconds per step."""
        with Checkpoints(self.folder) as checkpoints:
            began = saved = time.monotonic()
            for step in range(STEPS):
                draws = self.trainer.draws(step, 0)
                self._state, measured = self._plan.step(self._state, self.trainer.what_is_known(0), *self._rest, draws)
                self._step += 1
                if save and time.monotonic() - saved >= EVERY_SECONDS:
                    facts = {"stage": 0, "objective": float(measured["objective"][0])}
                    checkpoints.save(self._step, network=self._state.evaluated, state=self._state, facts=facts)
                    saved, self.saves = time.monotonic(), self.saves + 1
            jax.block_until_ready(self._state)
            return (time.monotonic() - began) / STEPS
