"""Devices and processes: the only file that says pmap, or jax.distributed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wdkd.cache import cache_directory
from wdkd.errors import UsageError

AXIS = "devices"
CPU_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
"""Makes a convolution's weight gradient 4 to 12 times faster on CPU; a jaxlib without it is compiled for as it is."""


def initialize(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run, `coordinator` being host:port of process 0. Without one this is a single process.

    Raises:
      UsageError: if only some of the three are given, or the coordinator cannot be reached in a minute.
    """
    given = [value is not None for value in (coordinator, processes, process_id)]
    if not any(given):
        return
    if not all(given):
        raise UsageError("several processes need --coordinator HOST:PORT, --processes N and --process-id I together")
    if processes < 1:
        raise UsageError(f"processes is {processes}; it must be at least 1")
    if not 0 <= process_id < processes:
        raise UsageError(f"process id is {process_id}; it must be between 0 and {processes - 1}")
    try:
        jax.distributed.initialize(coordinator, processes, process_id, initialization_timeout=60)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot reach the coordinator {coordinator} within 60 s ({reason}); start process 0 there first") from error


def enable_compilation_cache() -> None:
    """Keeps compiled steps on disk ($WDKD_CACHE_DIR or ~/.cache/wdkd), so that a second run of a configuration starts at once."""
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def check_batch(batch_size: int) -> None:
    """Raises UsageError unless all devices together divide the batch."""
    if batch_size % jax.device_count():
        raise UsageError(
            f"batch {batch_size} is not divisible by {jax.device_count()} devices; use train.batch_size "
            f"{max(1, batch_size // jax.device_count()) * jax.device_count()}"
        )


def replicate(tree: Any) -> Any:
    """A copy of the tree's arrays on every local device, seen as one array each (no device axis)."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    return jax.device_put(tree, sharding)


def share(values: np.ndarray) -> np.ndarray:
    """This process's part (local devices, b) of something with one row per example of the global batch (B, ...)."""
    rows = values.reshape(jax.device_count(), -1, *values.shape[1:])
    first = jax.process_index() * jax.local_device_count()
    return rows[first : first + jax.local_device_count()]


def map_over_devices(step: Callable, arguments: int, *, donate_first: bool = False) -> Callable:
    """pmaps `step`: its last of `arguments` has a leading device axis, the others and all results are the same everywhere.

    Results must already agree between devices (pmean, psum): one copy of each is returned.
    """
    in_axes = (None,) * (arguments - 1) + (0,)
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=in_axes, out_axes=None, donate_argnums=(0,) if donate_first else ())
    compiled: dict[Any, Callable] = {}

    @functools.wraps(step)
    def call(*args: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(args))
        if shapes not in compiled:
            compiled[shapes] = _compile(mapped, args)
        return compiled[shapes](*args)

    return call


def _compile(mapped: Any, args: tuple) -> Callable:
    if jax.process_count() > 1:
        return mapped  # pmap takes this process's rows, as `share` gives them; a program compiled ahead wants those of all.
    lowered = mapped.lower(*args)
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=CPU_CONVOLUTIONS)
    except Exception as error:  # XLA has no class of its own for an option that it does not know.
        if next(iter(CPU_CONVOLUTIONS)) not in str(error):
            raise
        return lowered.compile()


def forward_flops(apply: Callable, variables: Any, image_shape: tuple[int, ...]) -> float | None:
    """FLOPs of one image's forward pass, as the compiler counts them; None where it does not."""
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    cost = jax.jit(apply).lower(variables, image).cost_analysis()
    return None if not cost or "flops" not in cost else float(cost["flops"])


def device_count() -> int:
    """Devices of all processes."""
    return jax.device_count()


def device_kind() -> str:
    """What the devices are, as JAX names them."""
    return jax.devices()[0].device_kind
