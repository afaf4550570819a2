"""The methods: each a tuple of stages, each stage one objective. To add a method, write its stages and name it in `METHODS`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from wdkd import losses
from wdkd.config import MethodConfig
from wdkd.errors import UsageError, unknown
from wdkd.input_gradients import toward_boundary, value_and_input_gradient, worst_case
from wdkd.models import STAGES, Norm, Outputs

Array = jax.Array


@struct.dataclass
class Batch:
    """Views x (B, H, W, C) in [0, 1], class probabilities `labels` (B, classes), one random key per example (B,), and, where
    training sees finitely many views, the number of each among them (B,)."""

    x: Array
    labels: Array
    keys: Array
    rows: Array | None = None


@struct.dataclass
class Seen:
    """What a per-example loss looks at. `connected` is the student's hidden features in the teacher's shapes, by stage."""

    student: Outputs
    teacher: Outputs | None
    connected: dict[str, Array]
    labels: Array


@struct.dataclass
class ObjectiveAux:
    """The parts of an objective (scalars; NaN where a part is not computed) and the networks' new statistics."""

    loss: Array
    input_gradient_norm: Array
    statistics: Any


See = Callable[[Array, bool], tuple[Seen, Any]]
"""(x, whether gradients go through the teacher) -> (what is seen, the networks' new statistics). Holds the parameters."""
AllExamples = Callable[[Array], Array]
"""(B,) values of this device's examples -> those of the global batch."""
Objective = Callable[[See, Batch, AllExamples], tuple[Array, ObjectiveAux]]
PerExample = Callable[[Seen], Array]


@dataclasses.dataclass(frozen=True)
class Reads:
    """What an objective takes of the teacher beside its logits: their input Jacobian, and hidden features as constants.

    `passes` is how often a step goes through a live teacher, forward or backward.
    """

    jacobian: bool = False
    hidden: tuple[str, ...] = ()
    passes: int = 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """One objective, minimised with an optimiser of its own.

    `share` is its part of the run's steps, None for what the others leave. `connectors` makes the module that brings the
    student's hidden features into the teacher's shapes; it is trained in this stage and thrown away after it. `decays` says
    whether weight decay is on. `reads` is all that the objective takes of the teacher, which may then be recorded once for each
    view; None: more than that, or not known, so the teacher runs in every step.
    """

    name: str
    objective: Objective
    share: float | None = None
    connectors: Callable[..., nn.Module] | None = None
    decays: bool = True
    needs_teacher: bool = True
    reads: Reads | None = None


class Connectors(nn.Module):
    """By stage: resize to the teacher's height and width, 1×1 convolution to its channels, normalisation.

    With `identity`, a stage whose shapes already agree passes unchanged (Heo et al. 2019).
    """

    stages: tuple[str, ...]
    norm: str
    bias: bool
    identity: bool
    axis_name: str | None = None

    @nn.compact
    def __call__(self, student: Mapping[str, Array], teacher: Mapping[str, Array]) -> dict[str, Array]:
        return {stage: self.connect(stage, student[stage], teacher[stage]) for stage in self.stages}

    def connect(self, stage: str, student: Array, teacher: Array) -> Array:
        if self.identity and student.shape == teacher.shape:
            return student
        if student.shape[1:3] != teacher.shape[1:3]:
            student = jax.image.resize(student, (*student.shape[:1], *teacher.shape[1:3], student.shape[3]), "linear")
        student = nn.Conv(teacher.shape[-1], (1, 1), use_bias=self.bias, name=f"{stage}_conv")(student)
        return student if self.norm == "none" else Norm(self.norm, True, self.axis_name, name=f"{stage}_norm")(student)


# --- objectives ---------------------------------------------------------------------------------------------------------


