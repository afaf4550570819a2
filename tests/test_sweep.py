"""A sweep ends with every run finished or named with its reason, and given again it ends as one that nothing disturbed."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from conftest import edit, method_config, tiny

from wdkd import sweep
from wdkd.config import STUDENTS
from wdkd.errors import Busy, Diverged, UsageError
from wdkd.grid import Grid, expand
from wdkd.interruption import Interruption
from wdkd.lock import locked
from wdkd.pool import Outcome
from wdkd.result import read_result, results_path, write_result
from wdkd.sweep import execute, publish, run_sweep, unpublished

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[1]
EDITS = {"model.width": 4, "train.steps": 240, "train.batch_size": 20, "train.checkpoint_every": 40, "train.log_every": 10}
LONG = edit(STUDENTS["digits"], EDITS)
"""Long enough to be disturbed: seconds, with a checkpoint after each sixth of them."""


def jobs_below(directory, base=LONG, **grid):
    axes = {"methods": ("ce",), "n_per_class": (20,), "seeds": (0, 1)} | grid
    return expand(Grid(**axes), base, directory / "runs", directory / "results")


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def has_begun(job):
    """Whether a run has saved something."""
    checkpoints = job.workdir / "checkpoints"
    return checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())


def process_at(job):
    return json.loads((job.workdir / ".lock").read_text())["pid"]


def is_alive(process):
    """One that is dead and waits to be noticed is not alive."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@contextlib.contextmanager
def meanwhile(function):
    """Calls a function in a thread while the block runs. Raises what it raised."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert not raised, raised


def found(jobs):
    """What must not depend on what happened to a sweep: of every run its parameters, evaluation and curves, as in its published result."""
    for job in jobs:
        result = read_result(job.workdir / "result.json")
        assert read_result(results_path(job.publish, result)) == result
        yield result.parameter_hash, result.evaluation, result.subset_hash, (job.workdir / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a sweep finds that nothing disturbs."""
    jobs = jobs_below(tmp_path_factory.mktemp("undisturbed"))
    assert run_sweep(jobs, workers=1) == []
    expected = list(found(jobs))
    assert len({hash for hash, *_ in expected}) == 2
    return expected


# --- failures -----------------------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_after_a_failed_run_and_skips_finished_ones(finished_run, tmp_path, capsys):
    """Slow: the runs are in processes of their own. Of the finished run the published result is missing when the sweep comes again."""
    jobs = jobs_below(tmp_path, method_config("ce", None), methods=("kd", "ce"), seeds=(0,))
    assert [job.config.method.name for job in jobs] == ["kd", "ce"]
    finished = jobs[1].workdir / "result.json"
    written = []
    for _ in range(2):
        failed = run_sweep(jobs, workers=1)
        assert [job for job, _ in failed] == [jobs[0]]
        assert failed[0][1].startswith("method 'kd' needs a teacher") and "\n" not in failed[0][1]
        assert f"{jobs[0].workdir}: failed, method 'kd' needs" in capsys.readouterr().err
        assert not jobs[0].workdir.exists()
        written.append((finished.stat().st_mtime_ns, finished.read_bytes()))
        result = read_result(finished)
        (published,) = (tmp_path / "results").rglob("*.json")
        assert published == results_path(tmp_path / "results", result) and read_result(published) == result
        published.unlink()
    assert written[0] == written[1], "the second sweep took the finished run as it was"
    assert result.parameter_hash == finished_run("ce")[1].parameter_hash, "another process, the same bits"


def test_a_run_is_published_as_long_as_its_config_and_teacher_are_those_of_its_result(teacher_run, finished_run, tmp_path):
    """Its directory, which a fresh clone lacks, is not needed."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_run[0], teacher)
    jobs = [job for name in ("ce", "kd") for job in jobs_below(tmp_path, method_config(name, teacher), methods=(name,), seeds=(0,))]
    assert unpublished(jobs) == jobs
    for job in jobs:
        publish(job, dataclasses.replace(finished_run(job.config.method.name)[1], config=job.config))
    assert unpublished(jobs) == []
    other = [dataclasses.replace(job, config=edit(job.config, {"train.steps": 7})) for job in jobs]
    assert unpublished(other) == other
    elsewhere = dataclasses.replace(jobs[1], config=edit(jobs[1].config, {"teacher": "net.onnx"}), publish=tmp_path / "elsewhere")
    publish(elsewhere, dataclasses.replace(read_result(jobs[1].target), config=elsewhere.config))
    assert unpublished([elsewhere]) == [elsewhere]
    diverged = dataclasses.replace(read_result(jobs[0].target), status="diverged", reason="loss", evaluation=None, parameter_hash=None)
    publish(jobs[0], diverged)
    assert unpublished(jobs) == [jobs[0]]
    jobs[0].target.write_bytes(jobs[1].target.read_bytes()[:-9])
    assert unpublished(jobs) == [jobs[0]]
    trained = read_result(teacher / "result.json")
    write_result(teacher / "result.json", dataclasses.replace(trained, parameter_hash="0" * len(trained.parameter_hash)))
    assert unpublished(jobs) == jobs
    (teacher / "result.json").unlink()
    assert unpublished(jobs) == jobs


@pytest.mark.parametrize("evaluate_on", ["test", "validation"])
def test_a_run_that_diverged_is_published_and_counts_as_failed(evaluate_on, tmp_path):
    edits = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e30, "optimizer__clip_norm": None, "data__evaluate_on": evaluate_on}
    (job,) = jobs_below(tmp_path, tiny(**edits), seeds=(0,), epsilons=(0.5,))
    where = {"test": "digits/plain/ce/n20/seed0.json", "validation": "tuning/digits/plain/ce-epsilon0.5/n20/seed0.json"}[evaluate_on]
    for _ in range(2):
        with pytest.raises(Diverged):
            execute(job)
        published = tmp_path / "results" / where
        assert read_result(published).status == "diverged"
        published.unlink()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_screen_that_cannot_be_written_does_not_end_a_sweep(terminal, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            self.write("")

    jobs = jobs_below(tmp_path, methods=("kd",))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Full())
        failed = run_sweep(jobs, workers=1)
    assert [job for job, _ in failed] == jobs


def in_a_terminal(command, lines, columns):
    """What a process writes to a terminal of that size, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # EIO: the process has ended.
            while part := os.read(ours, 65536):
                written += part
    os.close(ours)
    return written.decode(), process.returncode


