"""On a cluster that loses a node nothing is lost: every run ends as one that nothing disturbed, and goes on where it was.

Real clusters, of processes of this machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import edit
from ray_jobs import do
from tensorboardX.proto.event_pb2 import Event
from test_sweep import EDITS, LONG, ROOT, found, has_begun, is_alive, jobs_below, meanwhile, process_at, wait_for

from wdkd.errors import UsageError
from wdkd.interruption import Interruption
from wdkd.lock import locked
from wdkd.pool import Outcome
from wdkd.sweep import Cluster, run_sweep
from wdkd.watch import last_step

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'wdkd[ray]'")
from ray.cluster_utils import Cluster as RayCluster  # noqa: E402

from wdkd import ray_pool  # noqa: E402
from wdkd.ray_pool import RayPool, claimed, probe  # noqa: E402

pytestmark = pytest.mark.timeout(900)
SHORTER = {"train.steps": 240, "train.checkpoint_every": 30}
BASE = edit(LONG, SHORTER)
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a sweep on this machine finds, each run on one core, as on a cluster by default."""
    jobs = jobs_below(tmp_path_factory.mktemp("undisturbed"), BASE, seeds=(0, 1, 2))
    assert run_sweep(jobs, workers=CORES) == []
    return list(found(jobs))


@pytest.fixture(scope="module")
def cluster():
    """A cluster whose head has room for one job."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Nodes have the code of these tests.
        started = RayCluster(initialize_head=True, head_node_args={"include_dashboard": False, **NODE})
        yield started
        started.shutdown()


@contextlib.contextmanager
def another_node(cluster):
    """The process of one more node, with all of whose processes it is gone afterwards."""
    (raylet,) = cluster.add_node(**NODE).all_processes["raylet"]
    try:
        yield raylet.process
    finally:
        kill(raylet.process)


def kill(raylet):
    """Ends a node as a power cut does: all that runs there at once."""
    processes = [raylet.pid, *descendants(raylet.pid)]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    raylet.wait()
    wait_for(lambda: not any(map(is_alive, processes)), 10)


def parent_of(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(process):
    """The processes that a process has started, and those that these have."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if parent_of(path.name) == process:
                found += [int(path.name), *descendants(int(path.name))]
    return found


def starts(job):
    """The step before each start of a run, in the order of the starts."""
    steps = []
    for path in sorted((job.workdir / "events").iterdir(), key=lambda path: path.name.rpartition(".")[2].zfill(30)):
        content = path.read_bytes()
        first = Event.FromString(content[12 : 12 + int.from_bytes(content[:8], "little")])  # A record: length, its checksum, the event.
        second = content[16 + int.from_bytes(content[:8], "little") :]
        event = Event.FromString(second[12 : 12 + int.from_bytes(second[:8], "little")])
        assert first.file_version and event.HasField("session_log")
        steps.append(event.step - 1)
    return steps


# --- sweeps -------------------------------------------------------------------------------------------------------------


def test_a_node_that_dies_costs_nothing(cluster, undisturbed, tmp_path, capsys):
    """Of two nodes at work. Its run goes on from its checkpoint, the other is not disturbed, the third waits for room."""
    jobs = jobs_below(tmp_path, BASE, seeds=(0, 1, 2))
    lost = []

    def cut_the_power(raylet):
        wait_for(lambda: sum(map(has_begun, jobs)) == 2, 600)
        lost.extend(job for job in jobs if has_begun(job) and process_at(job) in descendants(raylet.pid))
        kill(raylet)

    with another_node(cluster) as raylet, meanwhile(lambda: cut_the_power(raylet)):
        assert run_sweep(jobs, cluster=Cluster(cluster.address)) == []
    assert list(found(jobs)) == undisturbed
    (lost,) = lost
    for job in jobs:
        first, *others = starts(job)
        assert first == 0 and len(others) == (job == lost) and all(step >= 30 for step in others)
    assert f"{lost.workdir}: run again, its node has died" in capsys.readouterr().err


def test_a_signal_saves_the_runs_at_work_and_a_sweep_without_ray_goes_on(undisturbed, tmp_path):
    """On a cluster that the sweep has for itself, which ends with it."""
    jobs = jobs_below(tmp_path, BASE, seeds=(0, 1))
    edits = [f"--{name.replace('_', '-')}={value}" for name, value in (EDITS | SHORTER).items()]
    grid = ["--methods", "ce", "--n-per-class", "20", "--seeds", "0", "1", "--executor", "ray"]
    places = ["--workdir", "runs", "--results", "results"]
    command = [sys.executable, ROOT / "launch" / "sweep.py", *grid, *edits, *places]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        wait_for(lambda: any(map(has_begun, jobs)) or process.poll() is not None, 600)
        processes = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "error: stopped by a signal; 0 of 2 runs are complete, the same command goes on with the rest"
    assert "Traceback" not in errors
    wait_for(lambda: not any(map(is_alive, processes)), 30)
    saved = [job for job in jobs if has_begun(job)]
    for job in saved:
        newest = max(int(path.name) for path in (job.workdir / "checkpoints").iterdir() if path.name.isdigit())
        assert newest >= last_step(job.workdir / "metrics.jsonl"), "it was saved, and not killed"
    assert run_sweep(jobs, workers=CORES) == []
    assert list(found(jobs)) == undisturbed[:2]
    for job in saved:
        assert len(starts(job)) == 2 and starts(job)[1] > 0


