"""Whether a teacher is recorded: a matter of counted passes and bytes, decided from the config and the data alone."""

import jax
import pytest
from conftest import tiny

from wdkd.config import ModelConfig
from wdkd.errors import UsageError
from wdkd.methods import Reads, create_stages, stage_ends
from wdkd.models import create_model, initialize
from wdkd.teacher import Teacher, inference
from wdkd.teacher_cache import choose, contents


@pytest.fixture(scope="module")
def teacher():
    model = create_model(ModelConfig("cnn", 4, "group"), classes=10, mean=[0.5] * 3, std=[0.25] * 3)
    return Teacher(inference(model), initialize(model, jax.random.key(0), (32, 32, 3)), 10, (32, 32, 3), "teacher", "hash", None)


def chosen(teacher, images=500, **edits):
    config = tiny(train__batch_size=100, **edits).check()
    stages = create_stages(config.method)
    ends = stage_ends(stages, config.train.steps)
    return choose(config, stages, tuple(b - a for a, b in zip((0, *ends), ends, strict=False)), images, teacher)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("views", [1, 8])
def test_a_record_takes_hardly_more_than_its_jacobians(teacher, views, precision):
    size = contents(Reads(jacobian=True), 500 * views, teacher, precision).size
    jacobians = 10 * 32 * 32 * 3 * {"float32": 4, "bfloat16": 2}[precision] * 500 * views
    assert jacobians < size <= 1.1 * jacobians
    assert size - jacobians == 500 * views * 10 * 4, "beside them, only the logits"


def test_hidden_features_are_counted_in_the_shapes_that_the_network_has(teacher):
    held = contents(Reads(hidden=("stage1", "stage3")), 7, teacher, "float32")
    assert held.shapes == {"logits": (10,), "hidden-stage1": (16, 16, 4), "hidden-stage3": (4, 4, 16)}
    assert held.size == 7 * 4 * (10 + 16 * 16 * 4 + 4 * 4 * 16)


@pytest.mark.parametrize(
    ("edits", "cost", "saved"),
    [
        # 500 views: 1 pass each for the logits, 10 more for the Jacobian; a batch of 100 saves 1 pass an image, or 3.
        ({"method__name": "kd"}, 500, 100),
        ({"method__name": "wdkd"}, 5500, 300),
        ({"method__name": "wdkd", "method__through_teacher": False}, 500, 100),
        ({"method__name": "wdkd", "method__epsilon": 0.0}, 500, 100),
        ({"method__name": "sobolev"}, 5500, 200),
        ({"method__name": "sobolev", "method__epsilon": 0.1}, 5500, 300),
        ({"method__name": "fitnet", "method__pretrain_fraction": 0.5}, 500, 100),
        # Half of the steps read hidden features alone, half the Jacobian too.
        ({"method__name": "ab", "method__pretrain_fraction": 0.5, "method__epsilon": 0.1}, 5500, 200),
        ({"method__name": "kd", "augment__name": "matching", "augment__views": 3}, 1500, 100),
    ],
)
def test_recording_is_chosen_from_the_step_on_which_it_pays(teacher, edits, cost, saved):
    """`saved` is for each step."""
    steps = cost // saved + (cost // saved) % 2
    for count, pays in ((steps - 2, False), (steps, cost < steps * saved), (steps + 2, True)):
        choice = chosen(teacher, train__steps=count, **edits)
        assert (choice.reads is not None) == pays, choice
        assert f"takes {cost:,} passes of the teacher and saves {saved * count:,} in {count:,} steps" in choice.why
        assert chosen(teacher, train__steps=count, cache__mode="on", **edits).reads is not None


def test_what_does_not_fit_the_budget_runs_live_or_is_refused(teacher):
    edits = {"method__name": "wdkd", "train__steps": 1000, "cache__budget": 58}
    why = "500 views need 58.6 MiB, over the budget of 58 MiB"
    assert chosen(teacher, **edits).reads is None and why in chosen(teacher, **edits).why
    with pytest.raises(
        UsageError, match=f"cache.mode is on, but {why}; raise --cache.budget, use --cache.precision bfloat16 or fewer views"
    ):
        chosen(teacher, cache__mode="on", **edits)
    assert chosen(teacher, **edits | {"cache__budget": 59}).reads is not None
    assert chosen(teacher, cache__precision="bfloat16", **edits).reads is not None
    assert chosen(teacher, **edits | {"method__name": "kd"}).reads == Reads()


def test_fresh_views_cannot_be_recorded(teacher):
    edits = {"method__name": "kd", "augment__name": "flip_crop", "train__steps": 1000}
    assert "augmentation 'flip_crop' draws a fresh view at every visit" in chosen(teacher, **edits).why
    with pytest.raises(UsageError, match="fix some with --augment.views K"):
        chosen(teacher, cache__mode="on", **edits)


def test_a_stage_that_needs_the_hints_derivative_runs_live_and_the_other_from_the_record(teacher):
    edits = {"method__name": "fitnet", "method__pretrain_fraction": 0.5, "method__pretrain_epsilon": 0.1, "train__steps": 1000}
    choice = chosen(teacher, **edits)
    assert choice.reads == Reads() and "saves 50,000 in" in choice.why
    assert chosen(teacher, **edits | {"method__through_teacher": False}).reads == Reads(hidden=("stage2",))


def test_what_the_teacher_says_at_boundary_views_cannot_be_recorded(teacher):
    edits = {"method__name": "kd", "method__boundary_radius": 0.1, "train__steps": 1000}
    assert chosen(teacher, **edits).reads is None
    with pytest.raises(UsageError, match="the objective needs more of the teacher than can be recorded; use --cache.mode off"):
        chosen(teacher, cache__mode="on", **edits)
    # A first stage has no such views.
    assert chosen(teacher, **edits | {"method__name": "fitnet"}).reads == Reads(hidden=("stage2",))


def test_off_is_off_and_labels_need_no_record(teacher):
    assert chosen(teacher, method__name="wdkd", train__steps=1000, cache__mode="off").reads is None
    for mode in ("auto", "on"):
        choice = chosen(teacher, method__name="ce", train__steps=1000, cache__mode=mode)
        assert choice.reads is None and not choice.why
