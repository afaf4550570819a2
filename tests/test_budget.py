"""The student that fits: sizes are exact, the next one up is over budget, and what makes no sense is refused."""

import json
import runpy
import sys
from pathlib import Path

import jax
import pytest
from test_command_line import call as call
from test_command_line import one_cache as one_cache
from test_command_line import refused as refused
from test_folding import drawn

from wdkd import command_line, models
from wdkd.budget import WIDEST, choose, read_budgets, size_of
from wdkd.config import STUDENTS, ModelConfig
from wdkd.errors import UsageError
from wdkd.graph import named, record
from wdkd.models import parameter_count
from wdkd.parsing import parse

LAUNCH = Path(__file__).parents[1] / "launch"

DIGITS = {"classes": 10, "image_shape": (8, 8, 1)}


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("200k-params", {"parameters": 200_000}),
        ("1.5MParameters", {"parameters": 1_500_000}),
        ("7 params", {"parameters": 7}),
        ("10MFLOPs", {"flops": 10_000_000}),
        ("0.25 gflops", {"flops": 250_000_000}),
        ("1MB", {"bytes": 1_000_000}),
        ("64KiB", {"bytes": 65_536}),
    ],
)
def test_budgets_are_read(text, limits):
    assert read_budgets([text]) == limits


@pytest.mark.parametrize(
    "text", ["", "200k", "params", "-1MB", "1e3MB", "nan MB", "1 000 params", "1iB", "10MFLOP/s", "1MB2", "0.0001 params"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError, match="^budget is '"):
        read_budgets([text])


def test_two_limits_of_one_kind_are_refused():
    assert read_budgets(["1MB", "200k-params"]) == {"bytes": 10**6, "parameters": 200_000}
    with pytest.raises(UsageError, match="two limits of bytes"):
        read_budgets(["1MB", "2kB"])


@pytest.mark.parametrize(("name", "norm"), [("whitened_cnn", "group"), ("cnn", "batch"), ("resnet8", "group")])
def test_sizes_are_those_of_the_network(name, norm):
    """Parameters as they are made; bytes not below those of its ONNX file, with all of its ten classes' names."""
    onnx_graph = pytest.importorskip("wdkd.onnx_graph")
    model, variables, _ = drawn(name, norm, (9, 11, 3))
    size = size_of(ModelConfig(name, 4, norm), classes=5, image_shape=(9, 11, 3))
    assert size.parameters == parameter_count(variables["params"])
    file = onnx_graph.to_onnx(record(model, variables, (9, 11, 3)), named(variables), {"class_names": "x" * 4000})
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert arrays <= file.ByteSize() <= size.bytes < arrays + 40_000


@pytest.mark.parametrize(
    ("student", "budget", "name"),
    [("auto", "20k-params", "whitened_cnn"), ("auto", "60kB", "whitened_cnn"), ("auto-resnet", "2MFLOPs", "resnet8")],
)
def test_the_next_width_is_over_budget(student, budget, name):
    chosen, line = choose(student, [budget], "group", **DIGITS)
    ((kind, limit),) = read_budgets([budget]).items()
    assert chosen.name == name and chosen.norm == "group" and chosen.width % 4 == 0
    sizes = [getattr(size_of(ModelConfig(name, width, "group"), **DIGITS), kind) for width in (chosen.width, chosen.width + 4)]
    assert sizes[0] <= limit < sizes[1]
    assert line.startswith(f"student: {name} of width {chosen.width} with group norm, ") and budget in line


def test_where_the_whitening_is_too_much_it_is_a_plain_network():
    chosen, _ = choose("auto", ["120kFLOPs"], "group", **DIGITS)
    assert chosen == ModelConfig("cnn", 4, "group")
    assert choose("auto", ["30kFLOPs"], "group", **DIGITS)[0] in [ModelConfig("cnn", width, "group") for width in (1, 2, 3)]


def test_a_deep_family_is_as_deep_as_fits_sixteen_wide():
    chosen, _ = choose("auto-wrn", ["120k-params"], "batch", **DIGITS)
    sizes = {name: size_of(ModelConfig(name, 16, "batch"), **DIGITS).parameters for name in ("wrn_10_1", "wrn_16_1")}
    assert sizes["wrn_10_1"] <= 120_000 < sizes["wrn_16_1"]
    assert chosen.name == "wrn_10_1" and chosen.width >= 16


def test_budgets_that_no_network_fits_or_all_do_are_refused():
    with pytest.raises(UsageError, match="budget 10-params is too small: the smallest cnn takes "):
        choose("auto", ["10-params"], "group", **DIGITS)
    with pytest.raises(UsageError, match=f"has room for a whitened_cnn of width {WIDEST}"):
        choose("auto", ["10G-params"], "group", **DIGITS)
    with pytest.raises(UsageError, match="needs a --budget"):
        choose("auto", [], "group", **DIGITS)


def test_a_budget_beyond_what_is_trained_is_refused(monkeypatch):
    monkeypatch.setattr(models, "MAX_PARAMETERS", 10**6)
    with pytest.raises(UsageError, match="budget 100G-params is too large: model 'cnn' of width 64 has about 1 million parameters"):
        choose("auto-cnn", ["100G-params"], "group", **DIGITS)


# --- in the command lines ---------------------------------------------------------------------------------------------


def test_a_run_stores_the_network_that_was_chosen_and_goes_on_with_it(teacher_run, tmp_path, monkeypatch, capsys):
    """The second time the run is finished, and returned as it is."""
    budget = ["--student", "auto", "--budget", "200kFLOPs", "5k-params"]
    options = ["--workdir", tmp_path / "run", "--teacher", teacher_run[0], "--method.name", "kd", "--train.steps", 1]
    monkeypatch.setattr(sys, "argv", ["launch/distill.py", *map(str, options), "--train.batch-size", "20", *budget])
    printed = []
    for _ in range(2):
        runpy.run_path(str(LAUNCH / "distill.py"), run_name="__main__")
        printed.append(capsys.readouterr())
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["model"]
    assert stored == {"name": "cnn", "width": 4, "norm": "group"}
    assert printed[0].out == printed[1].out
    assert all("note: student: cnn of width 4 with group norm, 4,782 parameters, " in one.err for one in printed)


def test_a_sweep_and_its_grid_file_find_it_too(tmp_path, monkeypatch):
    """The jobs' configs, as they would be run."""
    argv = ["--workdir", str(tmp_path / "runs"), "--student", "auto", "--budget", "5k-params", "--methods", "ce"]
    default = command_line._default_sweep(STUDENTS, argv)
    given = parse(command_line.SweepArguments, argv, description=None, default=default)
    jobs = command_line._jobs(STUDENTS, given)
    (tmp_path / "grid.toml").write_text('[default]\nstudent = "auto"\nbudget = ["5k-params"]\n[[sweep]]\nmethods = ["ce"]\n')
    monkeypatch.setattr(sys, "argv", ["launch/sweep.py", *argv[:2]])
    declared = command_line._declared_jobs(STUDENTS, str(tmp_path / "grid.toml"))
    assert {job.config.model for job in (*jobs, *declared)} == {ModelConfig("cnn", 4, "group")}


def test_half_of_a_request_is_refused(refused, teacher_run, tmp_path):
    options = ["--workdir", tmp_path / "run", "--teacher", teacher_run[0]]
    assert "--budget 1MB is for --student auto" in refused("distill", *options, "--budget", "1MB")
    assert "needs a --budget" in refused("distill", *options, "--student", "auto")
    assert "budget is '1 Mb per second'" in refused("distill", *options, "--student", "auto", "--budget", "1 Mb per second")
    assert "leave them out" in refused("distill", *options, "--student", "auto", "--budget", "1MB", "--model.width", 5)
    assert "--student" in refused("distill", *options, "--student", "automatic", "--budget", "1MB")
