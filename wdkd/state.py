"""The state of training, and the optimiser that moves it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from wdkd.config import OptimizerConfig


@struct.dataclass
class TrainState:
    """Everything that a step changes. All arrays, so that it can be replicated, saved and compared.

    `variables` is {"student": ..., "connectors": ...}, each with "params" and perhaps "batch_stats"; `average` is the moving
    average of the student's variables, or None. `step` counts the optimiser steps of all stages together, `skipped` those of them
    whose update was not finite and left everything else as it was; None where such a step stops the run.
    """

    step: jax.Array
    variables: dict[str, Any]
    optimizer: optax.OptState
    average: dict[str, Any] | None
    skipped: jax.Array | None = None

    @property
    def evaluated(self) -> dict[str, Any]:
        """The student's variables that evaluation uses."""
        return self.variables["student"] if self.average is None else self.average


def split_params(variables: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """({module: params}, {module: everything else}) of {module: {"params": ..., "batch_stats": ...}}."""
    params = {name: tree["params"] for name, tree in variables.items()}
    rest = {name: {k: v for k, v in tree.items() if k != "params"} for name, tree in variables.items()}
    return params, rest


def join_params(params: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_params`."""
    return {name: {"params": params[name], **rest[name]} for name in params}


def create_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to zero at `steps`."""
    warmup = round(config.warmup_fraction * steps)
    return optax.warmup_cosine_decay_schedule(
        config.learning_rate if warmup == 0 else 0.0, config.learning_rate, warmup, max(steps, warmup + 1)
    )


def create_optimizer(config: OptimizerConfig, *, steps: int, decay: bool = True) -> optax.GradientTransformation:
    """The optimiser of one stage of `steps` steps: clipping, then adamw, muon or sgd, with the schedule of `create_schedule`.

    Weight decay reaches kernels alone. `decay=False` leaves it out: a pre-training stage does not reach every layer, and
    decay would shrink those that it does not.
    """
    weight_decay = config.weight_decay if decay else 0.0
    decays = optax.add_decayed_weights(weight_decay, mask=_is_kernel)
    rules = {
        "adamw": (optax.scale_by_adam(), decays),
        "muon": (optax.partition({True: _scale_by_muon(), False: optax.scale_by_adam()}, _is_convolution), decays),
        "sgd": (decays, optax.trace(config.momentum, nesterov=True)),
    }
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(*clip, *rules[config.name], optax.scale_by_learning_rate(create_schedule(config, steps)))


def _is_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) == "kernel", params)


def _is_convolution(params: Any) -> Any:
    return jax.tree.map(lambda kernel, leaf: kernel and leaf.ndim == 4, _is_kernel(params), params)


def _scale_by_muon() -> optax.GradientTransformation:
    """Nesterov momentum, with each kernel (H, W, I, O), as a matrix (H·W·I, O), replaced by the nearest orthogonal one (Jordan 2024).

    Newton and Schulz's iteration finds that roughly. Times 0.2 √(larger side), an update's root mean square is about 0.2, as Adam's
    is, so that both take the same learning rate (Liu et al. 2025, arXiv 2502.16982, equation 4).
    """

    def as_large_as_adam(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda leaf: 0.2 * max(leaf.size // leaf.shape[-1], leaf.shape[-1]) ** 0.5 * leaf, updates)

    def matrices(updates: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3), updates)

    return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=matrices), optax.stateless(as_large_as_adam))


def create_state(
    variables: dict[str, Any], optimizer: optax.GradientTransformation, *, step: int, averaged: bool, skipped: Any = None
) -> TrainState:
    """A stage's first state: given variables, a fresh optimiser, and the average (if any) started at the variables."""
    params, _ = split_params(variables)
    average = jax.tree.map(jnp.copy, variables["student"]) if averaged else None
    skipped = None if skipped is None else jnp.asarray(skipped, jnp.int32)
    return TrainState(jnp.asarray(step, jnp.int32), variables, optimizer.init(params), average, skipped)


def all_finite(*trees: Any) -> jax.Array:
    """Whether every number in the trees is finite, ()."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trees)]).all()


def unless_finite(finite: jax.Array, old: TrainState, new: TrainState) -> TrainState:
    """`new` where that is finite; else `old`, one step on and with one more skipped."""
    skipped = old.replace(step=new.step, skipped=old.skipped + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, skipped)


def moving_average(average: Any, new: Any, decay: float) -> Any:
    """decay · average + (1 − decay) · new, leaf by leaf."""
    return jax.tree.map(lambda a, n: decay * a + (1 - decay) * n, average, new)


def initialize_connectors(connectors: nn.Module | None, key: jax.Array, student_hidden: Any, teacher_hidden: Any) -> dict[str, Any]:
    """Variables of a stage's connectors, for hidden features of the shapes given (trees of arrays or shape structs)."""
    if connectors is None:
        return {}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (student_hidden, teacher_hidden))
    return {"connectors": {"params": {}, **jax.jit(connectors.init)(key, *zeros)}}
