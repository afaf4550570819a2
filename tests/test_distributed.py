"""Processes find each other as hand-written flags, Slurm, Open MPI and TPU pods start them. Run as a script, this file is one of them."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from wdkd import parallel, parsing
from wdkd.errors import Interrupted, UsageError

pytestmark = pytest.mark.timeout(300)
LAUNCH = Path(__file__).parents[1] / "launch"
LAUNCHERS = ("SLURM_", "OMPI_", "PMIX_", "TPU_", "MEGASCALE_", "CUDA_VISIBLE_DEVICES", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE_IDS")
HERE = "127.0.0.1"


def main(given):
    """One process: joins the others, and prints what it then knows of them."""
    try:
        with parallel.joined(*json.loads(given)):
            jax.config.update("jax_platforms", "cpu")  # On a machine that is said to have TPUs.
            add = parallel.map_over_devices(lambda x: jax.lax.psum(x.sum(), parallel.AXIS), arguments=1)
            total = float(add(parallel.share(np.arange(8.0))))
            print(f"\n{json.dumps([jax.process_index(), jax.process_count(), jax.device_count(), total])}")
    except UsageError as error:
        parsing.fail(str(error))


def environment(**more):
    """That of this process, without what may have launched it. Something that is None is left out."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {name: value for name, value in (mine | {"JAX_PLATFORMS": "cpu"} | more).items() if value is not None}


@contextlib.contextmanager
def started(*commands):
    """Processes, one for each (environment, command), which do not outlive the test."""
    together = [
        subprocess.Popen([sys.executable, *map(str, command)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for variables, command in commands
    ]
    try:
        yield together
    finally:
        for process in together:
            process.kill()
            process.communicate()


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind((HERE, 0))
        return one.getsockname()[1]


# --- started together --------------------------------------------------------------------------------------------------


def slurm(index, count=2, nodes=HERE, **more):
    common = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": nodes}
    return common | {"SLURM_NTASKS": str(count), "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)} | more


def open_mpi(index, count=2, local=2, **more):
    values = {"SIZE": count, "RANK": index, "LOCAL_SIZE": local, "LOCAL_RANK": index % local}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()} | more


def open_mpi_5(index, **more):
    return open_mpi(index, PMIX_NAMESPACE=f"prterun-host-{os.getpid()}@1", **more)


def open_mpi_4(index, **more):
    return open_mpi(index, OMPI_MCA_orte_hnp_uri=f"{os.getpid() << 12}.0;tcp://{HERE}:34499;tcp6://[fd00::2]:56181", **more)


def tpu_pod(index, **more):
    """Variables that keep JAX from asking the metadata server; JAX_FORCE_TPU_INIT stands for the chips."""
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": HERE, "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    pod = {"TPU_WORKER_HOSTNAMES": f"{HERE},{HERE}", "TPU_WORKER_ID": str(index), "JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": None}
    return slices | pod | more


TOGETHER = {
    "flags": lambda index, port: ({}, (f"{HERE}:{port}", 2, index)),
    "flags, behind a web proxy": lambda index, port: ({"https_proxy": f"http://{HERE}:9"}, (f"{HERE}:{port}", 2, index)),
    "slurm": lambda index, port: (slurm(index), ()),
    "open mpi 4": lambda index, port: (open_mpi_4(index), ()),
    "open mpi 5, two hosts": lambda index, port: (open_mpi_5(index, local=1), (f"{HERE}:{port}",)),
    "tpu pod": lambda index, port: (tpu_pod(index, JAX_COORDINATOR_PORT=str(port)), ()),
}
"""(variables, arguments) of a process."""


@pytest.mark.parametrize("launcher", TOGETHER)
def test_two_processes_are_one_run(launcher):
    port, commands = free_port(), []
    for index in (1, 0):
        variables, given = TOGETHER[launcher](index, port)
        given = json.dumps((*given, None, None, None)[:3])
        commands.append((environment(**{"JAX_NUM_CPU_DEVICES": "2"} | variables), (__file__, given)))
    with started(*commands) as together:
        for index, process in zip((1, 0), together, strict=True):
            printed, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
            assert json.loads(printed.splitlines()[-1]) == [index, 2, 4, 28.0]


# --- alone -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """A function that sets the variables of a launcher, and only those. JAX is not to be asked to join any processes."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **more: pytest.fail(f"joined {given} {more}"))
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items() if value is not None]


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="no launcher"),
        pytest.param(slurm(0, count=1), id="srun of one task"),
        pytest.param(without(slurm(0, count=4), "SLURM_STEP_NODELIST"), id="script of sbatch, or shell of salloc"),
        pytest.param(slurm(0, count=4, SLURM_STEP_NUM_TASKS="1"), id="shell of salloc that is a step"),
        pytest.param(open_mpi(0, count=1, local=1), id="mpirun -n 1"),
        pytest.param(slurm(1, count=2) | open_mpi(0, count=1, local=1), id="mpirun -n 1 below slurm"),
        pytest.param(tpu_pod(1), id="worker of a TPU pod told to use its CPU"),
    ],
)
def test_a_process_started_alone_stays_alone(variables, launched):
    launched(variables)
    parallel.initialize(None, None, None)


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}, False),
        ({}, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True),
    ],
)
def test_workers_with_tpus_are_found_by_jax(variables, alone, launched, monkeypatch):
    joined = []
    launched(variables)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        parallel.initialize(None, None, None)
    finally:
        jax.config.update("jax_platforms", before)
    assert len(joined) == (not alone)


