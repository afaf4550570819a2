"""A recorded teacher is the live one: in every gradient, and never that of another teacher, subset or set of views."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import files, method_config, tiny

from wdkd.augment import create_augmentation
from wdkd.batches import fixed_partners
from wdkd.data import few_shot_split, load_dataset
from wdkd.input_gradients import value_and_input_gradient, worst_case
from wdkd.losses import kl_divergence, logit_distance, logit_mse
from wdkd.methods import Reads, create_stages
from wdkd.recording import record_teacher
from wdkd.run_directory import describe_run, read_teacher, read_trained
from wdkd.steps import Data, Draw, make_batch
from wdkd.teacher import Record, recorded
from wdkd.train import measure_input, run
from wdkd.trainer import AUGMENTATION, Trainer

EVERYTHING = Reads(jacobian=True, hidden=("stage1", "stage3"))
KEY = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(0), AUGMENTATION)))


@pytest.fixture(scope="module")
def teacher(teacher_run):
    return read_teacher(teacher_run[0])


def config_of(**edits):
    return tiny(data__n_per_class=5, **edits).check()


def split_of(config):
    return few_shot_split(load_dataset(config.data), config.data, config.seed)


def record(config, teacher, folder, reads=EVERYTHING, show=False):
    return record_teacher(config, reads, teacher, split_of(config), KEY, folder, show=show)


@pytest.fixture(scope="module")
def kept(teacher, tmp_path_factory):
    """(config, record, the record's own folder) of two fixed views of 50 images, blended with one another."""
    config, folder = config_of(augment__name="matching", augment__views=2), tmp_path_factory.mktemp("kept")
    found = record(config, teacher, folder)
    (own,) = folder.iterdir()
    return config, found, own


def batch_of(config, rows):
    """The batch of the views `rows`, as a training step makes it."""
    split, views = split_of(config), config.augment.finite_views
    rows = np.asarray(rows, np.int32)
    partner = fixed_partners(len(split.train_labels), views, config.seed).reshape(-1)[rows]
    draw = Draw(rows // views, partner, np.arange(len(rows), dtype=np.int32), rows % views)
    data, augmentation = Data(split.train_images, split.train_labels), create_augmentation(config.augment, split.image_shape)
    return jax.jit(lambda step: make_batch(data, draw, jax.random.wrap_key_data(KEY), step, augmentation, 10, views))


# --- what is recorded ---------------------------------------------------------------------------------------------------


def test_every_view_has_the_teachers_logits_features_and_jacobian(kept, teacher):
    """The Jacobian by forward mode, view by view."""
    config, found, _ = kept
    rows = [0, 1, 2, 37, 98, 99]
    x = batch_of(config, rows)(0).x
    outputs = jax.jit(teacher.apply)(teacher.variables, x)
    np.testing.assert_allclose(found.logits[rows], outputs.logits, rtol=1e-5, atol=1e-5)
    for stage in ("stage1", "stage3"):
        np.testing.assert_allclose(found.hidden[stage][rows], outputs.hidden[stage], rtol=1e-4, atol=1e-5)
    one = jax.jit(jax.jacfwd(lambda image: teacher.apply(teacher.variables, image[None]).logits[0]))
    expected = np.stack([one(image) for image in x])
    assert found.jacobian.shape == (100, 10, 8, 8, 1)
    np.testing.assert_allclose(found.jacobian[rows], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_fixed_view_is_the_same_at_every_step_and_place_and_others_differ(kept):
    config = kept[0]
    first, later = batch_of(config, [7, 6, 40])(0), batch_of(config, [40, 7, 6])(123)
    np.testing.assert_array_equal(np.asarray(first.x)[[2, 0, 1]], later.x)
    np.testing.assert_array_equal(np.asarray(first.labels)[[2, 0, 1]], later.labels)
    np.testing.assert_array_equal(np.asarray(first.rows)[[2, 0, 1]], later.rows)
    assert np.abs(first.x[0] - first.x[1]).max() > 0.1, "two views of one image"
    keys = [np.asarray(jax.random.key_data(batch.keys)) for batch in (first, later)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 6, "what is not a view is drawn anew"


@pytest.mark.parametrize(
    ("name", "loss"), [("kl", lambda s, t: kl_divergence(s, t, 4.0)), ("mse", logit_mse), ("distance", logit_distance)]
)
@pytest.mark.parametrize(("ground_norm", "aggregate"), [(2, "mean"), (1, "rms"), (np.inf, "max")])
def test_the_exact_objective_and_its_parameter_gradient_from_the_record(kept, teacher, name, loss, ground_norm, aggregate):
    config, found, _ = kept
    rows = np.array([3, 50, 77, 98], np.int32)
    x = batch_of(config, rows)(0).x
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32) * 0.3

    def objective(weights, at):
        def student(x):
            return jnp.tanh(x.reshape(len(x), -1) @ weights) * 3

        return worst_case(lambda x: loss(student(x), at(x).logits), x, 0.5, ground_norm, aggregate)[0]

    live, cached = (
        jax.jit(jax.value_and_grad(lambda w, at=at: objective(w, at)))(weights)
        for at in (lambda x: teacher.apply(teacher.variables, x), recorded(found, rows))
    )
    np.testing.assert_allclose(cached[0], live[0], rtol=1e-5)
    assert np.linalg.norm(cached[1] - live[1]) <= 2e-5 * np.linalg.norm(live[1])
    constant = jax.grad(lambda w: objective(w, recorded(dataclasses.replace(found, jacobian=None), rows)))(weights)
    assert np.linalg.norm(constant - live[1]) > 1e-2 * np.linalg.norm(live[1]), "the Jacobian matters"


def test_bfloat16_halves_the_jacobian_and_rounds_it(kept, teacher, tmp_path):
    config, full, _ = kept
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, precision="bfloat16"))
    half = record(config, teacher, tmp_path)
    again = record(config, teacher, tmp_path)
    assert half.jacobian.nbytes * 2 == full.jacobian.nbytes and half.logits.dtype == np.float32
    np.testing.assert_array_equal(half.jacobian.view(np.uint16), again.jacobian.view(np.uint16))
    np.testing.assert_allclose(half.jacobian.astype(np.float32), full.jacobian, rtol=2**-8, atol=1e-6)
    x, rows, v = np.zeros((3, 8, 8, 1), np.float32), np.array([0, 5, 9]), np.arange(10, dtype=np.float32)
    for one in (half, full):
        _, gradient = value_and_input_gradient(lambda x, one=one: recorded(one, rows)(x).logits @ v, x)
        expected = np.einsum("vchwk,c->vhwk", one.jacobian[rows].astype(np.float64), v)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_a_record_is_differentiable_along_any_path(kept):
    """Value, input gradient, and the gradient of that: against finite differences, for a function that is not linear in the logits."""
    _, found, _ = kept
    rows = np.array([0, 5])
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 1)))
    at = recorded(Record(found.logits, found.jacobian, {}), rows)

    def gradient_energy(scale):
        _, gradient = value_and_input_gradient(lambda x: (jnp.tanh(scale * at(x).logits / 5)).sum(-1), x)
        return jnp.square(gradient).sum()

    step = 1e-2
    slope = (gradient_energy(1 + step) - gradient_energy(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(gradient_energy)(1.0), slope, rtol=2e-3)


# --- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "edits"),
    [
        ("kd", {"augment__views": 2}),
        # The features of its one hint are among those of ab.
        ("ab", {"method__pretrain_epsilon": 0.05, "method__connector_norm": "group"}),
        ("sobolev", {}),
    ],
)
def test_a_run_from_the_record_is_the_run_with_the_live_teacher(name, edits, teacher_run, finished_run, tmp_path):
    if edits:
        live = tmp_path / "off"
        result = run(method_config(name, teacher_run[0], cache__mode="off", **edits), live, show_progress=False)
    else:
        live, result = finished_run(name)
    cached = run(method_config(name, teacher_run[0], cache__mode="on", **edits), tmp_path / "on", show_progress=False)
    assert (result.teacher_cached, cached.teacher_cached) == (False, True)
    assert len(list((tmp_path / "teacher-cache").iterdir())) == 1
    live, cached = (read_trained(directory).variables for directory in (live, tmp_path / "on"))
    for a, b in zip(jax.tree.leaves(live), jax.tree.leaves(cached), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-6


# --- its files ----------------------------------------------------------------------------------------------------------


def test_an_equal_record_is_read_back_and_not_made_again(kept, teacher, monkeypatch):
    config, found, own = kept
    monkeypatch.setattr("wdkd.recording.compute", lambda *args, **options: pytest.fail("computed again"))
    again = record(config, teacher, own.parent)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again))


