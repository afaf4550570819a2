"""A compact copy: half the bytes, the numbers of bfloat16, the accuracy of those, and a teacher like any other."""

import dataclasses
import zlib

import jax
import numpy as np
import pytest
from conftest import files, tiny

from wdkd.compact import compact
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_checkpoint
from wdkd.result import read_result
from wdkd.run_directory import read_teacher, read_trained
from wdkd.train import run
from wdkd.verify import verify


@pytest.fixture(scope="module")
def copied(teacher_run, tmp_path_factory):
    """(original, copy, result of the copy)."""
    out = tmp_path_factory.mktemp("compact") / "teacher"
    return teacher_run[0], out, compact(teacher_run[0], out)


def test_parameters_are_the_nearest_that_bfloat16_has(copied):
    original, out, _ = copied
    before, after = (read_trained(directory).variables for directory in (original, out))
    for a, b in zip(jax.tree.leaves(before["params"]), jax.tree.leaves(after["params"]), strict=True):
        assert b.dtype == np.float32
        assert not (b.view(np.uint32) & 0xFFFF).any()
        # Half a unit in the last of 8 binary places.
        assert (np.abs(a - b) <= np.abs(a) * 2.0**-8).all()
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before["params"]), jax.tree.leaves(after["params"]), strict=True))


def test_its_result_is_of_what_it_holds(copied):
    original, out, result = copied
    assert read_result(out / "result.json") == result
    again = evaluate_checkpoint(out)
    assert (again.evaluation, again.parameter_hash) == (result.evaluation, result.parameter_hash)
    assert result.parameter_hash != read_result(original / "result.json").parameter_hash
    assert result.wall_seconds == read_result(original / "result.json").wall_seconds
    assert [finding.part for finding in verify(out) if finding.problem is not None] == []


def test_it_is_a_teacher(copied, tmp_path):
    _, out, result = copied
    assert read_teacher(out).hash == result.parameter_hash
    student = run(tiny(method__name="kd", teacher=str(out)), tmp_path / "student", show_progress=False)
    assert (student.teacher_hash, student.teacher_accuracy) == (result.parameter_hash, result.evaluation.accuracy)


def test_compressed_as_checkpoints_are_it_takes_little_more_than_half(copied):
    """Of the arrays: a checkpoint of so small a network is mostly descriptions."""
    sizes = [
        sum(len(zlib.compress(leaf.tobytes())) for leaf in jax.tree.leaves(read_trained(directory).variables["params"]))
        for directory in copied[:2]
    ]
    assert sizes[1] < 0.65 * sizes[0]


def test_what_is_there_is_not_overwritten(copied):
    before = files(copied[1])
    with pytest.raises(UsageError, match="is there already; give another --out"):
        compact(copied[0], copied[1])
    assert files(copied[1]) == before


def test_an_unfinished_run_and_what_is_no_run_are_refused(teacher_run, tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        compact(tmp_path, tmp_path / "out")
    config = dataclasses.replace(tiny(), train=dataclasses.replace(tiny().train, steps=2))
    run(config, tmp_path / "run", show_progress=False)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UsageError, match=r"result\.json"):
        compact(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
