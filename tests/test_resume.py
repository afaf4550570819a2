"""A run that was stopped, wherever it was, ends with the same bits as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import edit, files, method_config

from wdkd import train
from wdkd.errors import UsageError
from wdkd.result import read_result

pytestmark = pytest.mark.timeout(900)


class Stopped(Exception):
    """Raised in the middle of a run."""


def stopping_at(step, stop):
    """A Recorder that calls `stop` instead of recording a step."""

    class Stopping(train.Recorder):
        def log(self, at, *args, **kwargs):
            if at == step:
                stop()
            super().log(at, *args, **kwargs)

    return Stopping


def stop():
    raise Stopped


def same_bits(directory, finished):
    """Whether two runs wrote the same metrics, and ended in the same training state and the same result."""
    for name in ("metrics.jsonl", "subset.json", "checkpoints/6/digest/metadata"):
        assert (directory / name).read_bytes() == (finished / name).read_bytes(), name
    ours, theirs = (json.loads((path / "result.json").read_text()) for path in (directory, finished))
    measured = {"wall_seconds", "examples_per_second", "revision"}  # Of the code, which may be committed between two calls.
    assert {name for name in ours if ours[name] != theirs[name]} <= measured
    assert len(ours["parameter_hash"]) == 64


@pytest.mark.parametrize(("method", "stops"), [("fitnet", (1, 3, 5)), ("ab", (3, 5))])
def test_a_run_stopped_in_either_stage_goes_on_bit_for_bit(method, stops, finished_run, teacher_run, tmp_path, monkeypatch):
    """Stages change after step 3 and checkpoints are at 2 and 4: it goes on from 0, in the first stage, and in the second."""
    finished, _ = finished_run(method)
    config, directory = method_config(method, teacher_run[0]), tmp_path / "run"
    for step in stops:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(train, "Recorder", stopping_at(step, stop))
            train.run(config, directory, show_progress=False)
        assert len((directory / "metrics.jsonl").read_text().splitlines()) == step - 1
        assert not (directory / "result.json").exists()
        saved = [path for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
        assert len(saved) == (step - 1) // 2
    train.run(config, directory, show_progress=False)
    same_bits(directory, finished)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from conftest import method_config
from test_resume import stopping_at
from wdkd import train
train.Recorder = stopping_at(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
train.run(method_config("kd", sys.argv[2]), sys.argv[3], show_progress=False)
"""


def test_a_killed_run_goes_on_bit_for_bit(finished_run, teacher_run, tmp_path):
    """With mixup and cutmix and an average of the parameters. The checkpoint of step 4 may or may not have been complete."""
    finished, _ = finished_run("kd")
    directory = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(teacher_run[0]), str(directory)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 4
    with (directory / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "objec')
    train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)
    same_bits(directory, finished)


def test_a_finished_run_is_returned_without_training(finished_run, teacher_run, monkeypatch):
    directory, result = finished_run("kd")
    monkeypatch.setattr(train.Trainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    before, began = files(directory), time.monotonic()
    again = train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)
    assert again == result == read_result(directory / "result.json")
    assert files(directory) == before
    assert time.monotonic() - began < 60, "seconds where the machine is idle; compiling alone would take longer"


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"optimizer.learning_rate": 0.5, "train.steps": 8},
        {"teacher": "elsewhere"},
        {"data.n_per_class": None, "method.temperature": 2.0},
    ],
    ids="+".join,
)
def test_another_config_is_refused_by_name_and_changes_nothing(changed, finished_run, teacher_run, tmp_path):
    directory, _ = finished_run("kd")
    if "teacher" in changed:
        changed = {"teacher": str(tmp_path / "elsewhere")}
        os.symlink(teacher_run[0], tmp_path / "elsewhere")
    config = method_config("kd", teacher_run[0])
    before = files(directory)
    with pytest.raises(UsageError) as caught:
        train.run(edit(config, changed), directory, show_progress=False)
    text = str(caught.value)
    stored = {name: edit_value(config, name) for name in changed}
    assert f"{directory} holds another run (" in text and "give another --workdir" in text and "\n" not in text
    assert all(f"{name}: {stored[name]}, {value}" in text for name, value in changed.items())
    assert text.count(": ") == len(changed), "nothing else is named"
    assert files(directory) == before


def edit_value(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_a_damaged_checkpoint_stops_a_run_in_one_line(finished_run, teacher_run, tmp_path):
    finished, _ = finished_run("kd")
    directory = tmp_path / "run"
    for name, content in files(finished).items():
        if name != "result.json":
            target = directory / name
            target.mkdir(parents=True, exist_ok=True) if content is None else target.write_bytes(content)
    data = max((directory / "checkpoints" / "6" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    before = files(directory / "checkpoints")
    with pytest.raises(UsageError, match=r"checkpoints/6 does not hold the state of this run .*; delete that step to go on from an older"):
        train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)
    assert files(directory / "checkpoints") == before
