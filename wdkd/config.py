"""Every option, its default and its check. Frozen dataclasses, JSON there and back; a preset is an edit of a default."""

import dataclasses
import math
import os
from typing import Any, Literal

from wdkd.checks import MAX_RADIUS, MOST, require, require_count, require_name, require_number, require_path
from wdkd.errors import UsageError
from wdkd.typed_json import EARLIER
from wdkd.typed_json import from_dict as from_dict
from wdkd.typed_json import to_dict as to_dict
from wdkd.wording import safe_name, shown


def _added(default: Any, earlier: Any = None) -> Any:
    """An option that stored configs may lack: those were written when `earlier` was how things were."""
    return dataclasses.field(default=default, metadata={EARLIER: earlier})


MIN_SIDE, MAX_SIDE = 8, 4096
"""Pixels on a side of an image: the networks' three stages must be able to halve the least."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how many of them."""

    name: str = "digits"
    """TFDS name of an image classification set (cifar10, fashion_mnist, mnist, cifar100, svhn_cropped, ...), or digits."""
    data_dir: str | None = None
    """Where TFDS keeps prepared sets; unset: $TFDS_DATA_DIR, else ~/tensorflow_datasets. Digits need none."""
    n_per_class: int | None = 10
    """Training images per class; None means all of them (less the validation split)."""
    validation_size: int = 180
    """Training images set aside for tuning, class-balanced, the same for every seed; no subset ever contains one."""
    evaluate_on: Literal["test", "validation"] = "test"
    """What the final accuracy is measured on; tune on validation, report on test."""
    folder: str | None = _added(None)
    """Folder of your own images, in place of a TFDS set: CLASS/*.png, jpg, jpeg, webp, bmp and, if there is one, test/CLASS/*.
    Images directly in it have no labels; every method but ce learns from them."""
    image_size: tuple[int, ...] = _added((32,), (32,))
    """Height and width that a folder's images are resized (short side) and centre-cropped to; one number: both."""
    channels: int | None = _added(None)
    """1: a folder's images become grey; 3: RGB; None: 3, or 1 where all of them are grey."""
    test_share: float = _added(0.2, 0.2)
    """Share of each class that is held out for evaluation where the folder has no test/, by a hash of each image's name."""
    max_unreadable: float = _added(0.05, 0.05)
    """Share of a folder's images that may be broken: those are named and left out; more are an error."""

    @property
    def dataset(self) -> str:
        """What the data set is called in results: its TFDS name, or the folder's name made safe."""
        if self.folder is None:
            return self.name
        name = safe_name(os.path.basename(os.path.abspath(self.folder)))
        # Published numbers, and results of the set itself, are not of a folder that happens to be called like it.
        return f"{name}-folder" if name in STUDENTS else name

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of a folder's images."""
        return self.image_size[0], self.image_size[-1]

    def check(self) -> "DataConfig":
        require_name("data.name", self.name)
        require_path("data.data_dir", self.data_dir)
        if self.n_per_class is not None:
            require_count("data.n_per_class", self.n_per_class, rest=", or None for all images")
        require_count("data.validation_size", self.validation_size, least=0)
        if self.evaluate_on == "validation":
            require(self.validation_size > 0, "data.validation_size", self.validation_size, "above 0 to evaluate on validation")
        require_path("data.folder", self.folder)
        require(isinstance(self.image_size, tuple), "data.image_size", self.image_size, "a tuple, as (32,) or (24, 32)")
        sides = " ".join(map(str, self.image_size))
        within = len(self.image_size) in (1, 2) and all(MIN_SIDE <= side <= MAX_SIDE for side in self.image_size)
        require(within, "data.image_size", sides or "empty", f"one or two numbers between {MIN_SIDE} and {MAX_SIDE}")
        require(self.channels in (None, 1, 3), "data.channels", self.channels, "1, 3 or None")
        require(0 < self.test_share < 1, "data.test_share", self.test_share, "between 0 and 1, both excluded")
        require(0 <= self.max_unreadable < 1, "data.max_unreadable", self.max_unreadable, "at least 0 and below 1")
        return self


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network that is trained."""

    name: str = "cnn"
    """cnn, whitened_cnn, resnet<6n+2> (resnet20, resnet32, resnet56) or wrn_<6n+4>_<widening> (wrn_16_1, wrn_40_2)."""
    width: int = 16
    """Channels of the first stage; the second and third have two and four times as many (wrn: times its widening)."""
    norm: Literal["group", "batch"] = "group"
    """Normalisation; batch mixes the examples of a batch, so input gradients per example need group."""

    @property
    def words(self) -> str:
        """Family, width and normalisation, as results and exports say them."""
        return f"{self.name} width {self.width} {self.norm} norm"

    def check(self) -> None:
        require_name("model.name", self.name)
        require_count("model.width", self.width, most=1024)


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """How the student learns."""

    name: str = "wdkd"
    """ce, kd, fitnet, ab, wdkd or sobolev."""
    loss: Literal["kl", "mse", "distance", "ce"] = "kl"
    """How outputs are matched in the last stage; method ce always uses ce."""
    temperature: float = 4.0
    """Softens the outputs in kl."""
    epsilon: float | None = None
    """Radius of the Wasserstein ball in the last stage, in units of pixels in [0, 1]; None: wdkd 0.01, the others 0."""
    pretrain_epsilon: float = 0.0
    """The same for the pre-training stage of fitnet and ab."""
    ground_norm: Literal["1", "2", "inf"] = "2"
    """Norm on pixels that the ball is measured with; its dual norm is applied to the input gradient."""
    aggregate: Literal["mean", "rms", "max"] = "mean"
    """How the examples' gradient norms become one number; mean is the paper's Eq. 2."""
    through_teacher: bool = True
    """Input gradients of the loss go through the teacher as well; False: its outputs are constants. Sobolev needs both Jacobians."""
    pretrain_fraction: float = 0.3
    """Share of the steps that fitnet and ab spend on pre-training."""
    fitnet_stage: Literal["stage1", "stage2", "stage3"] = "stage2"
    """The hint layer of the teacher and the guided layer of the student."""
    ab_margin: float = 1.0
    """Margin of the activation-boundary loss."""
    connector_norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation in ab's connectors (Heo et al.: batch)."""
    sobolev_weight: float = 0.1
    """Weight of the Jacobian-matching term in sobolev."""
    boundary_radius: float = _added(0.0, 0.0)
    """Furthest that images are moved, in units of pixels in [0, 1], to where the teacher is undecided between two classes; the last
    stage learns its outputs there too. 0: they are not. The teacher runs in every step."""

    @property
    def radius(self) -> float:
        """Epsilon of the last stage, with the method's own default filled in."""
        return DEFAULT_RADIUS.get(self.name, 0.0) if self.epsilon is None else self.epsilon

    def check(self) -> None:
        require_name("method.name", self.name)
        require(math.isfinite(self.temperature) and self.temperature > 0, "method.temperature", self.temperature, "finite and above 0")
        for name in ("epsilon", "pretrain_epsilon", "sobolev_weight", "boundary_radius"):
            require_number(f"method.{name}", getattr(self, name), MAX_RADIUS)
        if self.boundary_radius > 0 and "ce" in (self.name, self.loss):
            raise UsageError(
                f"method.boundary_radius is {self.boundary_radius}: it moves images to where the teacher's outputs are learned, and method "
                f"{self.name!r} with loss 'ce' learns labels; use --method.boundary-radius 0, or another method and --method.loss kl"
            )
        require(math.isfinite(self.ab_margin) and self.ab_margin > 0, "method.ab_margin", self.ab_margin, "finite and above 0")
        require(0 < self.pretrain_fraction < 1, "method.pretrain_fraction", self.pretrain_fraction, "between 0 and 1, both excluded")