def robust(per_example: PerExample, config: MethodConfig, epsilon: float) -> Objective:
    """mean ℓ + ε · aggregate ‖∇ₓℓ‖_* (`input_gradients.worst_case`); the plain mean, at its cost, where ε = 0."""

    def objective(see: See, batch: Batch, all_examples: AllExamples) -> tuple[Array, ObjectiveAux]:
        def loss(x: Array) -> tuple[Array, Any]:
            seen, statistics = see(x, config.through_teacher)
            return per_example(seen), statistics

        if epsilon == 0:
            values, statistics = loss(batch.x)
            return values.mean(), ObjectiveAux(values.mean(), jnp.full((), jnp.nan), statistics)
        value, aux = worst_case(
            loss, batch.x, epsilon, float(config.ground_norm), config.aggregate, has_aux=True, all_examples=all_examples
        )
        return value, ObjectiveAux(aux.loss, aux.gradient_norm, aux.aux)

    return objective


def with_jacobian_matching(objective: Objective, weight: float, *, differentiates: bool) -> Objective:
    """Adds λ · mean ‖(J_S − J_T)ᵀ v‖², v a fresh random unit vector of logit space per example and step.

    Czarnecki et al. 2017 (Sobolev training), Srinivas & Fleuret 2018 (Jacobian matching). One that does not differentiate in x is
    given what the networks said here: seen twice, they would also be gone through backward twice.
    """

    def combined(see: See, batch: Batch, all_examples: AllExamples) -> tuple[Array, ObjectiveAux]:
        directions = jax.vmap(lambda key: _unit_vector(key, batch.labels.shape[-1]))(batch.keys)

        def along(x: Array) -> tuple[Array, Any]:
            seen, statistics = see(x, True)
            return ((seen.student.logits - seen.teacher.logits) * directions).sum(-1), (seen, statistics)

        (_, here), difference = value_and_input_gradient(along, batch.x, has_aux=True)
        value, aux = objective(see if differentiates else lambda x, through_teacher: here, batch, all_examples)
        return value + weight * jnp.square(difference).sum((1, 2, 3)).mean(), aux

    return combined


def with_boundary_views(objective: Objective, per_example: PerExample, radius: float) -> Objective:
    """Adds the mean loss at images moved by at most `radius` to where the teacher is undecided (`input_gradients.toward_boundary`).

    Boundary supporting samples (Heo et al. 2019), found by Newton's method. The batch's own images alone give the statistics of batch
    normalisation, and the loss that is reported.
    """

    def combined(see: See, batch: Batch, all_examples: AllExamples) -> tuple[Array, ObjectiveAux]:
        def teacher_logits(x: Array) -> Array:
            return see(x, True)[0].teacher.logits

        keys = jax.vmap(functools.partial(jax.random.fold_in, data=1))(batch.keys)
        moved, _ = see(toward_boundary(teacher_logits, batch.x, keys, radius), False)
        value, aux = objective(see, batch, all_examples)
        return value + per_example(moved).mean(), aux

    return combined


def _unit_vector(key: Array, size: int) -> Array:
    vector = jax.random.normal(key, (size,))
    return vector / jnp.linalg.norm(vector)


# --- per-example losses -------------------------------------------------------------------------------------------------


def output_loss(config: MethodConfig) -> PerExample:
    """The loss l between outputs that `config.loss` names, on what is seen of a batch."""
    if config.loss == "ce":
        return lambda seen: losses.cross_entropy(seen.student.logits, seen.labels)
    match = {
        "kl": functools.partial(losses.kl_divergence, temperature=config.temperature),
        "mse": losses.logit_mse,
        "distance": losses.logit_distance,
    }[config.loss]
    return lambda seen: match(seen.student.logits, seen.teacher.logits)


def hint_loss(stage: str) -> PerExample:
    """½ mean (r(h_S) − h_T)² at one stage (Romero et al. 2014), both sides before the activation."""
    return lambda seen: losses.hint(seen.connected[stage], seen.teacher.hidden[stage])


def boundary_loss(margin: float) -> PerExample:
    """Σ over stages of ¼, ½, 1 times the activation-boundary loss (Heo et al. 2019)."""
    weights = dict(zip(STAGES, (0.25, 0.5, 1.0), strict=True))
    return lambda seen: sum(
        weight * losses.activation_boundary(seen.connected[stage], seen.teacher.hidden[stage], margin) for stage, weight in weights.items()
    )


# --- stages and methods -------------------------------------------------------------------------------------------------