def test_on_a_terminal_there_is_a_table_of_all_runs(tmp_path):
    """Of runs that fail at once, with more rows than there are lines."""
    options = "--methods kd ab wdkd fitnet --augmentations none matching --n-per-class 5 0 --seeds 0 1 --workers 2"
    places = ["--workdir", tmp_path / "runs", "--results", tmp_path / "results"]
    written, code = in_a_terminal([sys.executable, ROOT / "launch" / "sweep.py", *options.split(), *places], lines=14, columns=80)
    assert code == 2 and "Traceback" not in written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "")
    last = plain[plain.rindex("images per class") :].splitlines()
    end = next(number for number, line in enumerate(last) if line.startswith("0 of 32 runs are complete"))
    assert end < 14 and "3 more rows" in plain
    assert any("digits none" in line and line.split()[-4:] == ["X"] * 4 for line in last[:end])
    assert any(line.startswith("0 of 32 runs are done, 32 failed, after") for line in last[:end])
    assert any(line.startswith("digits/") and "failed, method" in line for line in last[:end])


# --- declared grids -----------------------------------------------------------------------------------------------------


def test_a_grid_file_is_run_table_by_table(tmp_path):
    """Small M first, though the second table would otherwise be begun with it; the command line holds for both tables."""
    path = tmp_path / "grid.toml"
    path.write_text(
        f"""
        [default]
        methods = ["ce"]
        "train.batch-size" = 10
        train.steps = 600
        model.width = 8
        workdir = "{tmp_path}/runs"
        results = "{tmp_path}/results"

        [[sweep]]
        n-per-class = [5, 10]
        model.width = 4

        [[sweep]]
        n-per-class = [5]
        seeds = [0]
        model.width = 4
        data.evaluate-on = "validation"
        vary = ["train.log-every=7", "cache.budget=512"]
        """
    )
    command = [sys.executable, ROOT / "launch" / "sweep.py", "--grid", path, "--train.steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"3 of 3 runs are complete; results are below {tmp_path}/results, {tmp_path}/results/tuning\n"
    names = ["ce/n5/seed0", "ce/n10/seed0", "ce-log_every7-budget512/n5/seed0"]
    ended = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert ended == [f"{tmp_path}/runs/digits/none/{name}" for name in names]
    targets = [f"digits/plain/{name}.json" for name in names[:2]] + [f"tuning/digits/plain/{names[2]}.json"]
    configs = [read_result(tmp_path / "results" / name).config for name in targets]
    assert [(c.model.width, c.train.log_every, c.cache.budget) for c in configs] == [(4, 20, 2048), (4, 20, 2048), (4, 7, 512)]
    assert {(c.train.steps, c.train.batch_size) for c in configs} == {(3, 10)}

    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results" / targets[1]).unlink()
    again = subprocess.run([*command, "--skip-published", "True"], capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    left_out = f"2 of 3 runs are left out, as their results are below {tmp_path}/results, {tmp_path}/results/tuning\n"
    assert again.stdout == left_out + done.stdout
    assert [str(path.parent) for path in (tmp_path / "runs").rglob("config.json")] == [f"{tmp_path}/runs/digits/none/{names[1]}"]


# --- disturbances -------------------------------------------------------------------------------------------------------


def test_a_killed_process_costs_its_run_alone_which_then_goes_on(undisturbed, tmp_path):
    jobs = jobs_below(tmp_path)

    def kill():
        wait_for(lambda: has_begun(jobs[0]))
        os.kill(process_at(jobs[0]), signal.SIGKILL)

    with meanwhile(kill):
        failed = run_sweep(jobs, workers=2)
    assert failed == [(jobs[0], "the process of this run was killed by signal 9 (out of memory?)")]
    assert read_result(jobs[1].workdir / "result.json") and not (jobs[0].workdir / "result.json").exists()
    assert run_sweep(jobs, workers=1) == []
    assert list(found(jobs)) == undisturbed


def start(directory):
    """The sweep of the undisturbed one, as a command."""
    edits = [f"--{name.replace('_', '-')}={value}" for name, value in EDITS.items()]
    grid = ["--methods", "ce", "--n-per-class", "20", "--seeds", "0", "1", "--workers", "1"]
    places = ["--workdir", directory / "runs", "--results", directory / "results"]
    command = [sys.executable, ROOT / "launch" / "sweep.py", *grid, *edits, *places]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_stopped_sweep_goes_on_where_it_was(number, undisturbed, tmp_path):
    """Killed at once, its workers still save, and the sweep that comes after it waits for them."""
    jobs = jobs_below(tmp_path)
    with start(tmp_path) as process:
        wait_for(lambda: any(map(has_begun, jobs)))
        children, began = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split(), time.monotonic()
        process.send_signal(number)
        if number == signal.SIGTERM:
            _, errors = process.communicate()
            assert process.returncode == 75 and time.monotonic() - began < 10
            last = errors.splitlines()[-1]
            assert last == "error: stopped by a signal; 0 of 2 runs are complete, the same command goes on with the rest"
            assert "Traceback" not in errors
        else:
            assert process.wait() == -signal.SIGKILL
    assert len(children) == 2 and not any((job.workdir / "result.json").exists() for job in jobs)
    assert run_sweep(jobs, workers=1) == []
    assert not any(map(is_alive, children))
    assert list(found(jobs)) == undisturbed


def test_two_sweeps_at_once_share_the_runs(undisturbed, tmp_path):
    with start(tmp_path) as one, start(tmp_path) as other:
        ends = [(process.communicate(), process.returncode) for process in (one, other)]
    for (printed, errors), code in ends:
        assert (code, "Traceback" in errors) == (0, False), errors
        assert printed.startswith("2 of 2 runs are complete")
    assert list(found(jobs_below(tmp_path))) == undisturbed


# --- runs in other hands ------------------------------------------------------------------------------------------------


def test_that_a_run_is_in_other_hands_is_known_before_its_data_are_read(tmp_path):
    """So that many equal sweeps do not read what they are not going to use. Here it cannot even be read."""
    (job,) = jobs_below(tmp_path, edit(LONG, {"data.name": "mnist", "data.data_dir": str(tmp_path)}), seeds=(0,))
    with pytest.raises(UsageError, match="is not prepared"):
        execute(job)
    assert not job.workdir.exists()
    with locked(job.workdir), pytest.raises(Busy):
        execute(job)
    with pytest.raises(UsageError, match="is not prepared"):
        execute(job)


def test_a_run_in_other_hands_is_taken_up_when_they_let_it_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "RETRY", 0.5)
    jobs = jobs_below(tmp_path, method_config("ce", None))
    held = contextlib.ExitStack()

    def let_go():
        wait_for((jobs[1].workdir / "result.json").exists)
        time.sleep(2)
        held.close()

    held.enter_context(locked(jobs[0].workdir))
    with meanwhile(let_go):
        assert run_sweep(jobs, workers=1) == []
    shown = [line for line in capsys.readouterr().err.splitlines() if str(jobs[0].workdir) in line]
    assert f": tried again at the end, {jobs[0].workdir} is being written by process {os.getpid()} on " in shown[0]
    assert len(shown) == 2, "not once for every try"
    assert len(list(found(jobs))) == 2


@dataclasses.dataclass
class Scripted:
    """A pool without processes. Of every job it has a list of outcomes, and keeps giving the last."""

    script: dict
    tries: list = dataclasses.field(default_factory=list)

    def run(self, jobs):
        self.tries.append(list(jobs))
        for position, job in reversed(list(enumerate(jobs))):
            outcomes = self.script[job]
            yield position, outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]


def test_runs_in_other_hands_are_tried_after_all_others_and_given_up_in_the_end(monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 1)
    monkeypatch.setattr(sweep, "RETRY", 0.2)
    busy, done, failed = Outcome("busy", "process 1"), Outcome("done", "90%", seconds=1), Outcome("failed", "why")
    pool = Scripted({"a": [busy], "b": [done], "c": [busy, busy, failed], "d": [busy, done]})
    began = time.monotonic()
    outcomes = list(sweep._outcomes(pool, list("abcd"), Interruption()))
    assert 2 < time.monotonic() - began < 10, "twice the longest run"
    assert pool.tries[:4] == [list("abcd"), list("acd"), list("ac"), ["a"]] and len(pool.tries) > 5
    assert dict(outcomes) == {0: busy, 1: done, 2: failed, 3: done}
