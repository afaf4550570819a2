"""A run that was stopped, wherever it was, ends with the same bits as one that was not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import edit, files, method_config

from wdkd import checkpoint, train, trainer
from wdkd.errors import Busy, UsageError
from wdkd.lock import locked
from wdkd.result import read_result
from wdkd.run_directory import read_run, read_teacher

pytestmark = pytest.mark.timeout(900)


class Stopped(Exception):
    """Raised in the middle of a run."""


def stopping_at(step, stop):
    """A Recorder that calls `stop` instead of recording a step."""

    class Stopping(trainer.Recorder):
        def log(self, at, *args, **kwargs):
            if at == step:
                stop()
            super().log(at, *args, **kwargs)

    return Stopping


def stop():
    raise Stopped


def same_bits(directory, finished):
    """Whether two runs wrote the same metrics, and ended in the same training state and the same result."""
    for name in ("metrics.jsonl", "subset.json"):
        assert (directory / name).read_bytes() == (finished / name).read_bytes(), name
    ours, theirs = (json.loads((path / "checkpoints/6/digest/metadata").read_text()) for path in (directory, finished))
    assert {name: ours[name] for name in ("network", "state")} == {name: theirs[name] for name in ("network", "state")}
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
            patch.setattr(trainer, "Recorder", stopping_at(step, stop))
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
from wdkd import train, trainer
trainer.Recorder = stopping_at(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
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
    monkeypatch.setattr(trainer.Trainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
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


def copy_of(finished, directory, *left_out):
    """A copy of a finished run's directory."""
    return Path(shutil.copytree(finished, directory, ignore=shutil.ignore_patterns(*left_out)))


def damage(item):
    """Flips a bit in the largest array of a checkpoint's item, and stores it again in its place.

    In its files what a bit is part of depends on how orbax's threads divided them: some flips orbax itself refuses.
    """
    tree = jax.tree.map(np.array, checkpoint.verified(item.parent, item.name, 2**30)[0])
    max(jax.tree.leaves(tree), key=lambda leaf: leaf.nbytes).view(np.uint8).flat[0] ^= 1
    shutil.rmtree(item)
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(1, network=tree, state=tree, facts={})  # A network is stored as it is, a state by its leaves' names.
        shutil.copytree(Path(folder) / "1" / "network", item)


@pytest.mark.parametrize("damaged", [(6,), (6, 4)])
def test_a_run_goes_on_from_the_newest_checkpoint_that_verifies(damaged, finished_run, teacher_run, tmp_path, capsys):
    """Or from the start, and ends with the same bits; what was damaged is named and kept."""
    finished, _ = finished_run("kd")
    directory = copy_of(finished, tmp_path / "run", "result.json")
    for step in damaged:
        damage(directory / "checkpoints" / str(step) / "state")
    train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)
    same_bits(directory, finished)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(damaged) + (damaged == (6, 4))
    assert all(
        f"checkpoints/{step} is passed over: the bytes of its state are not" in line for step, line in zip(damaged, said, strict=False)
    )
    assert sorted(path.name for path in (directory / "damaged").iterdir()) == sorted(map(str, damaged))


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_a_damaged_result_is_made_again(content, finished_run, teacher_run, tmp_path, capsys):
    finished, _ = finished_run("kd")
    directory = copy_of(finished, tmp_path / "run")
    (directory / "result.json").write_text(content)
    train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)
    same_bits(directory, finished)
    assert "result.json" in (said := capsys.readouterr().err) and "it is made again" in said and said.count("\n") == 1


