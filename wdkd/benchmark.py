"""What a step costs: a method with the live or the recorded teacher, on random images and weights, which cost what real ones do."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wdkd import parallel
from wdkd.config import AugmentConfig, CacheConfig, Config, DataConfig, MethodConfig, ModelConfig, OptimizerConfig, TrainConfig
from wdkd.data import Split
from wdkd.folding import fold
from wdkd.methods import create_stages
from wdkd.models import create_model, initialize
from wdkd.recording import pack
from wdkd.run_directory import describe_run
from wdkd.steps import Data
from wdkd.teacher import Record, Teacher, inference
from wdkd.teacher_cache import Contents, contents
from wdkd.train import measure_input
from wdkd.trainer import AUGMENTATION, Trainer

EPSILON, TEMPERATURE = 0.1, 4.0
IDEALS: dict[str, Callable[[float, float], float]] = {
    "ce": lambda s, t: 3 * s,
    "kd": lambda s, t: 3 * s + t,
    "fitnet": lambda s, t: 3 * s + t,
    "ab": lambda s, t: 3 * s + t,
    "wdkd": lambda s, t: 6 * s + 3 * t,
    "sobolev": lambda s, t: 6 * s + 2 * t,
}
"""FLOPs of a step of each method's first stage, from the forward passes' of student and live teacher; a recorded teacher costs none.

Connectors of fitnet and ab are not counted; nor is that fitnet trains a part of the student.
"""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is timed: sizes, and the two networks."""

    images_per_class: int = 50
    batch_size: int = 128
    classes: int = 10
    side: int = 32
    channels: int = 3
    student: ModelConfig = ModelConfig("cnn", 16, "group")
    teacher: ModelConfig = ModelConfig("resnet20", 32, "batch")
    precision: str = "float32"
    steps_per_call: int = 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.side, self.side, self.channels)