def test_another_teacher_subset_seed_set_of_views_or_precision_is_another_record(kept, teacher, tmp_path):
    config, _, own = kept
    folder = tmp_path / "kept"
    shutil.copytree(own.parent, folder)
    before = files(folder)
    bias = teacher.variables["params"]["head"]["bias"]
    params = {**teacher.variables["params"], "head": {**teacher.variables["params"]["head"], "bias": bias + 1e-6}}
    given = {**teacher.variables["input"], "mean": teacher.variables["input"]["mean"] + 0.01}
    edits = {"augment__name": "matching", "augment__views": 2}
    others = [
        (config, dataclasses.replace(teacher, variables={**teacher.variables, "params": params}), EVERYTHING),
        (config, dataclasses.replace(teacher, hash="another network with these variables"), EVERYTHING),
        (config, dataclasses.replace(teacher, variables={**teacher.variables, "input": given}), EVERYTHING),
        (config_of(**edits, seed=1), teacher, EVERYTHING),
        (config_of(**edits | {"augment__views": 1}), teacher, EVERYTHING),
        (config_of(**edits, augment__padding=0), teacher, EVERYTHING),
        (config_of(**edits, cache__precision="bfloat16"), teacher, EVERYTHING),
        (config_of(**edits), teacher, Reads()),
    ]
    for number, (other, taught, reads) in enumerate(others, start=2):
        record(other, taught, folder, reads)
        assert len(list(folder.iterdir())) == number
    assert before.items() <= files(folder).items(), "and what was there is as it was"
    record(config_of(**edits, train__steps=9, method__epsilon=0.3), teacher, folder)
    assert len(list(folder.iterdir())) == len(others) + 1, "what does not change the record finds it"


