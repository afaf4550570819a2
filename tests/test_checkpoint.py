"""What is saved comes back bit for bit, and what cannot come back is refused in one line."""

import hashlib
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from wdkd.checkpoint import KEEP, Checkpoints, Damaged, newest, read_network, restore, saved_steps, set_aside, tree_hash, verified
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
        "connectors": {"params": {"c": {"kernel": draw.normal(size=(1, 1, 2, 2)).astype(np.float32)}}},
    }
    optimizer = create_optimizer(OptimizerConfig(name=name), steps=10)
    state = create_state(jax.tree.map(jnp.asarray, variables), optimizer, step=7, averaged=averaged)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(draw.integers(1, 9, leaf.shape), leaf.dtype), state)


def save(directory, *steps, state=None, facts=None):
    """Checkpoints of one state at the steps given; returns it."""
    state = make_state(averaged=False) if state is None else state
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, network=state.evaluated, state=state, facts=facts or {})
    return state


def bits(tree):
    """[(path, dtype, shape, bytes)] of the leaves, in the tree's own order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in leaves]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_state_comes_back_bit_for_bit(tmp_path, averaged, name):
    state = make_state(averaged, name=name)
    extreme = np.array([[np.nan, np.inf, -0.0], [1e-45, np.finfo(np.float32).max, 1 / 3]], np.float32)
    state.variables["student"]["params"]["a"]["kernel"] = jnp.asarray(extreme)
    save(tmp_path / "c", 7, state=state, facts={"stage": 1, "words": ["a", None]})
    restored, facts = restore(tmp_path / "c" / "7", "state", jax.eval_shape(lambda: state))
    assert facts == {"stage": 1, "words": ["a", None]}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert (restored.average is None) is not averaged
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("int32"), np.dtype("float32")}
    assert bits(restored) == bits(state)
    step, network, _ = read_network(tmp_path / "c", state.evaluated)
    assert step == 7 and bits(network) == bits(state.average if averaged else state.variables["student"])


def test_what_is_saved_does_not_change_with_the_arrays_it_was_saved_from(tmp_path):
    """The next step writes over a donated state while the save is still in the background."""
    state = jax.tree.map(np.array, make_state(averaged=True))
    expected = bits(state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, network=state.evaluated, state=state, facts={})
        for leaf in jax.tree.leaves(state):
            leaf[...] = 0
    assert bits(restore(tmp_path / "c" / "1", "state", state)[0]) == expected


def test_the_newest_two_are_kept(tmp_path):
    assert saved_steps(tmp_path / "c") == []
    save(tmp_path / "c", 2, 4, 30)
    save(tmp_path / "c", 100)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["100", "30"]
    assert KEEP == 2 and saved_steps(tmp_path / "c") == [100, 30]


def test_the_best_of_the_last_stage_is_kept_too(tmp_path):
    """Also by a process that comes later, which reads what the steps on the disk were worth."""
    state, objectives = (
        make_state(averaged=False),
        {1: (0, 0.1), 2: (1, 3.0), 3: (1, 2.0), 4: (1, 5.0), 5: (1, 2.5), 6: (1, None), 7: (1, 4.0)},
    )
    kept = []
    for step, (stage, objective) in objectives.items():
        save(tmp_path / "c", step, state=state, facts={"stage": stage, "objective": objective})
        kept.append(saved_steps(tmp_path / "c"))
    assert kept == [[1], [2, 1], [3, 2], [4, 3], [5, 4, 3], [6, 5, 3], [7, 6, 3]]


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    first = save(tmp_path / "c", 5)
    save(tmp_path / "c", 5, state=make_state(averaged=False, seed=1))
    assert bits(restore(tmp_path / "c" / "5", "state", first)[0]) == bits(first)


def refused(directory, like, step=5, item="state"):
    """Why restoring is refused."""
    with pytest.raises(Damaged) as caught:
        restore(directory / str(step), item, like)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
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
    text = refused(tmp_path / "c", other)
    assert "of another run or version" in text or "has type float32 and shape (3,), not float32 and (4,)" in text


def test_another_type_is_refused_where_orbax_would_cast(tmp_path):
    state = save(tmp_path / "c", 5)
    assert "has type int32 and shape (), not int64 and ()" in refused(tmp_path / "c", state.replace(step=np.int64(7)))


def test_a_step_that_is_not_there_is_refused(tmp_path):
    state = save(tmp_path / "c", 5)
    assert refused(tmp_path / "c", state, step=6) == "its digest is missing or cannot be read"


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path, part):
    """Changes one bit in the file, at the given part of its length."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * part)] ^= 1
    path.write_bytes(content)


