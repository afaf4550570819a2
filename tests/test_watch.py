"""A run is seen to wait, run and end by what any process can see of it, and the time left is what finished runs and paces say."""

import dataclasses
import os
import shutil
import time

import pytest
from conftest import tiny

from wdkd.grid import Grid, expand
from wdkd.lock import locked
from wdkd.pool import Outcome
from wdkd.progress import Recorder
from wdkd.result import write_result
from wdkd.watch import TAIL, Watched, last_step, seconds_left


def jobs_below(directory, **grid):
    return expand(
        Grid(**{"methods": ("ce",), "n_per_class": (20,), "seeds": (0,)} | grid), tiny(), directory / "runs", directory / "results"
    )


def train_to(job, step):
    """Writes the metrics that a run of 6 steps writes on its way."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    with Recorder(job.workdir, title="", start=0, steps=6, show=False) as recorder:
        for number in range(1, step + 1):
            recorder.log(number, {"loss": 1.0}, examples_per_second=1.0)


def seen(run):
    run.look()
    return run.state, round(run.fraction, 2)


@pytest.fixture
def finish(finished_run):
    """A function that puts a finished run into a job's directory, as if it had taken so many seconds."""
    directory, result = finished_run("ce")

    def finish(run, seconds):
        shutil.copytree(directory, run.job.workdir, dirs_exist_ok=True)
        write_result(run.job.workdir / "result.json", dataclasses.replace(result, wall_seconds=seconds))
        run.take(Outcome("done", "90%"))

    return finish


# --- states -------------------------------------------------------------------------------------------------------------


def test_a_run_waits_runs_and_is_done(tmp_path, finish):
    (job,) = jobs_below(tmp_path)
    run = Watched(job)
    assert seen(run) == ("waiting", 0)
    with locked(job.workdir):
        assert seen(run) == ("running", 0)
        train_to(job, 3)
        assert seen(run) == ("running", 0.5)
    assert seen(run) == ("waiting", 0.5), "stopped by someone else"
    finish(run, 12.0)
    assert seen(run) == ("done", 1) and run.seconds == 12


def test_the_lock_of_a_process_that_was_killed_is_no_run(tmp_path):
    (job,) = jobs_below(tmp_path)
    train_to(job, 2)
    (job.workdir / ".lock").write_text('{"pid": 1}')
    run = Watched(job)
    assert seen(run) == ("waiting", 0.33), "it will go on from there"
    with locked(job.workdir):
        assert seen(run)[0] == "running"
        run.take(Outcome("lost", "its node has died"))
        assert seen(run)[0] == "waiting", "a dead node's lock stays as it is"
    with locked(job.workdir):
        assert seen(run)[0] == "running"


def test_a_run_in_other_hands_is_elsewhere_until_it_is_taken_up_here(tmp_path):
    (job,) = jobs_below(tmp_path)
    run = Watched(job)
    with locked(job.workdir):
        run.take(Outcome("busy", "process 1"))
        train_to(job, 1)
        assert seen(run) == ("elsewhere", 0.17)
    assert seen(run)[0] == "waiting"
    with locked(job.workdir):
        assert seen(run)[0] == "running"


@pytest.mark.parametrize("kind", ["failed", "stopped"])
def test_what_has_ended_stays_so_whatever_its_files_say(kind, tmp_path):
    (job,) = jobs_below(tmp_path)
    run = Watched(job)
    train_to(job, 2)
    run.look()
    run.take(Outcome(kind, "why"))
    with locked(job.workdir):
        assert seen(run)[0] == kind


# --- metrics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (b"", 0),
        (b'{"step": 3, "loss": 1.0}\n', 3),
        (b'{"step": 3}\n{"step": 4, "lo', 3),
        (b'{"step": 3}\n[4]\n{"step": "5"}\n{"step": -6}\n{"stop": 7}\n', 3),
        (b'{"step": 3}\n' + b"\0" * 100, 3),
        (b"9" * 10**5 + b"\n", 0),
        (b'{"step": 3}\n' + b"x" * TAIL, 0),
        (b'{"step": 1' + b"0" * 4000 + b"}\n", 10**4000),
    ],
)
def test_the_last_step_is_that_of_the_last_whole_line(content, step, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert last_step(tmp_path / "metrics.jsonl") == step


def test_a_step_beyond_the_last_is_the_last(tmp_path):
    (job,) = jobs_below(tmp_path)
    job.workdir.mkdir(parents=True)
    (job.workdir / "metrics.jsonl").write_text('{"step": 1' + "0" * 4000 + "}\n")
    assert Watched(job).fraction == 1


def test_no_more_than_the_end_of_a_file_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(2**36)
        file.seek(2**36)
        file.write(b'\n{"step": 7}\n')
    began = time.monotonic()
    assert last_step(path) == 7 and time.monotonic() - began < 1


def test_what_is_no_file_has_no_step(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert [last_step(tmp_path / name) for name in ("pipe", "missing", ".")] == [0, 0, 0]


# --- the time left ------------------------------------------------------------------------------------------------------


def test_nothing_is_said_of_the_time_as_long_as_nothing_tells(tmp_path):
    runs = [Watched(job) for job in jobs_below(tmp_path, seeds=(0, 1))]
    assert seconds_left(runs) is None
    with locked(runs[0].job.workdir):
        runs[0].look()
        assert seconds_left(runs) is None


def test_a_run_takes_what_finished_ones_of_its_method_took(tmp_path, finish):
    runs = [Watched(job) for job in jobs_below(tmp_path, methods=("ce", "kd"), seeds=(0, 1, 2, 3))]
    ce, kd = ([run for run in runs if run.kind == ("digits", method)] for method in ("ce", "kd"))
    finish(ce[0], 100.0)
    finish(ce[1], 300.0)
    for run in kd[1:]:
        run.take(Outcome("failed", "why"))
    assert seconds_left(runs) == 3 * 200, "kd like all that are known, one at a time"
    finish(kd[0], 1000.0)
    assert seconds_left(runs) == 2 * 200
    with locked(ce[2].job.workdir), locked(ce[3].job.workdir):
        train_to(ce[2].job, 3)
        for run in ce:
            run.look()
        assert seconds_left(runs) == 200, "150 for each of two, but one of them alone takes 200"


def test_a_run_takes_what_one_at_work_is_going_to_take(tmp_path):
    runs = [Watched(job) for job in jobs_below(tmp_path, seeds=(0, 1, 2))]
    with locked(runs[0].job.workdir):
        runs[0].look()
        began = time.monotonic()
        time.sleep(0.5)
        train_to(runs[0].job, 3)
        runs[0].look()
        least = seconds_left(runs)
        assert 2.5 <= least <= (time.monotonic() - began) * 5, "half of it took half a second; two and a half are left"
