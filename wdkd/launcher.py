"""Which process this is of how many, as srun or mpirun say it."""

import os
import re
import zlib
from typing import NamedTuple


class Launch(NamedTuple):
    """Which process this is of how many, process 0 being at `coordinator`, and the local devices it takes; None where nothing is known."""

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    local_devices: list[int] | None = None


def launched() -> Launch:
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
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri", "")  # noqa: SIM112  # Of mpirun itself; Open MPI 5 says no such thing.
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
