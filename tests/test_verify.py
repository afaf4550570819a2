"""Every file of a run, changed in any way, is named; an intact run is found intact, and nothing is written."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import files

from wdkd import parallel
from wdkd.errors import UsageError
from wdkd.verify import verify

EVALUATE = Path(__file__).parents[1] / "launch" / "evaluate.py"


def damaged_parts(directory):
    return {finding.part for finding in verify(directory) if finding.problem is not None}


@pytest.fixture
def copied(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run("kd")[0], tmp_path / "run"))


def change(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def flip(folder):
    """One bit in the middle of the largest file."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a network": (lambda d: flip(d / "checkpoints/4/network"), {"checkpoints/4"}),
    "the last network": (lambda d: flip(d / "checkpoints/6/network"), {"checkpoints/6", "result.json"}),
    "a state": (lambda d: flip(d / "checkpoints/6/state"), {"checkpoints/6"}),
    "a digest": (lambda d: (d / "checkpoints/4/digest/metadata").write_text("{}"), {"checkpoints/4"}),
    "no state": (lambda d: (shutil.rmtree(d / "checkpoints/4/state"), (d / "result.json").unlink()), {"checkpoints/4"}),
    "an index": (lambda d: change(d / "subset.json", b", 3", b", 4"), {"subset.json"}),
    "no subset": (lambda d: (d / "subset.json").write_text("[]"), {"subset.json"}),
    "a metric line": (lambda d: change(d / "metrics.jsonl", b'{"step": 3', b'{"step": x'), {"metrics.jsonl"}),
    "no metrics": (lambda d: (d / "metrics.jsonl").write_text(""), {"metrics.jsonl"}),
    "another result": (lambda d: change(d / "result.json", b'"seed": 0', b'"seed": 1'), {"result.json"}),
    "no result": (lambda d: (d / "result.json").write_text("{}"), {"result.json"}),
    "an option": (lambda d: change(d / "config.json", b'"seed": 0', b'"seed": 1'), {"result.json"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_and_nothing_else(damage, copied):
    harm, parts = DAMAGE[damage]
    harm(copied)
    before = files(copied)
    assert damaged_parts(copied) == parts
    assert files(copied) == before


def test_an_intact_run_is_intact_and_a_pruned_one_too(copied):
    assert damaged_parts(copied) == set()
    assert {f.part for f in verify(copied)} == {
        "config.json",
        "subset.json",
        "metrics.jsonl",
        "checkpoints/4",
        "checkpoints/6",
        "result.json",
    }
    for path in (copied / "subset.json", copied / "metrics.jsonl"):
        path.unlink()
    for step in (4, 6):
        shutil.rmtree(copied / "checkpoints" / str(step) / "state")
    assert damaged_parts(copied) == set()
    (copied / "damaged" / "2").mkdir(parents=True)
    assert "set aside" in next(f.remark for f in verify(copied) if f.part == "damaged/2")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        verify(tmp_path)


@pytest.mark.parametrize("harm", [False, True])
def test_the_script_says_it_part_by_part_and_exits_with_2(harm, copied, monkeypatch, capsys):
    if harm:
        flip(copied / "checkpoints/4/state")
    monkeypatch.setattr(parallel, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", str(copied), "--verify"])
    code = 0
    try:
        runpy.run_path(str(EVALUATE), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    printed, errors = capsys.readouterr()
    assert code == (2 if harm else 0)
    lines = {line.split()[0]: line.split()[1] for line in printed.splitlines()}
    assert lines == {part: "ok" for part in lines} | ({"checkpoints/4": "DAMAGED"} if harm else {}) and len(lines) == 6
    assert (f"error: 1 of 6 parts of {copied} are damaged: checkpoints/4; " in errors) == harm
    assert json.loads((copied / "result.json").read_text())["status"] == "complete"
