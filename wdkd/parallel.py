"""Devices and processes: the only file that says pmap, or jax.distributed."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wdkd.cache import cache_directory
from wdkd.errors import Interrupted, UsageError
from wdkd.launcher import Launch, launched
from wdkd.lifeline import Lifeline
from wdkd.meeting import address, meet
from wdkd.relay import relay

AXIS = "devices"
CPU_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
"""Makes a convolution's weight gradient 4 to 12 times faster on CPU; a jaxlib without it is compiled for as it is."""
HEARTBEAT = 100
"""Seconds after which XLA takes a process that it has not heard of for dead. It then aborts the others."""
PATIENCE = 30.0
"""Seconds that a process which a signal has stopped waits for the others to stop as well; launchers kill them after as long."""


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process_id: int | None, timeout: int = 60) -> Iterator[None]:
    """A context in which the processes of a run are joined, as `initialize` says.

    Where one of them ends before all have come to its end, by an error or in whatever way, the others end within seconds with a
    line that names it and code 2. On TPU pods, where JAX finds the processes, it is XLA that notices, and aborts them within 2 minutes.

    Raises:
      UsageError: as `initialize`, and where a computation failed because another process has ended.
    """
    lifeline = initialize(coordinator, processes, process_id, timeout)
    try:
        yield
        if lifeline is not None:
            lifeline.goodbye()
    except BaseException as error:
        if lifeline is not None:
            _part(lifeline, error)
        raise


def _part(lifeline: Lifeline, error: BaseException) -> None:
    """Ends this process's part of the run after an error. Raises UsageError if another process's end was the cause."""
    if isinstance(error, Interrupted) and lifeline.goodbye(PATIENCE):
        return
    failed = _is_from_jax(error)
    # The news may come later than the failure that it explains.
    news = None if isinstance(error, (Interrupted, UsageError)) and not failed else lifeline.news(5 if failed else 0)
    on_one_line = news or isinstance(error, (UsageError, MemoryError))
    lifeline.leave(getattr(error, "EXIT_CODE", 2 if on_one_line else 1))
    if news:
        raise UsageError(news) from error


def _is_from_jax(error: BaseException | None) -> bool:
    """Whether a failed computation is the error, or what led to it."""
    return error is not None and (isinstance(error, jax.errors.JaxRuntimeError) or _is_from_jax(error.__cause__ or error.__context__))


def initialize(coordinator: str | None, processes: int | None, process_id: int | None, timeout: int = 60) -> Lifeline | None:
    """Joins the processes of a run, before anything is computed.

    Returns what tells them of each other's end; None for a process alone, and on TPU pods, where JAX looks after that.

    What is not given is as srun, mpirun or a TPU pod say, where they started this process. Without them it is the only one.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: how many seconds they wait for each other.

    Raises:
      UsageError: if a value is out of range or missing, the address is wrong, its port is taken, or not all processes came in time.
    """
    if timeout < 1:
        raise UsageError(f"connect timeout is {timeout} s; it must be at least 1")
    given, known = Launch(coordinator, processes, process_id), launched()
    if processes not in (None, known.processes):
        known = Launch()  # The flags describe other processes than the launcher started.
    launch = Launch(*(there if here is None else here for here, there in zip(given, known, strict=True)))
    jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM from whoever handles it here.
    if launch == Launch():
        if _is_tpu_pod():
            _join_tpu_pod(timeout)
        return None
    if known.processes == 1 and processes is None and process_id is None:
        return None
    _check(launch, known)
    lifeline = Lifeline(launch.process_id, launch.processes, meet(launch, timeout))
    try:
        _join(launch, max(timeout, 60))
    except BaseException as error:
        _part(lifeline, error)
        raise
    return lifeline


def _join(launch: Launch, timeout: int) -> None:
    """Lets XLA join the processes, which have met. Raises UsageError if it cannot."""
    coordinator = launch.coordinator if launch.process_id == 0 else relay(launch.coordinator)
    _reach_without_proxy(address(coordinator)[0])
    # Nothing is left to be detected, and JAX would ask the network whether this is Kubernetes or a Google machine.
    limits = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(coordinator, *launch[1:], cluster_detection_method="deactivate", **limits)
    except RuntimeError as error:
        raise UsageError(f"cannot join the processes at {launch.coordinator}: {str(error).splitlines()[0]}") from error


def _reach_without_proxy(host: str) -> None:
    """Keeps XLA from asking a web proxy for the coordinator, and JAX from warning of that."""
    jax.config.update("jax_check_proxy_envs", False)
    if any(os.environ.get(f"{kind}_proxy") for kind in ("grpc", "https", "http")):
        excepted, also = "no_grpc_proxy", "no_proxy"
        os.environ[excepted] = ",".join(filter(None, (os.environ.get(excepted) or os.environ.get(also), host)))


