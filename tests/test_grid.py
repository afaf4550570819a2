"""A grid is all combinations of its values, small N first, and no two of its runs share a directory or a result."""

import dataclasses
from pathlib import Path

import pytest
from conftest import tiny

from wdkd.config import differences
from wdkd.errors import UsageError
from wdkd.grid import MOST_RUNS, Grid, expand, merged
from wdkd.result import results_path
from wdkd.train import run

ONE = Grid(methods=("ce",), n_per_class=(20,), seeds=(0,))


def jobs_of(base=None, workdir="runs", results="results", **axes):
    return expand(dataclasses.replace(ONE, **axes), base or tiny(), Path(workdir), Path(results))


def on_validation(**edits):
    return tiny(data__evaluate_on="validation", **edits)


def test_all_combinations_in_order_and_every_one_is_an_edit_of_the_base():
    base = tiny(method__temperature=3.0)
    jobs = jobs_of(base, methods=("kd", "ce"), n_per_class=(5, 0), seeds=(1, 0), augmentations=("none", "matching"))
    keys = [(c.data.n_per_class, c.seed, c.augment.name, c.method.name) for c in (job.config for job in jobs)]
    assert keys == [(n, s, a, m) for n in (5, None) for a in ("none", "matching") for m in ("kd", "ce") for s in (1, 0)]
    changed = {line.split(":")[0] for job in jobs for line in differences(base, job.config)}
    assert changed == {"data.n_per_class", "seed", "augment.name", "method.name"}
    assert jobs[-1].workdir == Path("runs/digits/matching/ce/nfull/seed0") and jobs[-1].root == Path("runs")
    assert {job.cache for job in jobs} == {Path("runs/teacher-cache")}, "one record of the teacher for all"


def test_varied_options_are_multiplied_in_and_name_the_directory():
    axes = {"methods": ("kd", "ab"), "epsilons": (0.0, 0.01), "vary": ("method.temperature=1,4", "optimizer.clip-norm=None,0.5")}
    jobs = jobs_of(on_validation(), **axes)
    found = {
        job.variant: (c.method.name, c.method.epsilon, c.method.temperature, c.optimizer.clip_norm) for job in jobs for c in [job.config]
    }
    assert len(jobs) == len(found) == 16
    assert found["kd-epsilon0-temperature4-clip_normNone"] == ("kd", 0.0, 4.0, None)
    assert found["ab-epsilon0.01-temperature1-clip_norm0.5"] == ("ab", 0.01, 1.0, 0.5)
    assert len({job.target for job in jobs}) == 16
    assert jobs[0].target == Path("results/tuning/digits/plain/kd-epsilon0-temperature1-clip_normNone/n20/seed0.json")


def test_data_sets_can_be_varied_and_have_their_own_directories():
    jobs = jobs_of(on_validation(), vary=("data.name=digits,emnist/balanced",))
    assert [job.workdir.parts[1:-4] for job in jobs] == [("digits",), ("emnist-balanced",)]
    assert [job.root for job in jobs] == [Path("runs")] * 2


def test_results_on_the_test_set_are_where_reports_look_for_them(tmp_path):
    (job,) = jobs_of(augmentations=("flip_crop",), workdir=tmp_path / "runs")
    result = run(dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, steps=1)), job.workdir, show_progress=False)
    assert job.target == results_path(job.publish, result)


TRIED_ON_TEST = {"epsilons": {"epsilons": (0.0, 0.1)}, "vary": {"vary": ("method.temperature=4",)}}


@pytest.mark.parametrize("axes", TRIED_ON_TEST.values(), ids=TRIED_ON_TEST)
def test_several_values_of_what_results_do_not_tell_apart_are_for_validation(axes):
    with pytest.raises(UsageError, match="would be tried on the test set.*tune with --data.evaluate-on validation"):
        jobs_of(**axes)
    assert jobs_of(on_validation(), **axes)


def test_the_split_itself_cannot_be_varied_into_the_test_set():
    with pytest.raises(UsageError, match="data.evaluate_on would be tried on the test set"):
        jobs_of(on_validation(), vary=("data.evaluate-on=validation,test",))


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ({"vary": ("train.steps=1,2", "train.steps=3")}, "vary names an option twice"),
        ({"vary": ("method.temperature=4,-1",)}, "method.temperature is -1.0; it must be finite and above 0"),
        ({"methods": ("kdd",)}, "unknown method 'kdd'; did you mean 'kd'?"),
        ({"seeds": ()}, "seeds is empty; name at least one"),
        ({"seeds": tuple(range(1000)), "n_per_class": tuple(range(1, 102))}, f"the grid has 101,000 runs; at most {MOST_RUNS:,} are taken"),
    ],
)
def test_what_no_run_can_have_is_refused(axes, line):
    with pytest.raises(UsageError) as refused:
        jobs_of(on_validation(), **axes)
    assert str(refused.value).startswith(line)


# --- one directory, one run ---------------------------------------------------------------------------------------------


def test_equal_runs_are_one():
    assert jobs_of(seeds=(0, 1, 0)) == jobs_of(seeds=(0, 1))
    assert merged([*jobs_of(seeds=(0, 1)), *jobs_of(seeds=(1, 2))]) == jobs_of(seeds=(0, 1, 2))


def test_two_runs_cannot_have_one_directory():
    others = [*jobs_of(), *jobs_of(tiny(train__steps=7))]
    with pytest.raises(UsageError, match=r"runs/digits/none/ce/n20/seed0 is the directory of two runs .*\(train.steps: 6, 7\)"):
        merged(others)
    with pytest.raises(UsageError, match=r"two runs that differ \(results: results, elsewhere\)"):
        merged([*jobs_of(), *jobs_of(results="elsewhere")])
    with pytest.raises(UsageError, match="two runs that differ"):
        jobs_of(on_validation(), vary=("method.temperature=1.0000001,1.0000002",))


def test_the_same_directory_by_another_path_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="two runs that differ"):
        merged([*jobs_of(), *jobs_of(tiny(train__steps=7), workdir=tmp_path / "x" / ".." / "runs")])


def test_two_runs_cannot_have_one_result():
    jobs = [*jobs_of(), *jobs_of(tiny(train__steps=7), workdir="long")]
    with pytest.raises(UsageError, match="seed0.json is the result of both runs/.* and long/.*; give one of them another results"):
        merged(jobs)
    assert len(merged([*jobs_of(), *jobs_of(tiny(train__steps=7), workdir="long", results="results/long")])) == 2