# --- what a launcher says ----------------------------------------------------------------------------------------------


@pytest.fixture
def joined(launched, monkeypatch):
    """A function that says how a process would join: (coordinator, how many there are, which it is, its GPUs)."""
    calls = []
    monkeypatch.setattr(parallel, "meet", lambda launch, timeout: {})
    monkeypatch.setattr(parallel, "relay", lambda coordinator: coordinator)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **more: calls.append(given))

    def joined(variables, *given):
        launched(variables)
        parallel.initialize(*(*given, None, None, None)[:3])
        return calls[-1]

    return joined


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a-1.b.c,other", "a-1.b.c"),
        ("node[001-015],host2", "node001"),
        ("node[7,9-12]", "node7"),
        ("rack[2-3]n[08,11],host2", "rack2n08"),
    ],
)
def test_the_first_node_of_slurm_is_the_coordinator(nodes, first, joined):
    coordinator, *rest = joined(slurm(3, count=9, nodes=nodes))
    assert coordinator.rpartition(":")[0] == first
    assert rest == [9, 3, [3]]


def test_mpirun_is_the_coordinator_where_open_mpi_says_where_it_is(joined):
    coordinator, *rest = joined(open_mpi(3, count=4, OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"))
    assert coordinator.startswith("10.96.0.1:")
    assert rest == [4, 3, [1]]


def test_all_processes_of_a_job_agree_on_a_port_and_other_jobs_take_others(joined):
    jobs = (slurm(0), slurm(1), slurm(0, SLURM_STEP_ID="1"), slurm(0, SLURM_JOB_ID="7"), open_mpi_4(0), open_mpi_5(0))
    ports = [int(joined(variables)[0].rpartition(":")[2]) for variables in jobs]
    assert len(set(ports)) == 5 and ports[0] == ports[1]
    assert all(61440 <= port < 65536 for port in ports)
    assert joined({"JAX_COORDINATOR_PORT": "1234"})[0] == f"{HERE}:1234"


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (slurm(1), [1]),
        (slurm(1, CUDA_VISIBLE_DEVICES="4,5"), [1]),
        (slurm(1, CUDA_VISIBLE_DEVICES="5"), None),
        (slurm(1, JAX_LOCAL_DEVICE_IDS="2,3"), None),
        (slurm(1, SLURM_LOCALID="0", SLURM_STEP_NUM_NODES="2"), None),
        (open_mpi_5(1), [1]),
        (open_mpi_4(1, local=1), None),
    ],
)
def test_a_process_takes_its_own_gpu_of_those_it_shares_with_others(variables, devices, joined):
    assert joined(variables)[3] == devices


@pytest.mark.parametrize(
    ("variables", "given", "expected"),
    [
        (slurm(0, 9, "elsewhere"), ("a:80", 2, 1), ("a:80", 2, 1, None)),
        (slurm(1, 2, "elsewhere"), ("a:80", 2, 1), ("a:80", 2, 1, [1])),
        (slurm(1, 2, "elsewhere"), ("a:80",), ("a:80", 2, 1, [1])),
        (open_mpi_5(3, count=4), ("a:80",), ("a:80", 4, 3, [1])),
        (slurm(0, count=1) | open_mpi(3, count=4), ("a:80",), ("a:80", 4, 3, [1])),
    ],
)
def test_flags_come_before_the_launcher_and_mpirun_before_slurm(variables, given, expected, joined):
    assert joined(variables, *given) == expected


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "text"),
    [
        *[(wrong, f"coordinator is {wrong!r}; it must be HOST:PORT") for wrong in ("", "host", ":80", "host:", "host:notaport", "a b:80")],
        *[(wrong, "a port between 1 and 65535") for wrong in ("host:0", "host:65536", "::1:80", "http://host:80", "host:80\n")],
        ("nosuchhost.invalid:80", "nosuchhost.invalid is no known host; give its IP address"),
    ],
)
@pytest.mark.parametrize("process_id", [0, 1])
def test_a_malformed_address_is_refused_at_once(address, text, process_id, launched):
    begun = time.monotonic()
    with pytest.raises(UsageError) as refused:
        parallel.initialize(address, 2, process_id)
    assert text in str(refused.value)
    assert time.monotonic() - begun < 20, "as long as the name server needs"