def test_a_run_goes_on_with_the_teacher_and_the_images_that_it_began_with(finished_run, teacher_run, tmp_path):
    directory = copy_of(finished_run("kd")[0], tmp_path / "run", "result.json")
    config = method_config("kd", teacher_run[0])
    stored = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stored | {"teacher_hash": "0" * 64}))
    with pytest.raises(UsageError, match="began with another teacher than is now at .*; restore it or give another --workdir"):
        train.run(config, directory, show_progress=False)
    (directory / "config.json").write_text(json.dumps(stored))
    subset = json.loads((directory / "subset.json").read_text())
    (directory / "subset.json").write_text(json.dumps(subset | {"images": "0" * 64}))
    with pytest.raises(UsageError, match="subset.json is of other images than the data set now has .images differ.; restore"):
        train.run(config, directory, show_progress=False)
    for content in ("", "[]", '{"a": 1}'):
        (directory / "subset.json").write_text(content)
        with pytest.raises(UsageError, match="subset.json"):
            train.run(config, directory, show_progress=False)
    (directory / "subset.json").unlink()
    train.run(config, directory, show_progress=False)
    same_bits(directory, finished_run("kd")[0])


def test_a_teacher_of_other_parameters_than_its_result_is_refused(teacher_run, tmp_path, capsys):
    """A finished teacher whose last checkpoint is damaged must not teach from an earlier one."""
    teacher = copy_of(teacher_run[0], tmp_path / "teacher")
    damage(teacher / "checkpoints" / "24" / "network")
    with pytest.raises(UsageError, match="teacher: .*/result.json is of other parameters than the checkpoint of step 22, the newest that"):
        read_teacher(teacher)
    assert capsys.readouterr().err == "", "one line"
    (teacher / "result.json").unlink()
    assert read_teacher(teacher).accuracy is None, "an unfinished run teaches with its newest checkpoint"
    assert "checkpoints/24 is passed over" in capsys.readouterr().err


def test_links_below_a_run_are_refused(finished_run, teacher_run, tmp_path):
    directory = copy_of(finished_run("kd")[0], tmp_path / "run", "result.json")
    (directory / "checkpoints").rename(tmp_path / "elsewhere")
    (directory / "checkpoints").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="checkpoints is a link; put what it points to in its place"):
        train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)
    assert files(tmp_path / "elsewhere") == before


def test_a_link_in_the_place_of_a_step_is_refused(finished_run, teacher_run, tmp_path):
    """Orbax takes it for a step that is there already, so that nothing would be saved at that step."""
    directory = copy_of(finished_run("kd")[0], tmp_path / "run", "result.json")
    (directory / "checkpoints" / "6").rename(tmp_path / "elsewhere")
    (directory / "checkpoints" / "6").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="checkpoints/6 is a link; put what it points to in its place"):
        train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)


def test_what_a_run_killed_at_its_start_left_does_not_stop_it(finished_run, teacher_run, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in (".lock", "subset.json", ".config.json.abcdefgh", ".subset.json.x1y2z3_4"):
        (directory / name).write_text("half")
    train.run(method_config("ce", None), directory, show_progress=False)
    same_bits(directory, finished_run("ce")[0])
    assert not [path for path in directory.iterdir() if path.name.startswith((".config", ".subset"))]


def test_a_second_writer_is_told_who_the_first_is(finished_run, teacher_run, tmp_path):
    directory = copy_of(finished_run("kd")[0], tmp_path / "run", "result.json")
    before = files(directory)
    with locked(directory), pytest.raises(Busy, match=rf"{directory} is being written by process {os.getpid()} on .* since 20.*; wait"):
        train.run(method_config("kd", teacher_run[0]), directory, show_progress=False)
    assert files(directory) == before | {".lock": b""}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("image_shape", [8, 8], "height, width and channels"),
        ("image_shape", [10**9, 8, 1], "at most 4096 pixels wide and high"),
        ("image_shape", [8, 8, 7], "1 or 3 channels"),
        ("class_names", [], "number of classes is 0"),
        ("class_names", ["x"] * 3000, "number of classes is 3000; it must be between 1 and 2000"),
        ("mean", [0.5, 0.5], "mean is [0.5, 0.5]; it must be one number for each channel"),
        ("std", [0.0], "std is [0.0]; it must be between 1e-09 and 1"),
    ],
)
def test_an_absurd_input_of_a_network_is_refused(name, value, words, finished_run, tmp_path):
    stored = json.loads((finished_run("ce")[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"input": stored["input"] | {name: value}}))
    with pytest.raises(UsageError, match=re.escape(words)):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_run(tmp_path).input.image_shape == [8, 8, 1]
