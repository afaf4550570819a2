"""Every method from a config to a result that can be read, repeated and evaluated again."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import METHODS, files, method_config, tiny

from wdkd import steps
from wdkd.batches import batch_indices
from wdkd.config import DEFAULT_RADIUS
from wdkd.data import few_shot_split, load_dataset
from wdkd.errors import Diverged, UsageError
from wdkd.evaluate import evaluate_checkpoint
from wdkd.prepared import find_prepared
from wdkd.result import read_result
from wdkd.run_directory import read_run, read_teacher, read_trained
from wdkd.teacher import inference
from wdkd.train import run
from wdkd.verify import verify

pytestmark = pytest.mark.timeout(900)
SCALARS = {"objective", "loss", "gradient_norm"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_a_complete_directory(method, finished_run, teacher_run):
    directory, result = finished_run(method)
    config = method_config(method, teacher_run[0])
    assert read_result(directory / "result.json") == result
    assert result.config == config == read_run(directory).config
    assert (result.method, result.seed, result.steps, result.train_size, result.n_per_class) == (method, 0, 6, 200, 20)
    assert result.epsilon == {"wdkd": DEFAULT_RADIUS["wdkd"], "ab": 0.05}.get(method, 0.0)
    assert result.track == {"kd": "matching", "wdkd": "flip_crop"}.get(method, "plain")

    subset = json.loads((directory / "subset.json").read_text())
    indices = np.array(subset["indices"], np.int64)
    split = few_shot_split(load_dataset(config.data), config.data, config.seed)
    assert np.array_equal(indices, split.train_indices) and len(set(subset["indices"])) == 200
    assert subset["sha256"] == result.subset_hash == split.subset_hash == hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()

    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in lines] == [1, 2, 3, 4, 5, 6]
    worst_case = {"wdkd": range(6), "ab": range(3, 6)}.get(method, ())
    for step, line in enumerate(lines):
        assert set(line) == SCALARS | ({"input_gradient_norm"} if step in worst_case else set())
        assert np.isfinite(list(line.values())).all()
        # Eq. 2: the objective is the loss plus epsilon times the input gradients' norm.
        if method != "sobolev":
            penalty = result.epsilon * line.get("input_gradient_norm", 0.0)
            assert line["objective"] == pytest.approx(line["loss"] + penalty, rel=1e-5)
            assert penalty > 0 or step not in worst_case
    assert sum(path.stat().st_size for path in (directory / "events").glob("events.*")) > 300

    found = result.evaluation
    assert found.count == 540 == np.sum(found.confusion)
    assert found.accuracy == np.trace(found.confusion) / 540
    if method == "ce":
        assert (result.teacher_hash, result.teacher_path, found.agreement) == (None, None, None)
    else:
        assert result.teacher_hash == teacher_run[1].parameter_hash
        assert result.teacher_accuracy == teacher_run[1].evaluation.accuracy
        assert result.teacher_path == str(teacher_run[0])
    assert result.parameter_hash == read_trained(directory).hash


def test_methods_differ(finished_run):
    assert len({finished_run(method)[1].parameter_hash for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize("method", ["kd", "ab"])
def test_evaluating_the_checkpoint_gives_exactly_the_result(method, finished_run):
    """For kd, of the averaged parameters."""
    directory, result = finished_run(method)
    before = files(directory)
    again = evaluate_checkpoint(directory)
    assert again.evaluation == result.evaluation
    assert again.evaluation.agreement is not None
    unmeasured = {"wall_seconds": None, "examples_per_second": None, "teacher_cached": None}
    assert again == dataclasses.replace(result, **unmeasured)
    assert files(directory) == before


def test_a_checkpoint_can_be_evaluated_on_validation(finished_run):
    directory, result = finished_run("kd")
    found = evaluate_checkpoint(directory, split="validation").evaluation
    assert (found.split, found.count) == ("validation", 180)
    assert found.confusion != result.evaluation.confusion


def test_agreement_is_with_the_teacher_and_the_images_at_hand(finished_run, teacher_run):
    """What a teacher said is kept, so two teachers and two sets of images are asked about, one after the other and again."""
    directory = finished_run("kd")[0]
    student = read_trained(directory)
    for split in ("test", "validation"):
        config = dataclasses.replace(student.run.config.data, evaluate_on=split)
        images = few_shot_split(load_dataset(config), config, student.run.config.seed).evaluation_images.astype(np.float32) / 255
        called = [np.argmax(inference(t.model)(t.variables, images).logits, 1) for t in map(read_trained, (directory, teacher_run[0]))]
        for teacher, expected in [(directory, 1.0), (teacher_run[0], np.mean(called[0] == called[1]))] * 2:
            found = evaluate_checkpoint(directory, split=split, teacher=str(teacher)).evaluation
            assert found.agreement == pytest.approx(expected)
        assert 0.05 < expected < 0.95


def test_the_teacher_is_better_than_chance_and_distillation_follows_it(teacher_run, tmp_path):
    """Chance is 10 ± 1.3 % on 540 images."""
    config = tiny(method__name="kd", teacher=str(teacher_run[0]), optimizer__learning_rate=0.02, train__steps=60, train__log_every=20)
    found = run(config, tmp_path / "run", show_progress=False).evaluation
    assert teacher_run[1].evaluation.accuracy > 0.2
    assert found.accuracy > 0.2 and found.agreement > 0.2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_seed_decides_everything(finished_run, tmp_path):
    _, first = finished_run("ce")
    again = run(method_config("ce", None), tmp_path / "again", show_progress=False)
    other = run(method_config("ce", None, seed=1), tmp_path / "other", show_progress=False)
    assert again.parameter_hash == first.parameter_hash
    assert (again.evaluation, again.subset_hash) == (first.evaluation, first.subset_hash)
    assert other.parameter_hash != first.parameter_hash and other.subset_hash != first.subset_hash


DIVERGING = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e30, "optimizer__clip_norm": None, "optimizer__warmup_fraction": 0.5}


def test_a_value_that_is_not_finite_ends_the_run_at_that_step_and_the_result_says_so(tmp_path):
    """Warm-up begins at 0, so a checkpoint is saved before the parameters explode."""
    config, directory = method_config("ce", None, train__checkpoint_every=1, **DIVERGING), tmp_path / "run"
    with pytest.raises(
        Diverged, match=r"(objective|gradient_norm|a parameter) is (nan|inf|not finite) at step [2-6]; lower optimizer."
    ) as caught:
        run(config, directory, show_progress=False)
    result = read_result(directory / "result.json")
    assert (result.status, result.reason, result.evaluation) == ("diverged", str(caught.value), None)
    assert f"at step {result.steps};" in result.reason
    assert {finding.problem for finding in verify(directory)} == {None}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == result.steps - 1 and all(np.isfinite(list(line.values())).all() for line in lines)
    before = files(directory)
    with pytest.raises(Diverged, match=r"has diverged: .* at step .*; change the options and give another --workdir"):
        run(config, directory, show_progress=False)
    assert files(directory) == before
    with pytest.raises(UsageError, match="teacher: .* has diverged"):
        read_teacher(directory)


def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    """An image is made of NaN: what is trained is what would have been without the steps that see it."""
    options = {
        "train__batch_size": 1,
        "data__n_per_class": 1,
        "train__steps": 25,
        "optimizer__ema_decay": 0.5,
        "train__checkpoint_every": 7,
    }
    monkeypatch.setattr(
        steps, "pixels", lambda images: jnp.where(images[..., :1, :1, :1] == 255, jnp.nan, images.astype(jnp.float32) / 255)
    )
    spoiled = few_shot_split(load_dataset(tiny().data), tiny(**options).data, 0)
    spoiled.train_images[3, 0, 0, 0] = 255
    monkeypatch.setattr("wdkd.train.few_shot_split", lambda *args: spoiled)
    config = method_config("ce", None, optimizer__max_skipped=3, **options)
    result = run(config, tmp_path / "run", show_progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [bool(batch_indices(10, 1, 0, step)[0] == 3) for step in range(25)]
    assert result.skipped_updates == sum(seen) in (2, 3)
    assert [line["skipped"] for line in lines] == np.cumsum(seen).tolist()
    assert ["objective" in line for line in lines] == [not bad for bad in seen]
    leaves = jax.tree.leaves(read_trained(tmp_path / "run").variables)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    fewer = method_config("ce", None, optimizer__max_skipped=sum(seen) - 1, **options)
    with pytest.raises(Diverged, match=rf"at step {np.flatnonzero(seen)[-1] + 1}, after {sum(seen) - 1} skipped updates; lower"):
        run(fewer, tmp_path / "fewer", show_progress=False)


def fashion_mnist_is_prepared():
    given = os.environ.get("TFDS_DATA_DIR")
    return bool(given) and find_prepared("fashion_mnist", Path(given)) is not None


@pytest.mark.skipif(not fashion_mnist_is_prepared(), reason="no real images: TFDS_DATA_DIR does not hold fashion_mnist")
def test_a_student_of_fashion_mnist(tmp_path):
    """Three steps on real images, 5 of each class; all 10,000 test images are evaluated."""
    data = {"data__name": "fashion_mnist", "data__n_per_class": 5, "data__validation_size": 5000, "train__steps": 3}
    taught = run(tiny(**data), tmp_path / "teacher", show_progress=False)
    student = tiny(**data, method__name="kd", teacher=str(tmp_path / "teacher"), augment__name="matching")
    found = run(student, tmp_path / "student", show_progress=False)
    assert found.evaluation.count == 10_000 == np.sum(found.evaluation.confusion)
    assert np.sum(found.evaluation.confusion, axis=1).tolist() == [1000] * 10
    assert found.train_size == 50 and found.subset_hash == taught.subset_hash
    assert found.evaluation.class_names[0] == "T-shirt/top"
    assert read_run(tmp_path / "student").input.image_shape == [28, 28, 1]


def test_steps_in_a_call_are_the_steps_one_by_one(finished_run, teacher_run, tmp_path):
    """Checkpoints are every second step and stages change after the third, so that calls of two steps and of one alternate."""
    directory, one_by_one = finished_run("ab")
    config = method_config("ab", teacher_run[0], train__steps_per_call=2)
    together = run(config, tmp_path / "run", show_progress=False)
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (directory, tmp_path / "run")]
    for a, b in zip(*lines, strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b), rel=1e-4)
    assert together.evaluation.confusion == one_by_one.evaluation.confusion


def test_bfloat16_trains_as_float32_does_to_its_precision(teacher_run, tmp_path, monkeypatch):
    """On the CPU, which only simulates it. Parameters, their gradients and what is measured stay float32."""
    monkeypatch.setattr("wdkd.parallel.check_precision", lambda precision: None)
    edits = {"train__steps": 60, "augment__name": "none", "method__epsilon": 0.05, "optimizer__learning_rate": 0.02}
    results, losses = {}, {}
    for precision in ("float32", "bfloat16"):
        config = method_config("wdkd", teacher_run[0], train__precision=precision, **edits)
        results[precision] = run(config, tmp_path / precision, show_progress=False)
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        losses[precision] = np.array([json.loads(line)["objective"] for line in lines])
    assert 1e-7 < np.abs(losses["bfloat16"][0] / losses["float32"][0] - 1) < 0.02
    assert np.abs(losses["bfloat16"][-5:].mean() / losses["float32"][-5:].mean() - 1) < 0.1
    accuracies = [result.evaluation.accuracy for result in results.values()]
    assert abs(accuracies[0] - accuracies[1]) < 0.05 and min(accuracies) > 0.2
    leaves = jax.tree.leaves(read_trained(tmp_path / "bfloat16").variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