def cut(path):
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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
            cut(path)
    else:
        (item / "_METADATA").unlink()
    refused(tmp_path / "c", state)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_flipped_bit_never_goes_unnoticed(tmp_path, part):
    """orbax alone would restore wrong numbers."""
    draw = np.random.default_rng(0)
    network = {"params": {"kernel": draw.normal(size=(64, 64)).astype(np.float32)}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, network=network, state=network, facts={})
    flip_a_bit(largest_file(tmp_path / "c" / "5" / "network"), part)
    refused(tmp_path / "c", network, item="network")


def test_the_newest_step_that_verifies_is_found_and_the_others_are_named(tmp_path):
    state = save(tmp_path / "c", 4, 5)
    save(tmp_path / "c", 6, state=make_state(averaged=False, seed=1), facts={"stage": 0, "objective": 0.0})
    assert newest(tmp_path / "c", "state", lambda step: state)[1] == {}
    cut(largest_file(tmp_path / "c" / "6" / "state"))
    (step, tree, facts), passed_over = newest(tmp_path / "c", "state", lambda step: state)
    assert step == 5 and bits(tree) == bits(state) and facts == {}
    assert list(passed_over) == [6] and f"checkpoint {tmp_path / 'c' / '6'} is passed over: " in passed_over[6]
    shutil.rmtree(tmp_path / "c" / "5" / "digest")
    found, passed_over = newest(tmp_path / "c", "state", lambda step: state)
    assert found is None and list(passed_over) == [6, 5]


def test_a_step_under_another_number_is_passed_over(tmp_path):
    state = save(tmp_path / "c", 4, 5)
    (tmp_path / "c" / "5").rename(tmp_path / "c" / "9")
    (step, *_), passed_over = newest(tmp_path / "c", "state", lambda step: state)
    assert step == 4 and passed_over[9].endswith("9 is passed over: it is of step 5")


def test_a_step_set_aside_makes_room_and_is_kept(tmp_path):
    state = save(tmp_path / "c", 5, 6)
    cut(largest_file(tmp_path / "c" / "6" / "state"))
    damaged = (tmp_path / "c" / "6" / "digest" / "metadata").read_bytes()
    for _ in range(2):
        set_aside(tmp_path / "c", 6)
        assert saved_steps(tmp_path / "c") == [5]
        assert (tmp_path / "damaged" / "6" / "digest" / "metadata").read_bytes() == damaged
        save(tmp_path / "c", 6)
    assert bits(restore(tmp_path / "c" / "6", "state", state)[0]) == bits(state)


def test_a_step_killed_while_it_was_written_is_passed_over_and_removed(tmp_path):
    state = save(tmp_path / "c", 5, 6)
    (tmp_path / "c" / "6").rename(tmp_path / "c" / "6.orbax-checkpoint-tmp")
    assert saved_steps(tmp_path / "c") == [5]
    assert bits(newest(tmp_path / "c", "state", lambda step: state)[0][1]) == bits(state)
    save(tmp_path / "c", 7)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["5", "7"]


def test_a_network_is_read_from_the_newest_step_that_verifies(tmp_path):
    state = save(tmp_path / "c", 5, 6)
    assert read_network(tmp_path / "c", state.evaluated)[0] == 6
    cut(largest_file(tmp_path / "c" / "6" / "network"))
    step, network, (reason,) = read_network(tmp_path / "c", state.evaluated)
    assert step == 5 and bits(network) == bits(state.evaluated)
    assert reason.startswith(f"checkpoint {tmp_path / 'c' / '6'} is passed over: ")
    cut(largest_file(tmp_path / "c" / "5" / "network"))
    with pytest.raises(UsageError, match=r"no checkpoint verifies; restore one from a copy, or train again: .*/6 is passed over: "):
        read_network(tmp_path / "c", state.evaluated)