def _check(launch: Launch, known: Launch) -> None:
    """Raises UsageError for a value that is missing or out of range; `known` is what the launcher says."""
    coordinator, processes, process_id, _ = launch
    if coordinator is None and known.processes is not None:
        raise UsageError(
            f"mpirun started this as process {process_id} of {processes} on several hosts, without saying where process 0 is; "
            "add --coordinator HOST:PORT with its host and a free port"
        )
    if None in (coordinator, processes, process_id):
        raise UsageError("several processes need --coordinator HOST:PORT, --processes N and --process-id I together")
    if processes < 1:
        raise UsageError(f"processes is {processes}; it must be at least 1")
    if not 0 <= process_id < processes:
        raise UsageError(f"process id is {process_id}; it must be between 0 and {processes - 1}")


def _is_tpu_pod() -> bool:
    """Whether this may be one of several workers with TPUs. JAX has looked for the chips when it was imported; the network is not asked."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    several = hosts is not None and ("," in hosts or os.environ.get("MEGASCALE_NUM_SLICES", "1") != "1")
    platforms = jax.config.jax_platforms or ""  # JAX_PLATFORMS; if that is not set, JAX names tpu where it finds chips.
    if several and not platforms:
        raise UsageError(f"this is a worker of a TPU pod ({hosts}), but JAX finds no TPU; install jax[tpu], or set JAX_PLATFORMS=cpu")
    # TPU_SKIP_MDS_QUERY is set by JAX where there is no chip.
    return "tpu" in platforms and (several if hosts is not None else "TPU_SKIP_MDS_QUERY" not in os.environ)


def _join_tpu_pod(timeout: int) -> None:
    """Lets JAX find the workers of the pod. Raises UsageError if it cannot, or they have not all come in time.

    They have no lifelines. XLA aborts the others, with pages of C++, where one dies or has ended for `HEARTBEAT` seconds.
    """
    joined: Future[None] = Future()

    def join() -> None:
        try:
            # Longer than is waited for it: XLA aborts the process when this time is over.
            limits = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
            jax.distributed.initialize(initialization_timeout=timeout + 60, **limits)
            joined.set_result(None)
        except Exception as error:
            joined.set_exception(error)

    threading.Thread(target=join, daemon=True).start()
    try:
        joined.result(timeout)
    except TimeoutError:
        raise UsageError(
            f"the workers of this TPU pod did not all reach the coordinator, worker 0, within {timeout} s; "
            "start the same command on every worker (--worker=all), or set --connect-timeout higher"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot find the workers of this TPU pod ({reason}); if it has only one, set TPU_SKIP_MDS_QUERY=1") from error


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
    # pmap takes this process's rows, as `share` gives them; a program compiled ahead wants those of all.
    return mapped if jax.process_count() > 1 else Program(mapped)


def on_one_device(function: Callable) -> Callable:
    """`function`, compiled for the first of this process's devices, where it takes its arguments."""
    program = Program(jax.jit(function))
    return lambda *args: program(*jax.device_put(args, jax.local_devices()[0]))


class Program:
    """A jitted or pmapped function, compiled on its first call with each set of shapes, with the options that this backend wants."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)(*args)

    def compiled(self, *args: Any) -> jax.stages.Compiled:
        """The executable for arguments of these shapes."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        if shapes not in self._compiled:
            self._compiled[shapes] = compile_lowered(self._function.lower(*args))
        return self._compiled[shapes]


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles with the options that this backend wants."""
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=CPU_CONVOLUTIONS)
    except Exception as error:  # XLA has no class of its own for an option that it does not know.
        if next(iter(CPU_CONVOLUTIONS)) not in str(error):
            raise
        return lowered.compile()


def steps_per_call(given: int | None) -> int:
    """How many steps one compiled call takes: what was asked for, else 1 on CPU and 20 where a call costs more than it does there."""
    return given or (1 if jax.default_backend() == "cpu" else 20)


def check_precision(precision: str) -> None:
    """Raises UsageError for bfloat16 on a device that has none of it."""
    device = jax.local_devices()[0]
    old = device.platform == "gpu" and float(getattr(device, "compute_capability", 0) or 0) < 8
    if precision == "bfloat16" and (device.platform == "cpu" or old):
        raise UsageError(
            f"train.precision is bfloat16, which {device.device_kind} ({device.platform}) does not compute in; "
            "it must be float32 there, or run on a TPU or a GPU of compute capability 8.0 or more"
        )


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


def process_count() -> int:
    """Processes of this run."""
    return jax.process_count()


def from_main_process(value: int) -> int:
    """The main process's value, on all of them; they wait for each other here."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