def output_stage(config: MethodConfig) -> Stage:
    """Match the outputs (or the labels, with loss `ce`), in the worst case over a ball of `config.radius`."""
    # Forward, backward to the input gradient, and through that once more for its derivative.
    reads = Reads(jacobian=True, passes=3) if config.radius > 0 and config.through_teacher else Reads()
    return Stage("outputs", robust(output_loss(config), config, config.radius), needs_teacher=config.loss != "ce", reads=reads)


def label_stage(config: MethodConfig) -> Stage:
    """Cross-entropy with the labels; no teacher."""
    return output_stage(dataclasses.replace(config, loss="ce"))


def sobolev_stage(config: MethodConfig) -> Stage:
    """Match outputs and input Jacobians."""
    stage = output_stage(config)
    matching = with_jacobian_matching(stage.objective, config.sobolev_weight, differentiates=config.radius > 0)
    return dataclasses.replace(stage, objective=matching, needs_teacher=True, reads=Reads(jacobian=True, passes=max(2, stage.reads.passes)))


def hint_stage(config: MethodConfig) -> Stage:
    """FitNet's first stage: train the student up to its guided layer."""
    stages = (config.fitnet_stage,)
    # The input gradient of the loss would take the derivative of the hint.
    constant = config.pretrain_epsilon == 0 or not config.through_teacher
    return Stage(
        "hint",
        robust(hint_loss(config.fitnet_stage), config, config.pretrain_epsilon),
        share=config.pretrain_fraction,
        connectors=functools.partial(Connectors, stages=stages, norm="none", bias=True, identity=False),
        decays=False,
        reads=Reads(hidden=stages) if constant else None,
    )


def boundary_stage(config: MethodConfig) -> Stage:
    """AB's first stage: move the student's activation boundaries to the teacher's, at every stage of the network."""
    return Stage(
        "boundary",
        robust(boundary_loss(config.ab_margin), config, config.pretrain_epsilon),
        share=config.pretrain_fraction,
        connectors=functools.partial(Connectors, stages=STAGES, norm=config.connector_norm, bias=False, identity=True),
        decays=False,
        # Whatever the radius: the loss sees the teacher's signs alone, which have no derivative.
        reads=Reads(hidden=STAGES),
    )


METHODS: dict[str, Callable[[MethodConfig], tuple[Stage, ...]]] = {
    "ce": lambda config: (label_stage(config),),
    "kd": lambda config: (output_stage(config),),
    "fitnet": lambda config: (hint_stage(config), output_stage(config)),
    "ab": lambda config: (boundary_stage(config), output_stage(config)),
    "wdkd": lambda config: (output_stage(config),),
    "sobolev": lambda config: (sobolev_stage(config),),
}


def create_stages(config: MethodConfig) -> tuple[Stage, ...]:
    """The stages of the method that `config` names. Raises UsageError for one that is not in `METHODS`."""
    if config.name not in METHODS:
        raise unknown("method", config.name, METHODS)
    *first, last = METHODS[config.name](config)
    return (*first, seeking_boundaries(last, config))


def seeking_boundaries(stage: Stage, config: MethodConfig) -> Stage:
    """The stage at boundary views too, with `config.boundary_radius`. What the teacher says there is not known ahead."""
    if config.boundary_radius == 0:
        return stage
    objective = with_boundary_views(stage.objective, output_loss(config), config.boundary_radius)
    return dataclasses.replace(stage, objective=objective, reads=None)


def stage_ends(stages: tuple[Stage, ...], steps: int) -> tuple[int, ...]:
    """The step after the last of each stage: shares are rounded, the one stage without a share takes what is left."""
    if sum(stage.share is None for stage in stages) != 1:
        raise UsageError(f"stages {[stage.name for stage in stages]} must include exactly one without a share of the steps")
    taken = [None if stage.share is None else max(1, round(stage.share * steps)) for stage in stages]
    rest = steps - sum(count for count in taken if count is not None)
    ends, end = [], 0
    for count in taken:
        end += rest if count is None else count
        ends.append(end)
    return tuple(ends)