@functools.lru_cache(maxsize=4)
def random_split(setup: Setup) -> Split:
    """Random images in the place of a data set."""
    random, count = np.random.default_rng(0), setup.images_per_class * setup.classes
    images = random.integers(0, 256, (count, *setup.image_shape), dtype=np.uint8)
    return Split(
        name="random",
        class_names=tuple(str(label) for label in range(setup.classes)),
        train_images=images,
        train_labels=np.arange(count, dtype=np.int32) % setup.classes,
        train_indices=np.arange(count),
        subset_hash=hashlib.sha256(images.data).hexdigest(),
        evaluation_images=images[:1],
        evaluation_labels=np.zeros(1, np.int32),
        evaluation_split="test",
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of random weights: before folding, for PyTorch, and as a teacher."""

    model: nn.Module
    variables: Any

    def as_teacher(self, setup: Setup) -> Teacher:
        model, variables = fold(self.model, self.variables, setup.image_shape)
        low = inference(model.clone(dtype=jnp.bfloat16))
        return Teacher(inference(model), variables, setup.classes, setup.image_shape, "random", "random", None, low)


@functools.lru_cache(maxsize=4)
def random_teacher(setup: Setup) -> Network:
    """The teacher of a setup."""
    model = create_network(setup, setup.teacher)
    given = {"mean": np.full(setup.channels, 0.5, np.float32), "std": np.full(setup.channels, 0.25, np.float32)}
    return Network(model, {**initialize(model, jax.random.key(1), setup.image_shape), "input": given})


def create_network(setup: Setup, config: ModelConfig) -> nn.Module:
    """The network that `config` names, for the setup's images."""
    return create_model(config, classes=setup.classes, mean=(0.5,) * setup.channels, std=(0.25,) * setup.channels)


def random_record(holds: Contents) -> Record:
    """A record of random numbers, the same for every 64 views."""
    random = np.random.default_rng(0)
    rows = {name: random.normal(size=(64, *shape)).astype(np.float32) / 100 for name, shape in holds.shapes.items()}
    return pack({name: np.resize(few, (holds.views, *few.shape[1:])) for name, few in rows.items()})


class Case:
    """One method's training step exactly as a run takes it, again and again on the same batch. Call it to take one more."""

    def __init__(self, setup: Setup, method: str, *, cached: bool, folder: Path | None = None, show: bool = False) -> None:
        """With `cached`, the teacher is recorded in `folder`; None: the record is of random numbers, which cost the same."""
        self.method, self.cached, self.steps = method, cached, setup.steps_per_call
        config = Config(
            data=DataConfig(name="random", n_per_class=setup.images_per_class),
            model=setup.student,
            method=MethodConfig(name=method, epsilon=EPSILON if method == "wdkd" else None, temperature=TEMPERATURE),
            augment=AugmentConfig("none"),
            optimizer=OptimizerConfig(clip_norm=None, warmup_fraction=0.0),
            train=TrainConfig(steps=1000, batch_size=setup.batch_size, steps_per_call=setup.steps_per_call, precision=setup.precision),
            cache=CacheConfig(mode="on" if cached else "off", budget=64 * 1024),
        ).check()
        split, teacher = random_split(setup), random_teacher(setup).as_teacher(setup)
        stages = create_stages(config.method)
        trainer = Trainer(describe_run(config, measure_input(split)), split, teacher, stages)
        if folder is not None:
            trainer.record(folder, show=show)
        elif cached:
            trainer.known = random_record(contents(trainer.choice.reads, len(split.train_labels), teacher, "float32"))
        self.trainer, plan = trainer, trainer.plan(0)
        start = trainer.first(0)
        self.first = jax.tree.map(np.array, start.variables["student"])
        self.state = parallel.replicate(start)
        data = parallel.replicate(Data(split.train_images, split.train_labels, trainer.input))
        key = parallel.replicate(jax.random.key_data(trainer.key(AUGMENTATION)))
        self.rest = (trainer.what_is_known(0), data, key, trainer.draws(0, 0))
        self.program = plan.step

    def __call__(self) -> None:
        self.state, measured = self.program(self.state, *self.rest)
        jax.block_until_ready(measured)

    def gradients(self) -> tuple[float, Any]:
        """The objective of the next step, and the gradient that it is taken with: Adam's first moment after the first step, over 0.1."""
        self.state, measured = self.program(self.state, *self.rest)
        moment = optax.tree_utils.tree_get(self.state.optimizer, "mu")["student"]
        return float(measured["objective"][0]), jax.tree.map(lambda leaf: np.asarray(leaf) / np.float32(0.1), moment)

    def cost(self) -> dict[str, float | None]:
        """FLOPs of a step, and MiB of memory that the compiled program takes beside its arguments, as the compiler counts them."""
        compiled = self.program.compiled(self.state, *self.rest)
        counted, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        return {"flops": counted.get("flops"), "scratch_mib": None if memory is None else memory.temp_size_in_bytes / 2**20}

    @property
    def batch(self) -> np.ndarray:
        """The images of the batch, float32 (B, H, W, C) in [0, 1]."""
        index = np.concatenate([rows[0] for rows in self.rest[3].index])
        return self.trainer.split.train_images[index].astype(np.float32) / 255


def forward_flops(setup: Setup) -> tuple[float, float]:
    """(F_S, F_T): FLOPs of the forward passes of a batch, as the compiler counts them."""
    student = create_network(setup, setup.student)
    variables = initialize(student, jax.random.key(0), setup.image_shape)
    teacher = random_teacher(setup).as_teacher(setup)
    x = jax.ShapeDtypeStruct((setup.batch_size, *setup.image_shape), jnp.float32)
    found = []
    for apply, tree in ((inference(student), variables), (teacher.apply, teacher.variables)):
        lowered = jax.jit(lambda tree, x, apply=apply: apply(tree, x).logits).lower(tree, x)
        found.append(float(parallel.compile_lowered(lowered).cost_analysis()["flops"]))
    return found[0], found[1]