def _swap(path, make):
    path.unlink()
    make(path)


def _move_away(folder):
    """A link to the folder, with something missing, in its place."""
    elsewhere = folder.parents[1] / f"elsewhere-{folder.name}"
    shutil.copytree(folder, elsewhere)
    (elsewhere / "logits.npy").unlink()
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)


DAMAGE = {
    "a pipe": lambda f: _swap(f / "logits.npy", os.mkfifo),
    "a pipe for a description": lambda f: _swap(f / "description.json", os.mkfifo),
    "a device": lambda f: _swap(f / "jacobian.npy", lambda path: path.symlink_to("/dev/zero")),
    "a folder": lambda f: _swap(f / "logits.npy", lambda path: (path / "full").mkdir(parents=True)),
    "a link to itself": lambda f: _swap(f / "logits.npy", lambda path: path.symlink_to(path.name)),
    "a link to another folder": _move_away,
    "a broken link": lambda f: (shutil.rmtree(f), f.symlink_to("nowhere")),
    "a huge file": lambda f: os.truncate(f / "logits.npy", 2**40),
    "a huge description": lambda f: os.truncate(f / "description.json", 2**40),
    "a deep description": lambda f: (f / "description.json").write_text("[" * 10**5),
    "a description without digests": lambda f: _edit(f / "description.json", lambda b: b.replace(b'"sha256"', b'"sha512"')),
    "objects": lambda f: _edit(f / "logits.npy", lambda b: b.replace(b"<f4", b"|O4")),
    "a flipped bit": lambda f: _edit(f / "jacobian.npy", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
    "a flipped bit in the logits": lambda f: _edit(f / "logits.npy", lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]),
    "a truncated file": lambda f: _edit(f / "jacobian.npy", lambda b: b[:-100]),
    "random bytes": lambda f: (f / "hidden-stage1.npy").write_bytes(np.random.default_rng(0).bytes(5000)),
    "a pickle": lambda f: np.save(f / "logits.npy", np.array([{"a": 1}], object), allow_pickle=True),
    "an absurd shape": lambda f: _edit(f / "logits.npy", lambda b: b.replace(b"(100, 10)", b"(10**15,)")),
    "a missing file": lambda f: (f / "hidden-stage3.npy").unlink(),
    "no description": lambda f: (f / "description.json").unlink(),
    "a description that is not JSON": lambda f: (f / "description.json").write_text("{"),
    "a description of another type": lambda f: (f / "description.json").write_text("[1]"),
    "stale": lambda f: _edit(f / "description.json", lambda b: b.replace(b'"teacher": ["', b'"teacher": ["0')),
}


def _edit(path, change):
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_stale_record_is_made_again_with_a_word(damage, kept, teacher, tmp_path, capsys):
    config, found, own = kept
    copy = tmp_path / own.name
    shutil.copytree(own, copy)
    DAMAGE[damage](copy)
    again = record(config, teacher, tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"note: the teacher cache {copy} is damaged or stale (") and len(said) == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again))
    assert files(copy) == files(own), "and kept again"
    assert record(config, teacher, tmp_path) and not capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_done_without(kept, teacher, tmp_path, capsys):
    config, found, own = kept
    (tmp_path / own.name).write_text("in the way")
    for folder in (tmp_path, tmp_path / own.name):
        again = record(config, teacher, folder)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, again))
        assert "it is made in memory, for this run alone" in capsys.readouterr().err
        assert files(tmp_path) == {own.name: b"in the way"}


def test_a_full_disk_does_without_the_cache(kept, teacher, tmp_path, capsys, monkeypatch):
    config, found, _ = kept

    def full(shape, dtype):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wdkd.recording.header", full)
    again = record(config, teacher, tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again)) and not files(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and "it is made in memory, for this run alone" in line


def test_stages_share_one_copy_on_the_devices(teacher, tmp_path):
    config = method_config("fitnet", "runs/teacher", data__n_per_class=5, cache__mode="on")
    split = split_of(config)
    trainer = Trainer(describe_run(config, measure_input(split)), split, teacher, create_stages(config.method))
    trainer.record(tmp_path, show=False)
    assert trainer.what_is_known(0) is trainer.what_is_known(1)
    assert isinstance(trainer.what_is_known(1), Record)


def test_methods_that_share_a_subset_share_the_record(teacher_run, tmp_path):
    """The order of the methods does not matter either: each finds what it reads."""
    for name in ("wdkd", "sobolev"):
        config = method_config(name, teacher_run[0], cache__mode="on", augment__name="none", method__epsilon=0.1)
        run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)), tmp_path / name, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
