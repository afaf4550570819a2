"""What is saved comes back bit for bit, and what cannot come back is refused in one line."""

import hashlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wdkd.checkpoint import KEEP, Checkpoints, read_network, tree_hash
from wdkd.config import OptimizerConfig
from wdkd.errors import UsageError
from wdkd.state import create_optimizer, create_state


def make_state(averaged, seed=0, width=3, name="adamw"):
    """A TrainState with every leaf different from 0, as after some steps: params of two modules and statistics of one."""
    draw = np.random.default_rng(seed)

    def dense(n):
        return {"kernel": draw.normal(size=(2, n)).astype(np.float32), "bias": draw.normal(size=n).astype(np.float32)}

    variables = {
        "student": {"params": {"a": dense(width), "b": dense(4)}, "batch_stats": {"a": {"mean": draw.normal(size=4).astype(np.float32)}}},
        "connectors": {"params": {"c": dense(2)}},
    }
    optimizer = create_optimizer(OptimizerConfig(name=name), steps=10)
    state = create_state(jax.tree.map(jnp.asarray, variables), optimizer, step=7, averaged=averaged)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(draw.integers(1, 9, leaf.shape), leaf.dtype), state)


def save(directory, *steps, state=None):
    """Checkpoints of one state at the steps given; returns it."""
    state = make_state(averaged=False) if state is None else state
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, network=state.evaluated, state=state)
    return state


def bits(tree):
    """[(path, dtype, shape, bytes)] of the leaves, in the tree's own order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in leaves]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_state_comes_back_bit_for_bit(tmp_path, averaged, name):
    state = make_state(averaged, name=name)
    extreme = np.array([[np.nan, np.inf, -0.0], [1e-45, np.finfo(np.float32).max, 1 / 3]], np.float32)
    state.variables["student"]["params"]["a"]["kernel"] = jnp.asarray(extreme)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(7, network=state.evaluated, state=state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(7, "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert (restored.average is None) is not averaged
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("int32"), np.dtype("float32")}
    assert bits(restored) == bits(state)
    step, network = read_network(tmp_path / "c", state.evaluated)
    assert step == 7 and bits(network) == bits(state.average if averaged else state.variables["student"])


def test_what_is_saved_does_not_change_with_the_arrays_it_was_saved_from(tmp_path):
    """The next step writes over a donated state while the save is still in the background."""
    state = jax.tree.map(np.array, make_state(averaged=True))
    expected = bits(state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, network=state.evaluated, state=state)
        for leaf in jax.tree.leaves(state):
            leaf[...] = 0
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert bits(checkpoints.restore(1, "state", state)) == expected


def test_the_newest_two_are_kept(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
    save(tmp_path / "c", 2, 4, 30)
    save(tmp_path / "c", 100)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["100", "30"]
    assert KEEP == 2
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 100


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    first = save(tmp_path / "c", 5)
    save(tmp_path / "c", 5, state=make_state(averaged=False, seed=1))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert bits(checkpoints.restore(5, "state", first)) == bits(first)


def refused(directory, like, step=5, item="state"):
    """The text of the UsageError that restoring ends in."""
    with Checkpoints(directory) as checkpoints, pytest.raises(UsageError) as caught:
        checkpoints.restore(step, item, like)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    assert str(directory / str(step)) in text and "delete that step" in text
    return text


@pytest.mark.parametrize(
    "other",
    [
        make_state(averaged=False, width=4),
        make_state(averaged=True),
        make_state(averaged=False, name="sgd"),
        make_state(averaged=False).replace(variables={"student": make_state(averaged=False).variables["student"]}),
    ],
    ids=["shape", "average", "optimizer", "connectors"],
)
def test_another_state_is_refused_in_one_line(tmp_path, other):
    save(tmp_path / "c", 5)
    assert "does not hold the state of this run" in refused(tmp_path / "c", other)


def test_a_step_that_is_not_there_is_refused(tmp_path):
    state = save(tmp_path / "c", 5)
    refused(tmp_path / "c", state, step=6)


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path, part):
    """Changes one bit in the file, at the given part of its length."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * part)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["no item", "no data", "half the data", "no metadata"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    state = save(tmp_path / "c", 5)
    item = tmp_path / "c" / "5" / "state"
    if damage == "no item":
        shutil.rmtree(item)
    elif damage == "no data":
        for folder in item.rglob("d"):
            shutil.rmtree(folder, ignore_errors=True)
    elif damage == "half the data":
        for path in item.rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        (item / "_METADATA").unlink()
    refused(tmp_path / "c", state)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_flipped_bit_never_goes_unnoticed(tmp_path, part):
    """orbax alone would restore wrong numbers."""
    draw = np.random.default_rng(0)
    network = {"params": {"kernel": draw.normal(size=(64, 64)).astype(np.float32)}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, network=network, state=network)
    flip_a_bit(largest_file(tmp_path / "c" / "5" / "network"), part)
    refused(tmp_path / "c", network, item="network")


def test_a_step_killed_while_it_was_written_is_passed_over(tmp_path):
    state = save(tmp_path / "c", 5, 6)
    (tmp_path / "c" / "6").rename(tmp_path / "c" / "6.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 5
        assert bits(checkpoints.restore(5, "state", state)) == bits(state)


def test_reading_a_network_from_nothing_is_refused(tmp_path):
    state = make_state(averaged=False)
    with pytest.raises(UsageError, match="missing is not a directory of checkpoints; give the directory of a run that has saved one"):
        read_network(tmp_path / "missing", state.evaluated)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty holds no complete checkpoint; let the run reach its first one"):
        read_network(tmp_path / "empty", state.evaluated)
    assert list((tmp_path / "empty").iterdir()) == []


TREE = {"b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.array([1, 2], np.int32)}


def test_tree_hash_is_what_it_says():
    a, b = TREE["a"], TREE["b"]["kernel"]
    words = b"['a'] <i4 (2,)\n" + a.tobytes() + b"['b']['kernel'] <f4 (2, 3)\n" + b.tobytes()
    assert tree_hash(TREE) == hashlib.sha256(words).hexdigest()


def test_tree_hash_does_not_depend_on_order_or_kind_of_array():
    again = {"a": jnp.array([1, 2], jnp.int32), "b": {"kernel": np.asfortranarray(TREE["b"]["kernel"])}}
    assert tree_hash(again) == tree_hash(TREE)


def test_tree_hash_sees_every_single_bit():
    seen = {tree_hash(TREE)}
    for position in range(8 * TREE["b"]["kernel"].nbytes):
        content = bytearray(TREE["b"]["kernel"].tobytes())
        content[position // 8] ^= 1 << position % 8
        seen.add(tree_hash(TREE | {"b": {"kernel": np.frombuffer(content, np.float32).reshape(2, 3)}}))
    assert len(seen) == 1 + 8 * 24


@pytest.mark.parametrize(
    "other",
    [
        TREE | {"b": {"bias": TREE["b"]["kernel"]}},
        TREE | {"b": {"kernel": TREE["b"]["kernel"].reshape(3, 2)}},
        TREE | {"a": TREE["a"].view(np.uint32)},
        TREE | {"a": TREE["a"].view(np.float32)},
        TREE | {"c": np.zeros(0, np.float32)},
        {"b": TREE["b"]},
        {"b": TREE["a"], "a": TREE["b"]["kernel"]},
    ],
    ids=["name", "shape", "sign", "type", "empty leaf", "missing leaf", "exchanged"],
)
def test_tree_hash_sees_names_shapes_and_types(other):
    assert tree_hash(other) != tree_hash(TREE)
