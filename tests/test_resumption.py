"""A run goes on only where its random numbers are the same, and says where its bits may not be."""

import jax
import numpy as np
import pytest
from test_checkpoint import bits, make_state, save

from wdkd.errors import UsageError
from wdkd.resumption import circumstances, compare, resume


def first(index):
    return make_state(averaged=False, seed=index)


def test_it_goes_on_with_the_stage_of_the_step(tmp_path):
    """The state that is asked for is that of the stage, not of its number in the file's name."""
    state = save(tmp_path / "checkpoints", 3, 5, facts=circumstances())
    asked = []
    step, found = resume(tmp_path / "checkpoints", lambda index: asked.append(index) or first(index), lambda step: step // 3)
    assert step == 5 and bits(found) == bits(state) and set(asked) == {1}
    assert resume(tmp_path / "empty", first, lambda step: 0)[0] == 0
    assert bits(resume(tmp_path / "empty", first, lambda step: 0)[1]) == bits(first(0))


def test_other_random_keys_are_refused_and_not_passed_over(tmp_path):
    save(tmp_path / "checkpoints", 5, facts=circumstances())
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", not before)
    try:
        with pytest.raises(UsageError, match=r"checkpoint .*/5 was made with JAX's random keys \['threefry2x32', .*; set jax_default_prng"):
            resume(tmp_path / "checkpoints", first, lambda step: 0)
    finally:
        jax.config.update("jax_threefry_partitionable", before)
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(("name", "value"), [("jax", "0.0.1"), ("devices", ["TPU v9", 64]), ("cores", 1024)])
def test_what_changes_bits_is_said(name, value, tmp_path, capsys):
    compare(circumstances() | {name: value}, tmp_path / "5")
    said = capsys.readouterr().err
    assert said.startswith(f"note: checkpoint {tmp_path / '5'} was made with {name} {value}, this is ") and said.endswith(
        "later bits may differ\n"
    )
    compare(circumstances(), tmp_path / "5")
    compare({}, tmp_path / "5")
    assert capsys.readouterr().err == "", "nor of a checkpoint that does not say"


@pytest.mark.parametrize("value", [None, 3, "x" * 10**6, ["a\nb", {}], float("nan")])
def test_what_a_checkpoint_says_of_them_may_be_anything(value, tmp_path, capsys):
    compare({"jax": value, "devices": value, "cores": value}, tmp_path / "5")
    said = capsys.readouterr().err
    assert said.count("\n") == 3 and len(said) < 1500
    with pytest.raises(UsageError) as caught:
        compare({"prng": value}, tmp_path / "5")
    assert len(str(caught.value)) < 500


def test_a_state_is_on_no_device_when_it_comes_back(tmp_path):
    save(tmp_path / "checkpoints", 5)
    assert {type(leaf) for leaf in jax.tree.leaves(resume(tmp_path / "checkpoints", first, lambda step: 0)[1])} == {np.ndarray}