# --- jobs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outcomes(cluster, monkeypatch):
    """A function: jobs -> all of their outcomes, in the order of the jobs."""

    def run(*jobs):
        with Interruption() as interruption, RayPool(do, cluster.address, 1, 0, interruption) as pool:
            found = list(pool.run(jobs))
        return [[outcome for position, outcome in found if position == index] for index in range(len(jobs))]

    return run


def test_what_jobs_have_and_what_becomes_of_them(cluster, outcomes, tmp_path, monkeypatch):
    """Cores of their own, this directory and environment; exceptions are outcomes, and a worker outlives Ray's process above it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_pool, "TRIES", 2)
    (tmp_path / "lost").mkdir()
    with another_node(cluster):
        monkeypatch.setenv("TFDS_DATA_DIR", "data")
        monkeypatch.setenv("SOMETHING_ELSE", "x")
        complaint = ("complain", ("TFDS_DATA_DIR", "CUDA_VISIBLE_DEVICES", "SOMETHING_ELSE"))
        *met, (raised,), lost = outcomes(*[("meet", tmp_path / "met")] * 2, complaint, ("lose Ray's process", tmp_path / "lost"))
        begun = {int(path.name) for path in (tmp_path / "lost").iterdir() if not path.suffix}
        saved = (tmp_path / "lost").glob
        wait_for(lambda: {int(path.stem) for path in saved("*.saved")} == begun and not any(map(is_alive, begun)), 60)
    cores = [set(outcome.text.split()[1:]) for (outcome,) in met]
    assert [len(each) for each in cores] == [1, 1] and (CORES == 1 or not cores[0] & cores[1])
    assert (raised.kind, raised.text) == ("failed", f"{tmp_path} 'data' '' None"), "no GPU but those that were asked for"
    assert [outcome.kind for outcome in lost] == ["lost", "failed"] and len(begun) == 2
    assert lost[1].text.startswith("Ray could not run it in 2 tries: WorkerCrashedError: The worker died unexpectedly")


def test_code_that_nodes_do_not_have_is_named(outcomes, monkeypatch):
    monkeypatch.setattr(do, "__module__", "only_here")
    monkeypatch.setitem(sys.modules, "only_here", sys.modules["ray_jobs"])
    assert outcomes("job") == [[Outcome("failed", "ModuleNotFoundError: No module named 'only_here'")]]


@pytest.mark.parametrize(("directory", "words"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_a_node_without_the_sweeps_directory_is_named(directory, words, tmp_path):
    (tmp_path / "file").touch()
    outcome = ray_pool.run_here(do, ("say", ""), str(tmp_path / directory), 1)
    assert outcome == Outcome(
        "failed", f"{tmp_path / directory}: {words} on the node {os.uname().nodename}; it must be there on every node"
    )


@pytest.mark.skipif(CORES < 2, reason="one core cannot be shared out")
def test_cores_are_claimed_once_and_free_again_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool.tempfile, "gettempdir", lambda: str(tmp_path))
    allowed = os.sched_getaffinity(0)
    with claimed(1) as one, claimed(1) as other, claimed(CORES) as shared:
        assert len(one) == len(other) == 1 and not one & other
        assert shared == allowed, "more CPUs than there are: some are shared, none is missing"
    with claimed(CORES + 5) as all_of_them:
        assert all_of_them == allowed
    with locked(tmp_path / f"wdkd-cores-{os.getuid()}" / str(min(allowed))), claimed(1) as one:
        assert min(allowed) not in one


def test_where_nothing_can_be_written_cores_are_shared(monkeypatch):
    monkeypatch.setattr(ray_pool.tempfile, "gettempdir", lambda: "/proc")
    with claimed(1) as one, claimed(1) as other:
        assert one == other and len(one) == 1


# --- clusters that are not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://127.0.0.1:10001", "address is ray://127.0.0.1:10001; it must be HOST:PORT or auto"),
        ("nonsense", "no Ray cluster at nonsense (ValueError: Invalid address format: nonsense); start one by `ray start --head`"),
        ("127.0.0.1:9", "no Ray cluster at 127.0.0.1:9 (no answer within 6 s); start one"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(address, words, monkeypatch, capfd):
    monkeypatch.setattr(ray_pool, "ANSWER", 6)
    began = time.monotonic()
    with pytest.raises(UsageError) as refused:
        probe(address)
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "") and time.monotonic() - began < 60


def test_a_run_that_no_node_has_room_for_is_refused(cluster, tmp_path):
    jobs = jobs_below(tmp_path, seeds=(0,))
    for options, words in (
        ({"cpus_per_run": 2}, "no node has the 2 CPUs and 0 GPUs of a run; they have 1 and 0: lower --cpus-per-run"),
        ({"gpus_per_run": 1}, "no node has the 1 CPUs and 1 GPUs of a run"),
        ({"cpus_per_run": 0}, "a run has 0 CPUs and 0 GPUs; it must have at least 1 and 0"),
    ):
        with pytest.raises(UsageError, match=words):
            run_sweep(jobs, cluster=Cluster(cluster.address, **options))
    assert not jobs[0].workdir.exists() and not ray.is_initialized()
