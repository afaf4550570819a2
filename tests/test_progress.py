"""Metrics are looked at one call late, and every step's; the rate counts finished calls."""

import math
import os
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from wdkd import progress
from wdkd.config import TrainConfig
from wdkd.errors import Diverged, UsageError
from wdkd.progress import Clock, Events, Lines, Log, Recorder, read_lines, track


class Kept:
    """A recorder that keeps what it is given."""

    def __init__(self):
        self.steps = []

    def log(self, step, metrics, *, examples_per_second):
        self.steps.append((step, metrics["objective"]))


class Fetched:
    """An array on a device, which knows when it was fetched."""

    def __init__(self, values):
        self.values, self.fetched = values, False

    def __array__(self, dtype=None, copy=None):
        self.fetched = True
        return np.asarray(self.values, np.float32)


def measured(*objectives):
    return {"objective": Fetched(objectives), "gradient_norm": Fetched([1.0] * len(objectives))}


def test_a_call_is_fetched_when_the_next_one_has_started():
    recorder = Kept()
    log = Log(recorder, TrainConfig(steps=6, log_every=1), 0)
    calls = [measured(0.0, 1.0), measured(2.0), measured(3.0, 4.0, 5.0)]
    for number, call in enumerate(calls):
        log.add(call)
        assert [call["objective"].fetched for call in calls] == [index < number for index in range(3)]
    log.flush()
    log.flush()
    assert recorder.steps == [(step, step - 1.0) for step in range(1, 7)]


def test_only_every_so_many_steps_are_recorded_and_the_last():
    recorder = Kept()
    log = Log(recorder, TrainConfig(steps=10, log_every=4), 2)
    log.add(measured(*range(3, 11)))
    log.flush()
    assert [step for step, _ in recorder.steps] == [4, 8, 10]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_its_own_step(bad):
    recorder = Kept()
    log = Log(recorder, TrainConfig(steps=100, log_every=1), 10)
    log.add(measured(1.0, 1.0, bad, 1.0))
    with pytest.raises(UsageError, match=f"objective is {bad} at step 13; lower optimizer.learning_rate or method.epsilon"):
        log.flush()
    assert [step for step, _ in recorder.steps] == [11, 12]


def test_the_rate_leaves_out_the_first_call(monkeypatch):
    now = iter([100.0, 104.0, 104.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    clock = Clock(batch_size=50)
    clock.tick(20)  # At 100 s, after compiling.
    clock.tick(20)
    assert clock.rate == 20 * 50 / 4
    clock.tick(5)
    assert clock.rate == 25 * 50 / 4
    assert clock.rate == 25 * 50 / 10


def test_tracking_gives_every_step_and_is_silent_where_asked(capsys):
    assert list(track(iter("abc"), title="letters", total=3, show=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    assert list(track(range(2), title="numbers", total=2, show=True)) == [0, 1]
    assert "numbers" in capsys.readouterr().err


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b'{"step": 6, "obj',
        b"\xff\xfe\n",
        b'{"step": true}\n[1]\n{}\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 2}\n',
        b'{"step": 9}\n' * 3,
        b"\n\n",
    ],
)
def test_a_file_of_lines_goes_on_after_a_step_whatever_is_in_it(rest, tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b"".join(b'{"step": %d, "objective": 0.1}\n' % step for step in (1, 2, 3, 4))
    path.write_bytes(kept + b'{"step": 5}\n' + rest)
    lines = Lines(path, 4)
    assert path.read_bytes() == kept, "to the byte"
    lines.write(5, {"objective": 1.5})
    lines.secure()
    lines.close()
    assert path.read_bytes() == kept + b'{"step": 5, "objective": 1.5}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_was_deleted_or_replaced_is_noticed(tmp_path):
    """Its handle can still be written to, and all of that would be lost."""
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, 0)
    path.unlink()
    lines.write(1, {})
    with pytest.raises(UsageError, match=f"cannot write {path}: No such file"):
        lines.secure()
    path.write_text("")
    with pytest.raises(UsageError, match=f"{path} was replaced while this run was writing it"):
        lines.secure()
    lines.close()


def test_tensorboard_reads_the_events_and_forgets_those_of_a_killed_call(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        events = Events(tmp_path / "events", start)
        for step in steps:
            events.write(step, {"loss": step + start / 10})
        events.close()
    seen = []
    for path in sorted((tmp_path / "events").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:  # A record: length, its checksum, the event, its checksum.
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                seen.append(("start", event.step))
            seen += [(value.tag, event.step, round(value.simple_value, 3)) for value in event.summary.value]
    assert seen == [
        ("start", 1), ("loss", 1, 1.0), ("loss", 2, 2.0), ("loss", 3, 3.0), ("start", 3), ("loss", 3, 3.2), ("loss", 4, 4.2)
    ]  # fmt: skip


@pytest.mark.parametrize("earlier", ["", "import torch;"])
def test_events_import_no_torch_and_leave_it_to_others(earlier, tmp_path):
    (tmp_path / "torch.py").write_text("Tensor = float")
    code = f"""import sys; {earlier} from pathlib import Path; from wdkd.progress import Events
Events(Path({str(tmp_path)!r}) / "events", 0).write(1, {{"loss": 1.0}})
print("torch" in sys.modules); import torch; print(torch.__file__)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(bool(earlier)), str(tmp_path / "torch.py")], done.stderr


@pytest.mark.parametrize("file", ["metrics.jsonl", "events"])
def test_a_file_that_cannot_be_written_is_named(file, tmp_path):
    (tmp_path / file).mkdir() if file == "metrics.jsonl" else (tmp_path / file).write_text("")
    with pytest.raises(UsageError, match=rf"cannot write .*{file}|{file} cannot be read: Is a directory"), ExitStack() as stack:
        recorder = stack.enter_context(Recorder(tmp_path, title="", start=0, steps=9, show=False))
        recorder.log(1, {"objective": 1.0}, examples_per_second=1.0)


def test_the_mean_objective_between_two_saves_leaves_skipped_steps_out():
    recorder = Kept()
    recorder.secure = lambda: None
    log = Log(recorder, TrainConfig(steps=9, log_every=1), 0, max_skipped=2)
    log.add(measured(1.0, 3.0))
    assert log.secure() == 2.0
    assert log.secure() is None
    log.add(measured(5.0, math.nan) | {"skipped": Fetched([0, 1])})
    assert log.secure() == 5.0
    log.add(measured(1.0) | {"finite_parameters": Fetched([0])})
    with pytest.raises(Diverged, match="a parameter is not finite at step 5") as caught:
        log.flush()
    assert caught.value.step == 5


def test_the_wish_that_was_agreed_on_is_the_largest_of_the_call():
    log = Log(Kept(), TrainConfig(steps=9), 0)
    log.add(measured(1.0, 1.0, 1.0) | {"wish": Fetched([0, 2, 1])})
    assert log.wish == 0, "it has not been looked at"
    log.add(measured(1.0) | {"wish": Fetched([0])})
    assert log.wish == 2
    log.flush()
    assert log.wish == 0


def test_reading_many_lines_takes_as_long_for_each_as_reading_few(tmp_path):
    """40,000 lines took 13 s while every line was compared with all before it; now a tenth of a second."""
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(b'{"step": %d}\n' % step for step in range(1, 40_001)))
    began = time.process_time()
    assert len(read_lines(tmp_path / "metrics.jsonl", 40_000)) == 40_000
    assert time.process_time() - began < 4
