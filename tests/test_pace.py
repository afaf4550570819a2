"""Checkpoints come by steps and by the clock, and a signal stops; several processes do what they agreed on."""

import pytest
from conftest import edit

from wdkd import pace
from wdkd.config import TrainConfig
from wdkd.interruption import Interruption
from wdkd.pace import GO_ON, SAVE, STOP, Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def make(several=False, leads=True, **edits):
    config = edit(TrainConfig(steps=100, checkpoint_every=10, checkpoint_seconds=30.0), edits)
    interruption = Interruption()
    return Pace(config, interruption, leads=leads, several=several), interruption


def test_steps_are_saved_as_planned_and_at_the_end(clock):
    one, _ = make(steps=25)
    assert [step for step in range(1, 26) if one.due(step, GO_ON) == SAVE] == [10, 20, 25]


def test_the_clock_asks_for_one_whatever_the_steps(clock):
    one, _ = make(checkpoint_every=1000)
    seen = []
    for step in range(1, 13):
        clock[0] += 7
        if due := one.due(step, GO_ON):
            seen.append((step, due))
            one.saved()
    assert seen == [(5, SAVE), (10, SAVE)]
    never, _ = make(checkpoint_every=1000, checkpoint_seconds=None)
    clock[0] += 1e6
    assert never.due(5, GO_ON) == GO_ON


def test_a_signal_stops_also_where_a_save_is_due(clock):
    one, interruption = make()
    interruption.requested = True
    assert not interruption._acknowledged.is_set()
    assert [one.due(step, GO_ON) for step in (3, 10)] == [STOP, STOP]
    assert interruption._acknowledged.is_set(), "saving may take its time"


def test_several_processes_do_what_was_agreed_and_not_what_one_wants(clock):
    one, interruption = make(several=True)
    interruption.requested = True
    clock[0] += 1000
    assert one.wish() == STOP
    assert [one.due(3, agreed) for agreed in (GO_ON, SAVE, STOP)] == [GO_ON, SAVE, STOP]
    assert one.due(10, GO_ON) == SAVE, "what is planned is planned for all"


def test_only_the_main_process_has_a_clock(clock):
    others = make(several=True, leads=False)[0], make(several=True, leads=True)[0]
    clock[0] += 31
    assert [one.wish() for one in others] == [GO_ON, SAVE]
