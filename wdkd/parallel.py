"""Devices and processes: the only file that says pmap, or jax.distributed."""

import contextlib
import functools
import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wdkd.cache import cache_directory
from wdkd.errors import UsageError

AXIS = "devices"
CPU_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
"""Makes a convolution's weight gradient 4 to 12 times faster on CPU; a jaxlib without it is compiled for as it is."""


class Launch(NamedTuple):
    """Which process this is of how many, process 0 being at `coordinator`, and the local devices it takes; None where nothing is known."""

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    local_devices: list[int] | None = None


def initialize(coordinator: str | None, processes: int | None, process_id: int | None, timeout: int = 60) -> None:
    """Joins the processes of a run, before anything is computed.

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
    given, known = Launch(coordinator, processes, process_id), _launched()
    if processes not in (None, known.processes):
        known = Launch()  # The flags describe other processes than the launcher started.
    launch = Launch(*(there if here is None else here for here, there in zip(given, known, strict=True)))
    if launch == Launch():
        if _is_tpu_pod():
            _join_tpu_pod(timeout)
        return
    if known.processes == 1 and processes is None and process_id is None:
        return
    _check(launch, known)
    _meet(launch, timeout)
    try:
        # Nothing is left to be detected, and JAX would ask the network whether this is Kubernetes or a Google machine.
        jax.distributed.initialize(*launch, cluster_detection_method="deactivate", initialization_timeout=max(timeout, 60))
    except RuntimeError as error:
        raise UsageError(f"cannot join the processes at {launch.coordinator}: {str(error).splitlines()[0]}") from error


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


def _launched() -> Launch:
    """What mpirun or srun say of this process."""
    # mpirun first: below Slurm its processes inherit the variables of the srun that started its daemons.
    return _launched_by_mpirun() or _launched_by_srun() or Launch()


def _launched_by_mpirun() -> Launch | None:
    """What Open MPI says of this process; without coordinator if it has several hosts and does not say where process 0 is."""
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    found = [os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in names]
    if None in found:
        return None
    processes, process_id, on_this_host, local_id = map(int, found)
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri", "")  # noqa: SIM112. Where mpirun itself is; Open MPI 5 does not say.
    mpirun = re.search(r"tcp://([^,:;]+)", uri)
    host = "127.0.0.1" if on_this_host == processes else mpirun and mpirun[1]
    port = _port(os.environ.get("PMIX_NAMESPACE", uri))
    return Launch(host and f"{host}:{port}", processes, process_id, _own_device(local_id, alone=on_this_host == 1))


def _launched_by_srun() -> Launch | None:
    """What Slurm says of this process, if it is a task of a step: in the script of sbatch and the shell of salloc, it is not."""
    names = ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")
    job, nodes, process_id, local_id = found = [os.environ.get(f"SLURM_{name}") for name in names]
    if None in found:
        return None
    # Where the shell of salloc is a step of one task, SLURM_NTASKS is that of the whole allocation.
    processes = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
    first = re.match(r"(\[[^]]*\]|[^,[])*", nodes)[0]  # node[001-015,017],other
    host = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)
    port = _port(f"{job}.{os.environ.get('SLURM_STEP_ID')}")
    alone = os.environ.get("SLURM_STEP_NUM_NODES") == str(processes)
    return Launch(f"{host}:{port}", processes, int(process_id), _own_device(int(local_id), alone=alone))


def _port(job: str) -> int:
    """A port that all processes of a job agree on, above those that the system hands out."""
    return int(os.environ.get("JAX_COORDINATOR_PORT") or 61440 + zlib.crc32(job.encode()) % 4096)


def _own_device(local_id: int, *, alone: bool) -> list[int] | None:
    """The GPU of one process of several on a host; None, for all that it sees, if it is alone there or the launcher shows it one only."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "several,").split(",")
    return None if alone or len(shown) == 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ else [local_id]