@pytest.mark.parametrize(
    ("variables", "given", "text"),
    [
        (open_mpi_5(3, count=4, local=2), (), "as process 3 of 4 on several hosts, without saying where process 0 is; add --coordinator"),
        (open_mpi(0), (f"{HERE}:1", 3), "together"),
        (slurm(0), (f"{HERE}:1", None, 2), "process id is 2; it must be between 0 and 1"),
        (slurm(0, count=1), (f"{HERE}:1", 2), "together"),
        (slurm(0, count=1), (f"{HERE}:1", None, 1), "process id is 1; it must be between 0 and 0"),
        (slurm(1, nodes="nosuchhost.invalid"), (), "nosuchhost.invalid is no known host"),
        ({}, (None, None, None, 0), "connect timeout is 0 s; it must be at least 1"),
    ],
)
def test_what_the_launcher_does_not_know_must_be_given(variables, given, text, launched):
    launched(variables)
    with pytest.raises(UsageError, match=text):
        parallel.initialize(*(*given, None, None, None)[: max(3, len(given))])


def test_a_tpu_worker_where_jax_has_no_tpu_is_refused(launched):
    launched({"TPU_WORKER_HOSTNAMES": "a,b"})
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "")
    try:
        with pytest.raises(UsageError, match=r"worker of a TPU pod \(a,b\), but JAX finds no TPU; install jax\[tpu\]"):
            parallel.initialize(None, None, None)
    finally:
        jax.config.update("jax_platforms", before)


WITHIN = r"within 2 s; start all processes in that time, .*, or set --connect-timeout higher"
WITHOUT_OTHERS = {
    "nobody is there": (1, False, f"process 1 of 3 cannot reach the coordinator ADDRESS {WITHIN}"),
    "somebody else is there": (1, True, f"process 1 of 3 reached the coordinator ADDRESS, but not all others did {WITHIN}"),
    "nobody comes": (0, False, f"process 1 of 3, process 2 of 3 did not come to the coordinator ADDRESS {WITHIN}"),
    "the port is taken": (0, True, r"process 0 cannot open the port of the coordinator ADDRESS \(Address already in use\); .*"),
}
"""(process id, whether somebody who says nothing has the port, what is said)"""


def test_runs_without_the_others_end_with_one_line(tmp_path):
    command = (LAUNCH / "distill.py", "--workdir", tmp_path / "run", "--method.name", "ce", "--connect-timeout", 2, "--processes", 3)
    with socket.create_server((HERE, 0)) as taken:
        commands, lines = [], []
        for process_id, port_is_taken, line in WITHOUT_OTHERS.values():
            address = f"{HERE}:{taken.getsockname()[1] if port_is_taken else free_port()}"
            commands.append((environment(), (*command, "--coordinator", address, "--process-id", process_id)))
            lines.append(f"error: {line.replace('ADDRESS', re.escape(address))}\n")
        with started(*commands) as together:
            for process, line in zip(together, lines, strict=True):
                printed, errors = process.communicate(timeout=120)
                assert re.fullmatch(line, errors), errors
                assert (process.returncode, printed) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_a_tpu_worker_without_the_others_ends_with_one_line():
    variables = tpu_pod(1, JAX_COORDINATOR_PORT=str(free_port()))
    with started((environment(**variables), (__file__, json.dumps((None, None, None, 2))))) as (process,):
        printed, errors = process.communicate(timeout=120)
    assert (process.returncode, printed) == (2, "")
    assert errors.startswith("error: the workers of this TPU pod did not all reach the coordinator, worker 0, within 2 s; ")
    assert errors.count("\n") == 1, errors


