"""Eight simulated devices, and two processes, do what one device does. Run as a script, this file is the process with eight."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from wdkd import parallel
from wdkd.data import few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_network
from wdkd.methods import create_stages
from wdkd.run_directory import describe_run, read_teacher, read_trained
from wdkd.steps import Data
from wdkd.teacher import inference
from wdkd.train import measure_input
from wdkd.trainer import AUGMENTATION, Trainer

pytestmark = pytest.mark.timeout(900)  # Several programs are compiled; a busy machine takes its time.
DEVICES = 8
LAUNCH = Path(__file__).parents[1] / "launch"
SHARED = {"train__batch_size": 40, "optimizer__name": "sgd", "optimizer__learning_rate": 0.1, "optimizer__warmup_fraction": 0.0}
CASES = {
    "wdkd_mean": {"method__name": "wdkd", "method__epsilon": 0.1, "method__aggregate": "mean"},
    "wdkd_rms": {"method__name": "wdkd", "method__epsilon": 0.1, "method__aggregate": "rms"},
    "wdkd_max": {"method__name": "wdkd", "method__epsilon": 0.1, "method__aggregate": "max"},
    "wdkd_recorded": {"method__name": "wdkd", "method__epsilon": 0.1, "cache__mode": "on"},
    "kd_two_steps_a_call": {"method__name": "kd", "train__steps_per_call": 2, "augment__name": "flip_crop", "augment__views": 2},
    "kd_batch_norm": {"method__name": "kd", "model__norm": "batch", "augment__name": "matching", "optimizer__ema_decay": 0.5},
}


def one_step(edits, teacher_directory):
    """({name: array} of the first state and of the state after one call, metrics, both states) on all devices there are."""
    config = tiny(teacher=str(teacher_directory), **SHARED, **edits).check()
    split = few_shot_split(load_dataset(config.data), config.data, config.seed)
    teacher = read_teacher(teacher_directory)
    trainer = Trainer(describe_run(config, measure_input(split)), split, teacher, create_stages(config.method))
    with tempfile.TemporaryDirectory() as folder:
        trainer.record(Path(folder), show=False)
    assert (trainer.known is not None) == (config.cache.mode == "on")
    plan = trainer.plan(0)
    before = trainer.first(0)
    first = {f"before{jax.tree_util.keystr(path)}": np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(before)}
    data = parallel.replicate(Data(split.train_images, split.train_labels, trainer.input))
    key = parallel.replicate(jax.random.key_data(trainer.key(AUGMENTATION)))
    after, measured = plan.step(parallel.replicate(before), trainer.what_is_known(0), data, key, trainer.draws(0, 0))
    second = {f"after{jax.tree_util.keystr(path)}": np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(after)}
    return first | second, {name: np.asarray(value).tolist() for name, value in measured.items()}, after


def evaluation(teacher_directory):
    trained = read_trained(teacher_directory)
    split = few_shot_split(load_dataset(trained.run.config.data), trained.run.config.data, 0)
    return evaluate_network(inference(trained.model), trained.variables, read_teacher(teacher_directory), split)


def replicas_agree(tree):
    """Whether every leaf is on all devices, with the same bits."""
    shards = [[np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]
    return all(len(copies) == jax.device_count() and len(set(copies)) == 1 for copies in shards)


def main(teacher_directory, out):
    """What the process with eight devices writes down."""
    facts = {"devices": jax.device_count()}
    for name, edits in CASES.items():
        arrays, measured, after = one_step(edits, teacher_directory)
        np.savez(Path(out) / f"{name}.npz", **arrays)
        facts[name] = {"measured": measured, "replicas_agree": replicas_agree(after)}
    facts["evaluation"] = dataclasses.asdict(evaluation(teacher_directory))
    forgetful = parallel.map_over_devices(lambda state, x: state + x.sum(), arguments=2)
    forgotten = forgetful(parallel.replicate(jnp.zeros(())), parallel.share(np.arange(16.0)))
    facts["forgotten_pmean_agrees"] = replicas_agree(forgotten)
    (Path(out) / "facts.json").write_text(json.dumps(facts))


def environment(devices, **more):
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | more


@pytest.fixture(scope="module")
def eight(teacher_run, tmp_path_factory):
    """(folder with the arrays, facts) of the process with eight devices."""
    out = tmp_path_factory.mktemp("eight")
    command = [sys.executable, __file__, str(teacher_run[0]), str(out)]
    done = subprocess.run(command, env=environment(DEVICES), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((out / "facts.json").read_text())
    assert facts["devices"] == DEVICES
    return out, facts


@pytest.mark.skipif(jax.device_count() != 1 or jax.default_backend() != "cpu", reason="compares with a single CPU device")
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_eight_devices_is_the_step_on_one(name, eight, teacher_run):
    out, facts = eight
    arrays, measured, _ = one_step(CASES[name], teacher_run[0])
    there = np.load(out / f"{name}.npz")
    assert set(there.files) == set(arrays)
    for leaf in (leaf for leaf in arrays if leaf.startswith("before")):
        assert np.array_equal(arrays[leaf], there[leaf]), leaf
    # Compared with how far the step went, so that a step not taken, or taken elsewhere, cannot hide behind large parameters.
    for part in (".variables['student']", ".average", ".optimizer"):
        leaves = [leaf for leaf in arrays if leaf.startswith(f"after{part}")]
        moved = sum(((arrays[leaf] - arrays[leaf.replace("after", "before", 1)]).astype(np.float64) ** 2).sum() for leaf in leaves)
        apart = sum(((arrays[leaf] - there[leaf]).astype(np.float64) ** 2).sum() for leaf in leaves)
        assert not leaves or moved > 0
        assert apart <= (2e-5) ** 2 * moved, (part, np.sqrt(apart / moved))
    assert measured.keys() == facts[name]["measured"].keys()
    for quantity, values in measured.items():
        np.testing.assert_allclose(facts[name]["measured"][quantity], values, rtol=1e-5, err_msg=quantity)
    assert len(measured["loss"]) == (2 if "two_steps" in name else 1)


@pytest.mark.parametrize("name", CASES)
def test_every_replica_of_the_state_has_the_same_bits(name, eight):
    assert eight[1][name]["replicas_agree"]


def test_a_forgotten_pmean_would_be_noticed(eight):
    assert not eight[1]["forgotten_pmean_agrees"]


def test_evaluation_on_eight_devices_counts_every_image_once(eight, teacher_run):
    here, there = dataclasses.asdict(teacher_run[1].evaluation), eight[1]["evaluation"]
    assert there["count"] == 540 == np.sum(there["confusion"])
    assert there["agreement"] == 1.0, "the teacher agrees with itself on every image"
    assert there["ece"] == pytest.approx(here["ece"], abs=1e-6)
    for name in ("accuracy", "confusion", "per_class_accuracy", "class_names"):
        assert there[name] == here[name], name


@pytest.mark.parametrize(("batch", "devices", "advice"), [(100, 8, 96), (7, 8, 8), (1, 3, 3), (64, 7, 63)])
def test_a_batch_that_the_devices_do_not_divide_is_refused(monkeypatch, batch, devices, advice):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with pytest.raises(UsageError, match=f"batch {batch} is not divisible by {devices} devices; use train.batch_size {advice}"):
        parallel.check_batch(batch)
    parallel.check_batch(advice)


@pytest.mark.parametrize(
    ("platform", "capability", "refused"),
    [("cpu", None, True), ("gpu", "7.5", True), ("gpu", "8.0", False), ("gpu", "9.0", False), ("tpu", None, False)],
)
def test_bfloat16_is_refused_where_there_is_none(monkeypatch, platform, capability, refused):
    class Device:
        device_kind = "some device"

    Device.platform, Device.compute_capability = platform, capability
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    parallel.check_precision("float32")
    with pytest.raises(UsageError, match="train.precision is bfloat16, which some device") if refused else contextlib.nullcontext():
        parallel.check_precision("bfloat16")


@pytest.mark.parametrize(("backend", "steps"), [("cpu", 1), ("gpu", 20), ("tpu", 20)])
def test_steps_per_call_are_the_backends_unless_given(monkeypatch, backend, steps):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert (parallel.steps_per_call(None), parallel.steps_per_call(7)) == (steps, 7)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_shares_of_all_processes_are_the_batch(monkeypatch, processes):
    rows = np.arange(48).reshape(24, 2)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "local_device_count", lambda: 8 // processes)
    parts = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(parallel.share(rows))
        assert parts[-1].shape == (8 // processes, 3, 2)
    assert np.array_equal(np.concatenate(parts).reshape(rows.shape), rows)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((None, 2, 0), "--coordinator HOST:PORT, --processes N and --process-id I together"),
        (("127.0.0.1:1", None, 0), "together"),
        (("127.0.0.1:1", 2, None), "together"),
        (("127.0.0.1:1", 2, 2), "process id is 2; it must be between 0 and 1"),
        (("127.0.0.1:1", 2, -1), "process id is -1"),
        (("127.0.0.1:1", 0, 0), "processes is 0; it must be at least 1"),
    ],
)
def test_an_incomplete_description_of_processes_is_refused(given, text):
    with pytest.raises(UsageError, match=text):
        parallel.initialize(*given)


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def distill(workdir, teacher, devices, *options):
    command = [sys.executable, LAUNCH / "distill.py", "--workdir", workdir, "--teacher", teacher, "--data.n-per-class", "5"]
    command += ["--method.name", "kd", "--model.width", "4", "--train.steps", "3", "--train.batch-size", "20", "--train.log-every", "1"]
    command += ["--optimizer.name", "sgd", *options]
    return subprocess.Popen([str(word) for word in command], env=environment(devices), stderr=subprocess.PIPE, text=True)


def test_two_processes_train_as_one_with_two_devices(teacher_run, tmp_path):
    """Slow: three processes are started, each of which compiles a run."""
    teacher, address = teacher_run[0], f"127.0.0.1:{free_port()}"
    together = [
        distill(tmp_path / "two", teacher, 1, "--coordinator", address, "--processes", 2, "--process-id", index) for index in (0, 1)
    ]
    try:
        for process in together:
            _, errors = process.communicate(timeout=500)
            assert process.returncode == 0, errors[-3000:]
        alone = distill(tmp_path / "one", teacher, 2)
        together.append(alone)
        _, errors = alone.communicate(timeout=300)
        assert alone.returncode == 0, errors[-3000:]
    finally:
        for process in together:
            process.kill()
    two, one = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert two["device_count"] == one["device_count"] == 2
    assert two["evaluation"]["count"] == 540
    assert two["evaluation"]["confusion"] == one["evaluation"]["confusion"]
    left, right = (read_trained(tmp_path / name) for name in ("two", "one"))
    assert left.hash == two["parameter_hash"] and left.step == right.step == 3
    for a, b in zip(jax.tree.leaves(left.variables), jax.tree.leaves(right.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("two", "one")]
    assert len(lines[0]) == len(lines[1]) == 3, "one process writes, and writes every step once"
    for a, b in zip(*lines, strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b), rel=1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])