# --- crafted ------------------------------------------------------------------------------------------------------------


def crafted(directory, array, digest=True):
    """A step whose state is one array of that kind, with a digest that agrees; as someone would write it who knows how."""
    state = {"a": array}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, network=state, state=state, facts={})
    return directory / "5"


def test_absurd_shapes_are_refused_before_there_is_an_array(tmp_path):
    """A terabyte of zeros takes a few bytes on the disk."""
    step = crafted(tmp_path / "c", np.zeros(8, np.float32))
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{step / 'state'}"}, "path": "['a']"}
    metadata = {"shape": [2**38], "chunks": [2**30], "dtype": "<f4", "compressor": None, "fill_value": 0, "order": "C", "filters": None}
    tensorstore.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for expected in ({"['a']": np.zeros(8, np.float32)}, None):
        with pytest.raises(Damaged, match=r"shape \(274877906944,\), not float32 and \(8,\)|arrays have more than"):
            verified(step, "state", 2**20, expected)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB"


def test_chunks_larger_than_their_array_are_refused(tmp_path):
    step = crafted(tmp_path / "c", np.zeros(8, np.float32))
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{step / 'state'}"}, "path": "['a']"}
    metadata = {"shape": [8], "chunks": [2**34], "dtype": "<f4", "compressor": None, "fill_value": 0, "order": "C", "filters": None}
    tensorstore.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()
    with pytest.raises(Damaged, match=r"has chunks of \(17179869184,\), larger than its shape \(8,\)"):
        verified(step, "state", 2**20, {"['a']": np.zeros(8, np.float32)})


def bomb(size):
    """Zeros as zstd packs them, 128 KiB in four bytes (RFC 8878, 3.1.1.2)."""
    blocks = size // 2**17
    headers = [(2**17 << 3 | 1 << 1 | (block == blocks - 1)).to_bytes(3, "little") + b"\0" for block in range(blocks)]
    return b"\x28\xb5\x2f\xfd" + b"\0\x38" + b"".join(headers)


def test_a_chunk_that_unpacks_to_more_than_the_memory_is_refused(tmp_path):
    """Shapes and files are as they should be; tensorstore unpacks no more than the shape says."""
    step = crafted(tmp_path / "c", np.zeros(8, np.float32))
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{step / 'state'}/"}).result()
    keys = [key for key in store.list().result() if not key.endswith(b"/.zarray")]
    store.write(keys[0], bomb(2**36)).result()
    assert sum(path.stat().st_size for path in step.rglob("*") if path.is_file()) < 2**23
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged, match="its state cannot be read"):
        verified(step, "state", 2**20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB"


@pytest.mark.parametrize("kind", ["link", "linked step", "pipe", "a huge file"])
def test_what_is_no_plain_file_is_refused_before_it_is_read(kind, tmp_path):
    array = np.arange(8, dtype=np.float32)
    step = crafted(tmp_path / "c", array)
    data = largest_file(step / "state")
    if kind == "linked step":
        step.rename(tmp_path / "elsewhere")
        step.symlink_to(tmp_path / "elsewhere")
        assert saved_steps(tmp_path / "c") == []
        return
    if kind == "link":
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(step / "state" / "d" / "pipe")
    else:
        with data.open("ab") as file:
            file.truncate(2**40)  # A hole: it takes nothing on the disk.
    with pytest.raises(Damaged, match="is neither a file nor a directory|has files of more than"):
        verified(step, "state", 2**20)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"state": 1}', b'{"facts": 3}', b"[" * 100_000, b"\xff\xfe", b"1" * 10_000])
def test_a_digest_may_be_anything(content, tmp_path):
    state = save(tmp_path / "c", 5)
    (tmp_path / "c" / "5" / "digest" / "metadata").write_bytes(content)
    assert "digest" in refused(tmp_path / "c", state) or "are not those that were saved" in refused(tmp_path / "c", state)
    save(tmp_path / "c", 6)


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