DEFAULT_RADIUS = {"wdkd": 0.01}
"""Radius used by the methods that have the worst-case term by definition."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What is done to the images; teacher and student always see the same view."""

    name: Literal["none", "flip_crop", "matching"] = "none"
    """matching is flip, padded crop, then mixup or cutmix with another image (function matching, Beyer et al. 2021)."""
    flip: bool = True
    """Mirror images left to right at random; switch off where it changes the class, as for digits."""
    padding: int = 4
    """Pixels of zero padding before the random crop; at most the image's side."""
    views: int | None = _added(None)
    """Fixed views of each image, drawn once and seen in turn, which the teacher cache needs; None: a fresh view at every visit."""

    @property
    def finite_views(self) -> int | None:
        """How many different views of an image training ever sees; None: no end of them."""
        return 1 if self.name == "none" else self.views

    def check(self) -> None:
        require_count("augment.padding", self.padding, least=0, most=1024)
        if self.views is not None:
            require_count("augment.views", self.views, most=1000, rest=", or None for fresh views")
        if self.name == "none":
            require(self.views in (None, 1), "augment.views", self.views, "1 or None with augment.name none, where an image has one view")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser of each stage; a second stage starts a fresh one."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """adamw; muon for the kernels of convolutions, with adam for the rest (Jordan 2024); or sgd with Nesterov momentum."""
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warm-up, then a cosine to zero."""
    warmup_fraction: float = 0.05
    """Share of a stage's steps spent warming up."""
    weight_decay: float = 1e-4
    """Decay of the kernels (adamw, muon: decoupled; sgd: part of the gradient); of nothing in pre-training stages."""
    momentum: float = 0.9
    """For sgd."""
    clip_norm: float | None = 1.0
    """Global norm that parameter gradients are clipped to; None: no clipping."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the parameters, which is then what is evaluated; None: no average."""
    max_skipped: int = _added(0, 0)
    """Updates with a loss, gradient or parameter that is not finite to skip, in all, before the run stops as diverged."""

    def check(self) -> None:
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "optimizer.learning_rate",
            self.learning_rate,
            "finite and above 0",
        )
        require(0 <= self.warmup_fraction < 1, "optimizer.warmup_fraction", self.warmup_fraction, "at least 0 and below 1")
        require_number("optimizer.weight_decay", self.weight_decay)
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "at least 0 and below 1")
        require(
            self.clip_norm is None or (math.isfinite(self.clip_norm) and self.clip_norm > 0),
            "optimizer.clip_norm",
            self.clip_norm,
            "above 0, or none",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "optimizer.ema_decay",
            self.ema_decay,
            "between 0 and 1, both excluded, or none",
        )
        require_count("optimizer.max_skipped", self.max_skipped, least=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, in what pieces, and what is written on the way."""

    steps: int = 300
    """Optimiser steps in all stages together."""
    batch_size: int = 64
    """Images per step over all devices; the number of devices must divide it."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one is always written at the end."""
    checkpoint_seconds: float | None = _added(60.0)
    """Most seconds between two checkpoints, whatever the steps; None: no limit."""
    steps_per_call: int | None = _added(None)
    """Steps in one compiled call, so that a fast device does not wait for the host; None: 1 on CPU, where a loop around
    convolutions is slow, else 20."""
    precision: Literal["float32", "bfloat16"] = _added("float32", "float32")
    """What convolutions are computed in while training, on GPU and TPU; parameters, norms, losses and evaluation stay float32."""

    def check(self) -> None:
        for name, most in TRAIN_LIMITS.items():
            value = getattr(self, name)
            if value is not None:
                require_count(f"train.{name}", value, most=most)
        seconds = self.checkpoint_seconds
        require(
            seconds is None or (math.isfinite(seconds) and seconds > 0), "train.checkpoint_seconds", seconds, "finite and above 0, or none"
        )


TRAIN_LIMITS = {"steps": MOST, "batch_size": 65_536, "log_every": MOST, "checkpoint_every": MOST, "steps_per_call": 1000}
"""Largest values of TrainConfig's whole numbers: the indices of a call's batches are drawn at once."""


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What the teacher says of each view, computed once: logits, input Jacobian, hidden features. The objective stays exact."""

    mode: Literal["auto", "on", "off"] = _added("auto", "off")
    """auto: where there are finitely many views, it fits and it pays within the run's steps; on: or else stop; off: live teacher."""
    precision: Literal["float32", "bfloat16"] = _added("float32", "float32")
    """What Jacobians and hidden features are stored in; bfloat16 halves the memory and rounds them to 3 digits."""
    budget: int = _added(2048, 2048)
    """Most MiB of memory for it on each device."""

    def check(self) -> None:
        require_count("cache.budget", self.budget, most=2**20, rest=" MiB")


@dataclasses.dataclass(frozen=True)
class TeacherInputConfig:
    """How a teacher from elsewhere (an ONNX file, Python code) takes images and what it gives. Runs of wdkd know that themselves."""

    layout: Literal["nchw", "nhwc"] = _added("nchw", "nchw")
    """Order of the axes of its input: PyTorch has nchw, TensorFlow nhwc."""
    channels: Literal["rgb", "bgr"] = _added("rgb", "rgb")
    """Order of the colours; OpenCV and Caffe have bgr."""
    value_range: Literal["0-1", "0-255"] = _added("0-1", "0-1")
    """What pixels are scaled to first."""
    mean: tuple[float, ...] | None = _added(None)
    """Subtracted then, in units of the value range: one number, or one per channel in the order above. ImageNet's: 0.485 0.456 0.406."""
    std: tuple[float, ...] | None = _added(None)
    """What that is divided by, likewise: the teacher is given (x - mean) / std. ImageNet's: 0.229 0.224 0.225."""
    size: tuple[int, int] | None = _added(None)
    """Height and width that images are resized to; None: those that an ONNX file says, else those of the data."""
    outputs: Literal["logits", "probabilities"] = _added("logits", "logits")
    """What it gives for each class; of probabilities the logarithm is taken."""
    classes: tuple[str, ...] | None = _added(None)
    """Its classes in the order of its outputs, by the data's names: these, or one text file of a name a line; None: the data's order."""

    def check(self) -> None:
        for name in ("mean", "std", "size", "classes"):
            value = getattr(self, name)
            require(value is None or isinstance(value, tuple), f"teacher_input.{name}", value, "a tuple, as (0.5,) of one number, or None")
        for name in ("mean", "std"):
            self._check_statistics(name, getattr(self, name))
        if self.size is not None:
            for side in self.size:
                require_count("teacher_input.size", side, most=4096, rest=" pixels")
        require(self.classes is None or len(self.classes) > 0, "teacher_input.classes", self.classes, "at least one name or file, or None")

    def _check_statistics(self, name: str, values: tuple[float, ...] | None) -> None:
        if values is None:
            return
        option, most = f"teacher_input.{name}", 1 if self.value_range == "0-1" else 255
        require(len(values) in (1, 3), option, values, "one number, or one for each of 3 channels")
        for value in values:
            fits = math.isfinite(value) and abs(value) <= most and (name == "mean" or value > 0)
            least = -most if name == "mean" else "above 0"
            require(fits, option, value, f"{least} to {most}, in units of the value range {self.value_range} (--teacher-input.value-range)")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, completely."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    cache: CacheConfig = _added(CacheConfig(), {})
    teacher: str | None = None
    """Directory of a run (launch/train_teacher.py), a name below results/teachers (shipped), an .onnx file, module:function of Python
    code, or a file of its outputs, .npz or .csv; every method but ce needs one."""
    teacher_input: TeacherInputConfig = _added(TeacherInputConfig(), {})
    seed: int = 0
    """Draws the subset, the initial parameters, the order of the images and the augmentation."""

    def check(self) -> "Config":
        """Raises UsageError on the first option out of range; returns self."""
        for field in dataclasses.fields(self):
            part = getattr(self, field.name)
            if dataclasses.is_dataclass(part):
                part.check()
        require_path("teacher", self.teacher)
        require(0 <= self.seed <= MOST, "seed", self.seed, f"between 0 and {MOST}")
        if self.model.norm == "batch" and max(self.method.radius, self.method.pretrain_epsilon) > 0:
            raise UsageError(
                f"model.norm 'batch' mixes the examples of a batch, so epsilon {max(self.method.radius, self.method.pretrain_epsilon)} "
                "has no per-example input gradient; use --model.norm group or epsilon 0"
            )
        if self.model.norm == "batch" and self.method.name == "sobolev":
            raise UsageError(
                "model.norm 'batch' mixes the examples of a batch, so sobolev has no per-example input gradient; use --model.norm group"
            )
        if self.method.name == "ab" and self.method.connector_norm == "batch" and self.method.pretrain_epsilon > 0:
            raise UsageError(
                f"method.connector_norm 'batch' mixes the examples of a batch, so pretrain_epsilon {self.method.pretrain_epsilon} has no "
                "per-example input gradient; use --method.connector-norm group or --method.pretrain-epsilon 0"
            )
        return self


_WHITENED = ModelConfig("whitened_cnn", 16)
_MUON = OptimizerConfig("muon", learning_rate=1e-2)


def _student_of_objects(name: str) -> Config:
    return Config(
        data=DataConfig(name=name, validation_size=5000, n_per_class=50),
        model=_WHITENED,
        optimizer=_MUON,
        augment=AugmentConfig(padding=2),
        train=TrainConfig(steps=2000, batch_size=32),
    )


STUDENTS: dict[str, Config] = {
    "digits": Config(
        data=DataConfig(name="digits", validation_size=180, n_per_class=10),
        model=ModelConfig(width=8),
        augment=AugmentConfig(padding=1, flip=False),
        train=TrainConfig(steps=300, batch_size=50),
    ),
    "fashion_mnist": _student_of_objects("fashion_mnist"),
    "cifar10": _student_of_objects("cifar10"),
    "folder": Config(
        data=DataConfig(name="folder", validation_size=0, n_per_class=None),
        model=_WHITENED,
        optimizer=_MUON,
        augment=AugmentConfig(name="flip_crop", padding=4),
        train=TrainConfig(steps=2000, batch_size=32),
    ),
}
"""Presets of launch/distill.py, by data set; `folder` is that of --data.folder."""


def _teacher(
    student: Config, *, name: str = "whitened_cnn", width: int, steps: int, batch_size: int, learning_rate: float, decay: float = 5e-4
) -> Config:
    return dataclasses.replace(
        student,
        data=dataclasses.replace(student.data, n_per_class=None),
        model=ModelConfig(name=name, width=width, norm="batch"),
        method=MethodConfig(name="ce"),
        augment=dataclasses.replace(student.augment, name="flip_crop"),
        optimizer=OptimizerConfig(name="sgd", learning_rate=learning_rate, weight_decay=decay, warmup_fraction=0.2, clip_norm=None),
        train=TrainConfig(steps=steps, batch_size=batch_size, checkpoint_every=200),
    )


TEACHERS: dict[str, Config] = {
    "digits": _teacher(STUDENTS["digits"], name="cnn", width=16, steps=300, batch_size=100, learning_rate=0.1),
    "fashion_mnist": _teacher(STUDENTS["fashion_mnist"], width=56, steps=10700, batch_size=128, learning_rate=0.2),
    "cifar10": _teacher(STUDENTS["cifar10"], width=56, steps=5600, batch_size=128, learning_rate=0.2, decay=1e-3),
    "folder": _teacher(STUDENTS["folder"], width=40, steps=2000, batch_size=64, learning_rate=0.1),
}
"""Presets of launch/train_teacher.py: a run of method ce on all training images but the validation split."""


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """The options in which two configs differ, as 'name: value of a, value of b'."""
    found = []
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            found += differences(x, y, f"{prefix}{field.name}.")
        elif x != y and not (x != x and y != y):
            found.append(f"{prefix}{field.name}: {shown(x, 300)}, {shown(y, 300)}")
    return found
