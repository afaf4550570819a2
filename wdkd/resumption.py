"""Where a run goes on: at the newest checkpoint that verifies, if what computes it is what computed it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from wdkd import parallel
from wdkd.checkpoint import Damaged, newest, restore, set_aside
from wdkd.errors import UsageError
from wdkd.notes import note
from wdkd.state import TrainState


def resume(directory: Path, first: Callable[[int], TrainState], stage_of: Callable[[int], int]) -> tuple[int, TrainState]:
    """(step, state) of the newest checkpoint that verifies, the same on all processes; of the start where there is none.

    Steps that do not verify are named on stderr and moved out of the way of those that will be saved in their place.

    Args:
      directory: the run's `checkpoints/`.
      first: the first state of the stage of an index.
      stage_of: the index of the stage that goes on after so many steps.

    Raises:
      UsageError: if the random numbers are made in another way here, or a process reads other files than the main one.
    """

    def like(step: int) -> TrainState:
        return jax.eval_shape(lambda: first(stage_of(step)))

    found, passed_over = newest(directory, "state", like) if parallel.is_main_process() else (None, {})
    for step, reason in passed_over.items():
        note(reason)
        set_aside(directory, step)
    if passed_over and found is None:
        note(f"no checkpoint in {directory} verifies; the run begins again")
    step = parallel.from_main_process(0 if found is None else found[0])
    if step == 0:
        return 0, first(0)
    try:
        state, facts = found[1:] if found is not None else restore(directory / str(step), "state", like(step))
    except Damaged as error:
        raise UsageError(f"process {jax.process_index()} cannot read the checkpoint {directory / str(step)}: {error}") from error
    compare(facts, directory / str(step))
    return step, state


def circumstances() -> dict[str, Any]:
    """What the bits of a step depend on beside the run's config, as JSON values."""
    return {
        "prng": [str(jax.config.jax_default_prng_impl), bool(jax.config.jax_threefry_partitionable)],
        "jax": jax.__version__,
        "devices": [parallel.device_kind(), parallel.device_count()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def compare(facts: dict[str, Any], step: Path) -> None:
    """Raises UsageError where random keys are made otherwise than when `step` was saved; says so where only bits may differ."""
    here = circumstances()
    if "prng" in facts and facts["prng"] != here["prng"]:
        raise UsageError(
            f"checkpoint {step} was made with JAX's random keys {str(facts['prng']):.60}, and this process has {here['prng']}; "
            "set jax_default_prng_impl and jax_threefry_partitionable as they were"
        )
    for name in ("jax", "devices", "cores"):
        if name in facts and facts[name] != here[name]:
            note(f"checkpoint {step} was made with {name} {str(facts[name]):.80}, this is {here[name]}: later bits may differ")