def _is_tpu_pod() -> bool:
    """Whether this may be one of several workers with TPUs. JAX has looked for the chips when it was imported; the network is not asked."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    several = hosts is not None and ("," in hosts or os.environ.get("MEGASCALE_NUM_SLICES", "1") != "1")
    if several and jax.config.jax_platforms is None:
        raise UsageError(f"this is a worker of a TPU pod ({hosts}), but JAX finds no TPU; install jax[tpu], or set JAX_PLATFORMS=cpu")
    # TPU_SKIP_MDS_QUERY is set by JAX where there is no chip.
    return "tpu" in (jax.config.jax_platforms or "") and (several or hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ)


def _join_tpu_pod(timeout: int) -> None:
    """Lets JAX find the workers of the pod. Raises UsageError if they have not all come in time."""
    joined: Future[None] = Future()

    def join() -> None:
        try:
            # Longer than is waited for it: XLA aborts the process when this time is over.
            jax.distributed.initialize(initialization_timeout=timeout + 60)
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
    except (OSError, ValueError):
        pass  # No metadata server, or one that knows of no pod: TPUs of this machine alone.


def _meet(launch: Launch, timeout: int) -> None:
    """Returns when all processes have come to the coordinator, else raises UsageError.

    XLA must not be asked before: where a process does not come or a port is taken, it aborts with pages of C++.
    """
    address = re.fullmatch(r"(?:\[(?P<six>[^][\s]+)\]|(?P<name>[^][:\s]+)):(?P<port>[0-9]{1,5})", launch.coordinator)
    if address is None or not 1 <= int(address["port"]) <= 65535:
        raise UsageError(f"coordinator is {launch.coordinator!r}; it must be HOST:PORT with a port between 1 and 65535, as 10.0.0.1:1234")
    host, port = address["six"] or address["name"], int(address["port"])
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"coordinator is {launch.coordinator}, but {host} is no known host; use its IP address") from error
    if launch.process_id == 0:
        _await_others(launch, port, timeout)
    else:
        _report(launch, (host, port), timeout)


GO = b"wdkd: all have come"


def _await_others(launch: Launch, port: int, timeout: int) -> None:
    """Process 0's part of `_meet`: hears all others, lets them go on together, and leaves the port to XLA."""
    deadline = time.monotonic() + timeout
    missing = [_name(process_id, launch.processes) for process_id in range(1, launch.processes)]
    both = socket.has_dualstack_ipv6()
    with contextlib.ExitStack() as connections:
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            server = connections.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=len(missing)))
        except OSError as error:
            raise UsageError(
                f"process 0 cannot listen on port {port} of the coordinator {launch.coordinator} ({error.strerror}); choose another port"
            ) from error
        come = []
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                absent = ", ".join(missing[:8])
                raise UsageError(f"{absent} did not come to the coordinator {launch.coordinator} {_advice(timeout)}") from None
            connection.settimeout(1)
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is not one that is missing.
                missing.remove(connection.recv(99).decode())
                come.append(connection)
        for connection in come:
            with contextlib.suppress(OSError):
                connection.sendall(GO)


def _report(launch: Launch, address: tuple[str, int], timeout: int) -> None:
    """The other processes' part of `_meet`: says to process 0 which this is, until it answers."""
    deadline = time.monotonic() + timeout
    name = _name(launch.process_id, launch.processes)
    reached = False
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=left) as connection:
            reached = True
            connection.sendall(name.encode())
            if connection.recv(99) == GO:
                return
        time.sleep(0.2)
    if reached:
        raise UsageError(f"{name} reached the coordinator {launch.coordinator}, but not all others did {_advice(timeout)}")
    raise UsageError(f"{name} cannot reach the coordinator {launch.coordinator} {_advice(timeout)}")


def _name(process_id: int, processes: int) -> str:
    return f"process {process_id} of {processes}"


def _advice(timeout: int) -> str:
    return (
        f"within {timeout} s; start all processes with the same --coordinator, where process 0 runs, the same --processes and each its own "
        "--process-id, or set --connect-timeout higher"
    )


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
    return mapped if jax.process_count() > 1 else _compiled_on_first_call(mapped)


def on_one_device(function: Callable) -> Callable:
    """`function`, compiled for the first of this process's devices, where it takes its arguments."""
    compiled = _compiled_on_first_call(jax.jit(function))
    return lambda *args: compiled(*jax.device_put(args, jax.local_devices()[0]))


def _compiled_on_first_call(function: Any) -> Callable:
    """Compiles a jitted or pmapped function once for each set of shapes, with the options that this backend wants."""
    compiled: dict[Any, Callable] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        if shapes not in compiled:
            compiled[shapes] = compile_lowered(function.lower(*args))
        return compiled[shapes](*args)

    return call


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
