"""The benchmark on tiny networks: what it times is what runs do, and the table says what was measured."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from wdkd import benchmark_report, measure, timing
from wdkd.benchmark import IDEALS, Case, Setup, random_split
from wdkd.config import ModelConfig
from wdkd.errors import UsageError
from wdkd.methods import METHODS
from wdkd.timing import Spread, interleaved, ratio, spread

TORCH = importlib.util.find_spec("torch") is not None
SETUP = Setup(
    images_per_class=2, batch_size=4, classes=5, side=8, student=ModelConfig("cnn", 4, "group"), teacher=ModelConfig("resnet8", 4, "batch")
)


# --- timing -------------------------------------------------------------------------------------------------------------


def test_every_round_runs_every_case_and_the_order_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def case(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds * (10 if len(order) <= 3 else 1)  # The first call compiles.

        return run

    seconds = interleaved({"a": case("a", 1), "b": case("b", 2), "c": case("c", 4)}, 3, title="", show=False)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}


def test_ratios_are_taken_round_by_round():
    """A machine that slows down threefold in the middle leaves the ratio as it is."""
    assert ratio([2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 3.0, 3.0]) == Spread(2.0, 2.0, 2.0)
    assert spread([5, 1, 3]) == Spread(3.0, 2.0, 4.0)


# --- cases --------------------------------------------------------------------------------------------------------------


def test_every_method_has_an_ideal():
    assert IDEALS.keys() == METHODS.keys()


def test_a_case_trains_and_its_gradient_is_that_of_its_objective(tmp_path):
    """The objective falls by the rate times the square of the gradient, to first order, where the step is plain descent."""
    case = Case(SETUP, "kd", cached=True, folder=tmp_path)
    first = case.first
    before, gradients = case.gradients()

    def objective(params):
        from wdkd.losses import kl_divergence
        from wdkd.models import apply_network

        student = apply_network(case.trainer.student, {"params": params, "input": case.trainer.input}, case.batch, train=True)
        teacher = case.trainer.teacher.apply(case.trainer.teacher.variables, case.batch)
        return kl_divergence(student.logits, teacher.logits, 4.0).mean()

    value, expected = jax.jit(jax.value_and_grad(objective))(first["params"])
    assert before == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    for _ in range(30):
        case()
    assert case.gradients()[0] < 0.9 * before


def test_a_random_record_has_the_shapes_of_a_made_one(tmp_path):
    made, random = (Case(SETUP, "sobolev", cached=True, folder=folder).rest[0] for folder in (tmp_path, None))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), random)
    assert len(random_split(SETUP).train_labels) == 10


# --- the whole ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The numbers of a benchmark on tiny networks, beside PyTorch where it is installed."""
    steps = measure.measure_steps(SETUP, ("ce", "kd", "wdkd"), 2, tmp_path_factory.mktemp("record"), with_torch=TORCH, show=False)
    return measure.describe_setup(SETUP, 2) | steps


def test_steps_are_timed_and_counted(found):
    rows = {row["name"]: row for row in found["steps"]}
    names = {"ce", "kd live", "kd recorded", "wdkd live", "wdkd recorded"}
    assert rows.keys() - {f"{m} {k}" for m in ("kd", "wdkd") for k in ("PyTorch", "PyTorch fused")} == names
    for row in rows.values():
        assert 0 < row["milliseconds"]["lower"] <= row["milliseconds"]["median"] <= row["milliseconds"]["upper"]
    student, teacher = found["forward_flops"]["student"], found["forward_flops"]["teacher"]
    for name, ideal in {"wdkd live": 6 * student + 3 * teacher, "wdkd recorded": 6 * student}.items():
        assert rows[name]["gflop"] * 1e9 == pytest.approx(rows[name]["over_ideal"] * ideal)
        # Networks this small have more to do than convolutions.
        assert 0.5 < rows[name]["over_ideal"] < 3
    assert rows["wdkd live"]["scratch_mib"] > rows["wdkd recorded"]["scratch_mib"] > 0


def test_the_records_memory_is_that_of_its_arrays(found):
    record = found["record"]
    assert record["views"] == 10
    assert record["memory_mib"] * 2**20 == 10 * 5 * 4 * (8 * 8 * 3 + 1)
    assert record["over_jacobians"] == pytest.approx(1 + 1 / (8 * 8 * 3))
    assert record["memory_mib"] < record["files_mib"] < record["memory_mib"] + 0.01


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed (pip install 'wdkd[benchmark]')")
def test_pytorch_computes_the_same_before_it_is_timed(found):
    apart = found["torch"]["disagreement"]
    assert len(apart) == 6 and all(max(parts["loss"], parts["gradient"]) <= measure.TOLERANCE for parts in apart.values())
    assert {"PyTorch wdkd over wdkd live", "PyTorch fused wdkd over wdkd recorded"} <= found["ratios"].keys()


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed (pip install 'wdkd[benchmark]')")
def test_nothing_is_timed_where_pytorch_computes_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "TEMPERATURE", 3.9)
    monkeypatch.setattr(measure, "interleaved", lambda *args, **options: pytest.fail("timed"))
    with pytest.raises(UsageError, match="loss and gradient differ from PyTorch's by .*nothing was timed"):
        measure.measure_steps(SETUP, ("kd", "wdkd"), 1, tmp_path, with_torch=True, show=False)


def test_the_table_and_the_plot_say_what_was_measured(found, tmp_path):
    table, picture = benchmark_report.write_report(found, tmp_path / "device.json")
    text = table.read_text()
    for row in found["steps"]:
        assert f"| {row['name']} | {row['milliseconds']['median']:,.1f} (" in text
    for name, value in found["ratios"].items():
        assert f"| {name} | {value['median']:,.2f} (" in text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.name in text
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("measured", "met"), [(1.49, False), (1.5, True), (None, None)])
def test_targets_are_judged_by_their_side(measured, met):
    ratios = {"PyTorch wdkd over wdkd live": {"median": measured}} if measured else {}
    judged = benchmark_report.judge({"ratios": ratios, "start": {"live warm": {"median": measured and 6.5 - measured}}})
    assert (judged[0]["measured"], judged[0]["met"]) == (measured, met)
    at_most = next(row for row in judged if row["target"] == "seconds to the first step, warm, live teacher")
    assert at_most["met"] == met
    text = "\n".join(benchmark_report.targets_table(judged))
    assert ("MISSED" in text) == (met is False) and "not measured" in text


def test_what_grows_is_timed_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "GROWTH", {"batch_size": (4, 8)})
    grown = measure.measure_growth(SETUP, 1, show=False)
    assert [(row["what"], row["value"]) for row in grown] == [("batch_size", 4), ("batch_size", 8)]
    assert all(set(row["milliseconds"]) == {"kd live", "wdkd live", "wdkd recorded"} for row in grown)
    found = measure.describe_setup(SETUP, 1) | {"growth": grown}
    table, picture = benchmark_report.write_report(found, tmp_path / "device.json")
    assert "| batch_size 8 |" in table.read_text() and picture.stat().st_size > 1000
