"""The short version of `make faults`: a few real runs that are killed, stopped and damaged; and that the harness notices what it should."""

import json
import random
import shutil
import signal

import faults
import hostile
import pytest
from harness import STEPS, Ground, Tries, error_lines, identical, in_a_save, in_training, saved_steps, went_on_from
from report import row

pytestmark = pytest.mark.timeout(900)
FITNET = 2
"""Number of a case that has two stages."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("ground"))


def nothing_bad(tries):
    assert (tries.lost, tries.different, tries.unclear, tries.evidence) == (0, 0, 0, []), tries


def test_a_run_that_is_killed_in_a_save_ends_bit_identical(ground):
    """In training: tests/test_resume.py."""
    tries = Tries("")
    faults.stopped(ground, tries, FITNET, [in_a_save], [signal.SIGKILL], -9)
    nothing_bad(tries)
    assert tries.tries >= 1, "it lived when it was killed"


def test_a_run_that_is_asked_to_stop_saves_and_says_so(ground):
    tries = Tries("")
    faults.stopped(ground, tries, FITNET, [in_training], [signal.SIGTERM, signal.SIGINT], 75)
    nothing_bad(tries)


def test_damaged_directories_end_in_a_line_or_as_ever(ground):
    tries = hostile.damaged_directories(ground, 6)
    nothing_bad(tries)
    assert tries.tries == 6


# --- the harness itself -------------------------------------------------------------------------------------------------


def test_any_difference_is_noticed(ground, tmp_path):
    undisturbed = ground.undisturbed(list(faults.CASES)[FITNET])
    changes = {
        "metrics.jsonl": lambda text: text.replace('"step": 7,', '"step": 7, "x": 1,'),
        "subset.json": lambda text: text.replace('"sha256": "', '"sha256": "0'),
        "result.json": lambda text: json.dumps(json.loads(text) | {"parameter_hash": "0"}),
        f"checkpoints/{STEPS}/digest/metadata": lambda text: text.replace('"state": "', '"state": "0'),
    }
    for name, change in changes.items():
        copy = shutil.copytree(undisturbed, tmp_path / name.replace("/", "-"))
        assert identical(copy, undisturbed)
        content = (copy / name).read_text()
        (copy / name).write_text(change(content))
        assert (copy / name).read_text() != content and not identical(copy, undisturbed), name
    slower = shutil.copytree(undisturbed, tmp_path / "slower")
    (slower / "result.json").write_text(json.dumps(json.loads((slower / "result.json").read_text()) | {"wall_seconds": 1e6}))
    assert identical(slower, undisturbed)


def test_a_run_keeps_what_it_says(ground):
    directory = ground.undisturbed(list(faults.CASES)[FITNET])
    assert saved_steps(directory / "checkpoints")[:2] == [STEPS, 117]


def test_what_is_said_is_understood():
    said = "note: x\nteacher cache: y\ngoes on from step 18 of 120\ndigits kd 1/2\n"
    assert went_on_from(said) == 18 and went_on_from("digits") == 0
    assert error_lines(said) == [] and error_lines(said + "error: a\nTraceback\n") == ["error: a", "Traceback"]
    assert faults.saved_at("error: stopped by a signal; step 27 of 120 is saved, and") == 27
    tries = Tries("f", tries=5, lost=1)
    tries.check_end((2, "error: a\n"), code=2)
    assert tries.unclear == 0
    for ended in ((1, "error: a\n"), (2, ""), (2, "error: a\nb\n")):
        tries.check_end(ended, code=2)
    assert tries.unclear == 3 and row(tries) == "| f | 5 | 4 of 5 | 5 of 5 | 2 of 5 |  |"


def test_a_file_is_harmed_in_every_way(ground, tmp_path):
    intact, _ = hostile.intact_run(ground)
    kinds = set()
    for number in range(250):
        copy = shutil.copytree(intact, tmp_path / str(number))
        kinds.add(hostile.harm(copy, random.Random(number)).split()[0])
    assert kinds == {
        "truncated",
        "flipped",
        "spliced",
        "crafted",
        "random",
        "pickle",
        "empty",
        "missing",
        "directory",
        "link",
        "pipe",
        "huge",
        "deep",
    }