# --- one process dies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_of_which_one_process_is_killed_ends_with_one_line(victim, tmp_path):
    run = tmp_path / "run"
    sizes = ("--data.n-per-class", 5, "--model.width", 4, "--train.batch-size", 20, "--train.log-every", 1, "--train.steps", 10**6)
    command = (LAUNCH / "distill.py", "--workdir", run, "--method.name", "ce", *sizes, "--coordinator", f"{HERE}:{free_port()}")
    with started(*[(environment(), (*command, "--processes", 2, "--process-id", index)) for index in (0, 1)]) as together:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 20:
            assert all(process.poll() is None for process in together), [process.communicate() for process in together]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        together[victim].kill()
        _, errors = together[1 - victim].communicate(timeout=20)
    assert together[1 - victim].returncode == 2
    lines = [line for line in errors.splitlines() if not line.startswith("digits ce n=5 ")]  # Progress.
    assert lines == [
        f"error: process {victim} of 2 has ended; this one stops too, and the same command on all of them goes on from the last checkpoint"
    ]


class Lifeline:
    """Stands for that of a process: knows whether all others stop, and who has ended. Remembers how long the news was waited for."""

    def __init__(self, all_stop, ended):
        self.all_stop, self.ended, self.waited, self.code = all_stop, ended, None, None

    def goodbye(self, patience=None):
        self.code = "goodbye"
        return self.all_stop

    def news(self, patience=0.0):
        self.waited = patience
        return self.ended

    def leave(self, code):
        self.code = code


def caused(error, cause):
    error.__cause__ = cause
    return error


GLOO = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
DEAD = "process 1 of 2 has ended"
PARTINGS = {
    "the end": (None, True, None, "goodbye"),
    "a signal for all": (Interrupted("stopped"), True, None, "goodbye"),
    "a signal for this one": (Interrupted("stopped"), False, None, 75),
    "an error of its own": (UsageError("full"), True, None, 2),
    "an error of its own and the news": (UsageError("full"), True, DEAD, 2),
    "too little memory": (MemoryError(), True, None, 2),
    "a bug": (KeyError("bug"), True, None, 1),
    "a failed computation": (GLOO, True, None, 1),
    "a failed computation and the news": (GLOO, True, DEAD, 2),
    "a failed computation in other words": (caused(UsageError("cannot write"), caused(ValueError(), GLOO)), True, DEAD, 2),
}
"""(what comes out of the body, whether all others stop, who has ended, how the process parts)"""


@pytest.mark.parametrize("name", PARTINGS)
def test_how_a_process_parts_from_the_others(name, monkeypatch):
    error, all_stop, ended, code = PARTINGS[name]
    lifeline = Lifeline(all_stop, ended)
    monkeypatch.setattr(parallel, "initialize", lambda *given: lifeline)
    came_out = None
    try:
        with parallel.joined(None, None, None):
            if error is not None:
                raise error
    except BaseException as exception:
        came_out = exception
    assert lifeline.code == code
    if "computation" in name:
        assert 1 < lifeline.waited < 30
    if ended and "its own" not in name:
        assert isinstance(came_out, UsageError) and str(came_out) == DEAD
    else:
        assert came_out is error


# --- meeting -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def meeting(monkeypatch):
    """A function that lets (processes, process id, timeout) of threads meet: for each, whether it heard all say goodbye, or why not."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **more: None)

    def meet(*those, before=lambda port: None):
        port, outcome = free_port(), {}

        def one(key, processes, process_id, timeout):
            try:
                outcome[key] = parallel.initialize(f"{HERE}:{port}", processes, process_id, timeout).goodbye(10)
            except UsageError as error:
                outcome[key] = str(error)

        threads = [threading.Thread(target=one, args=(index, *each)) for index, each in enumerate(those)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        before(port)
        for thread in threads:
            thread.join(20)  # Longer than any of them may wait.
        return [outcome[index] for index in range(len(those))]

    return meet


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_processes_meet_in_any_order(order, meeting):
    assert meeting(*[(4, process_id, 30) for process_id in order]) == [True] * 4


def test_strangers_do_not_count(meeting):
    def stranger(port):
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff", b""):
            with socket.create_connection((HERE, port)) as connection:
                connection.sendall(words)

    assert meeting((2, 0, 30), before=lambda port: (stranger(port), parallel.initialize(f"{HERE}:{port}", 2, 1, 30).goodbye())) == [True]


def test_a_number_given_twice_is_noticed(meeting):
    first, second, third = meeting((3, 0, 2), (3, 1, 3), (3, 1, 3))
    assert "process 2 of 3 did not come" in first
    assert "process 1 of 3 reached" in second and "process 1 of 3 reached" in third and "each with its own --process-id" in third


def test_another_number_of_processes_is_noticed(meeting):
    first, second = meeting((2, 0, 2), (3, 1, 3))
    assert "process 1 of 2 did not come" in first
    assert "process 1 of 3 reached" in second


if __name__ == "__main__":
    main(*sys.argv[1:])
