"""The table shows every run's state and fits the terminal; without a terminal there is a line as a run ends, and the counts."""

import contextlib
import io
import re
import time

import pytest
from rich.console import Console
from test_watch import jobs_below, train_to

from wdkd import board
from wdkd.board import Board, duration
from wdkd.lock import locked
from wdkd.pool import Outcome

MANY = {
    "methods": ("ce", "kd", "fitnet", "ab", "wdkd", "sobolev"),
    "n_per_class": (5, 10, 20, 0),
    "seeds": (0, 1, 2),
    "augmentations": ("none", "flip_crop", "matching"),
}


def terminal(height, width=100, encoding="utf-8"):
    """A console that draws as for a terminal of that size, into memory."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(file=file, force_terminal=True, width=width, height=height, color_system=None, legacy_windows=False)


def lines_of(shown):
    """The lines of a board's table."""
    with shown._console.capture() as drawn:
        shown._console.print(shown.table())
    return drawn.get().splitlines()


def look(shown):
    for run in shown._runs:
        run.look()


@pytest.mark.parametrize("height", [8, 10, 24, 30, 200])
@pytest.mark.parametrize("failures", [0, 9])
def test_a_grid_of_216_runs_fits_the_terminal(height, failures, tmp_path):
    jobs = jobs_below(tmp_path, **MANY)
    shown = Board(jobs, terminal(height, width=60))
    for index in range(failures):
        shown.take(index, Outcome("failed", "no teacher " * 50))
    lines = lines_of(shown)
    assert len(jobs) == 216 and len(lines) < max(height, 9) and all(len(line) <= 60 for line in lines)
    assert sum("no teacher" in line for line in lines) == min(failures, 3)


def test_rows_that_something_is_going_on_in_are_those_that_are_shown(tmp_path):
    jobs = jobs_below(tmp_path, **MANY)
    shown = Board(jobs, terminal(16))
    at_work = [
        next(j for j in jobs if (j.config.method.name, j.config.augment.name) == pair) for pair in (("ab", "matching"), ("kd", "none"))
    ]
    for index, job in enumerate(jobs):
        if job.config.method.name == "ce":
            shown.take(index, Outcome("done", "90%"))
    with contextlib.ExitStack() as stack:
        for job in at_work:
            stack.enter_context(locked(job.workdir))
            train_to(job, 3)
        look(shown)
        head, _, *rows = lines_of(shown)
    assert head.split() == ["images", "per", "class", "5", "10", "20", "all"]
    assert any(row.startswith("digits none kd") and "50% . ." in row for row in rows)
    assert any(row.startswith("digits matching ab") and "50% . ." in row for row in rows)
    assert not any("ce" in row.split() for row in rows), "what is done gives way"
    rest = next(row for row in rows if "more rows" in row)
    hidden = int(rest.split()[0])
    assert hidden + sum(row.startswith("digits") for row in rows) == 18
    assert sum(map(int, re.findall(r"(\d+)(?:ok|\.)", rest))) == hidden * 12, "of every row that is not shown, 12 runs"
    assert any(row.startswith("36 of 216 runs are done, 2 running, 178 waiting, after ") for row in rows)


def test_every_state_has_its_mark(tmp_path):
    jobs = jobs_below(tmp_path, seeds=(0, 1, 2, 3, 4))
    shown = Board(jobs, terminal(24))
    with locked(jobs[0].workdir), locked(jobs[1].workdir):
        train_to(jobs[0], 2)
        train_to(jobs[1], 3)
        for index, kind in ((1, "busy"), (2, "failed"), (3, "stopped")):
            shown.take(index, Outcome(kind, "why"))
        look(shown)
        lines = lines_of(shown)
    assert lines[2].split() == ["digits", "none", "ce", "33%", "=50%", "X", "-", "."]
    assert lines[3].startswith("0 of 5 runs are done, 1 running, 1 in other hands, 1 failed, 1 stopped, 1 waiting, after ")
    assert lines[5] == "digits/none/ce/n20/seed2: failed, why"


def test_many_seeds_are_counted(tmp_path):
    jobs = jobs_below(tmp_path, seeds=tuple(range(12)))
    shown = Board(jobs, terminal(24))
    for index in range(7):
        shown.take(index, Outcome("done", "90%"))
    assert lines_of(shown)[2].split() == ["digits", "none", "ce", "7ok", "5."]


def test_a_terminal_without_unicode_is_enough(tmp_path):
    shown = Board(jobs_below(tmp_path, methods=("ce", "kd")), terminal(24, encoding="ascii"))
    with shown:
        shown.take(0, Outcome("failed", "why"))
    drawn = shown._console.file.buffer.getvalue().decode("ascii")
    assert "digits none kd" in drawn and "failed, why" in drawn


def test_rows_of_several_directories_are_apart(tmp_path):
    jobs = jobs_below(tmp_path / "a") + jobs_below(tmp_path / "b")
    lines = lines_of(Board(jobs, terminal(24, width=200)))
    assert [f"{tmp_path / name / 'runs'} digits none ce" in line for name, line in zip("ab", lines[2:4], strict=True)] == [True, True]


def test_without_a_terminal_the_counts_come_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(board, "REPORT", 0.3)
    monkeypatch.setattr(board, "IDLE", 0)
    jobs = jobs_below(tmp_path, seeds=(0, 1))
    with Board(jobs) as shown:
        shown.take(0, Outcome("failed", "loss is [nan] in [/usr]"))
        time.sleep(1)
    first, *counts = capsys.readouterr().err.splitlines()
    assert first == f"{jobs[0].workdir}: failed, loss is [nan] in [/usr]", "rich takes [/usr] for the end of something"
    assert 1 <= len(counts) <= 3
    assert all(re.fullmatch(r"0 of 2 runs are done, 1 failed, 1 waiting, after \d s", line) for line in counts)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (3540, "59 min"), (3600, "1 h 0 min"), (12000, "3 h 20 min"), (190_000, "2 d 4 h")],
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words
