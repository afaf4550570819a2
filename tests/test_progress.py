"""Metrics are looked at one call late, and every step's; the rate counts finished calls."""

import math

import numpy as np
import pytest

from wdkd import progress
from wdkd.config import TrainConfig
from wdkd.errors import UsageError
from wdkd.progress import Clock, Log, track


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
