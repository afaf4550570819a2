"""A config survives JSON, names what is wrong with it, and tells two runs apart."""

import dataclasses
import json
import math
import os
import random
import re
import typing
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from conftest import edit

from wdkd.config import DEFAULT_RADIUS, STUDENTS, TEACHERS, Config, DataConfig, MethodConfig, differences, from_dict, to_dict
from wdkd.errors import UsageError
from wdkd.wording import shown

PRESETS = {f"student-{k}": v for k, v in STUDENTS.items()} | {f"teacher-{k}": v for k, v in TEACHERS.items()} | {"default": Config()}


def options(cls=Config, prefix=""):
    """{dotted name: type} of every option."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        found |= options(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


OPTIONS = options()


def get(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def some_value(hint, draw, other_than):
    """A value of the type, other than the one given; not necessarily in range."""
    choices = get_args(hint) if get_origin(hint) not in (None, Literal, tuple) else (hint,)
    made = {
        int: lambda: draw.randrange(-5, 10**9),
        float: lambda: draw.choice([draw.uniform(-1, 9), 10 ** draw.uniform(-30, 30), 0.1 + 0.2, 3.0]),
        str: lambda: "".join(draw.choices("aä/\"\\ \n'{}☃", k=5)),
        bool: lambda: draw.random() < 0.5,
        type(None): lambda: None,
    }

    def make(choice):
        if get_origin(choice) is Literal:
            return draw.choice(get_args(choice))
        if get_origin(choice) is tuple:
            return tuple(make(inner) for inner in get_args(choice) if inner is not Ellipsis)
        return made[choice]()

    while True:
        value = make(draw.choice(choices))
        if value != other_than:
            return value


def through_json(config):
    return from_dict(Config, json.loads(json.dumps(to_dict(config))))


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_preset_is_in_range_and_survives_json(config):
    assert config.check() is config
    assert through_json(config) == config


def test_presets_say_which_data_set_they_are_for():
    assert all(presets[name].data.name == name for presets in (STUDENTS, TEACHERS) for name in presets)
    assert all(config.method.name == "ce" and config.data.n_per_class is None for config in TEACHERS.values())
    assert set(STUDENTS) == set(TEACHERS)


def test_any_values_survive_json_and_are_named_as_differences():
    draw, seen = random.Random(0), set()
    for _ in range(300):
        base = draw.choice(list(PRESETS.values()))
        changed = {path: some_value(OPTIONS[path], draw, get(base, path)) for path in draw.sample(sorted(OPTIONS), draw.randrange(1, 6))}
        config = edit(base, changed)
        restored = through_json(config)
        assert restored == config and hash(restored) == hash(config)
        assert [type(get(restored, path)) for path in OPTIONS] == [type(get(config, path)) for path in OPTIONS]
        pairs = {path: (shown(get(base, path)), shown(value)) for path, value in changed.items()}
        assert sorted(differences(base, config)) == sorted(f"{path}: {before}, {after}" for path, (before, after) in pairs.items())
        assert differences(config, restored) == []
        seen |= set(changed)
    assert seen == set(OPTIONS), "every option was tried"


def test_a_whole_number_in_json_stands_for_a_float():
    values = to_dict(Config())
    values["method"]["temperature"] = 4
    restored = from_dict(Config, values)
    assert restored == Config() and type(restored.method.temperature) is float


def test_differences_of_nan_is_none():
    config = edit(Config(), {"method.temperature": math.nan})
    assert differences(config, through_json(config)) == []


@dataclasses.dataclass(frozen=True)
class Collection:
    numbers: list[float]
    table: list[list[int]]
    names: dict[str, str]
    maybe: list[str] | None


GOOD = {"numbers": [1.5, 2.0], "table": [[1], []], "names": {"a": "b"}, "maybe": None}


def test_what_is_inside_of_lists_and_dictionaries_has_its_type_too():
    assert from_dict(Collection, GOOD | {"numbers": [1, 2.5]}) == Collection([1.0, 2.5], [[1], []], {"a": "b"}, None)
    assert from_dict(Collection, GOOD | {"maybe": ["a"]}).maybe == ["a"]
    for name, value, where in (
        ("numbers", [1.0, "2"], "config.numbers[1] is '2'; it must be float"),
        ("numbers", [True], "config.numbers[0] is True; it must be float"),
        ("numbers", [10**400], "config.numbers[0] is 1000"),
        ("numbers", {"0": 1.0}, "config.numbers is {'0': 1.0}; it must be list"),
        ("table", [[1], [2.0]], "config.table[1][0] is 2.0; it must be int"),
        ("table", [1], "config.table[0] is 1; it must be list"),
        ("table", [[None]], "config.table[0][0] is None; it must be int"),
        ("names", {"a": 1}, "config.names['a'] is 1; it must be str"),
        ("names", {"\n" * 500: 1}, "config.names["),
        ("names", [], "config.names is []; it must be dict"),
        ("maybe", [["a" * 10**6]], "config.maybe[0] is ['aaaa"),
        ("numbers", [1] * 10_001, "config.numbers has 10,001 elements; at most 10,000 are taken"),
        ("names", {str(i): "" for i in range(10_001)}, "config.names has 10,001 elements; at most 10,000 are taken"),
    ):
        with pytest.raises(UsageError) as caught:
            from_dict(Collection, GOOD | {name: value})
        text = str(caught.value)
        assert text.startswith(where) and "\n" not in text and len(text) < 300, text


def test_absurd_names_of_fields_are_told_in_a_line():
    for name in ("x" * 10**6, "a\nb", "\ud800", "\x1b[2J"):
        text = broken(lambda values, name=name: values.update({name: 1}))
        assert text.isprintable() and len(text) < 600


def broken(change):
    """The text of the UsageError that reading the changed default config ends in."""
    values = to_dict(Config())
    change(values)
    with pytest.raises(UsageError) as caught:
        from_dict(Config, values, where="run/config.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_field_is_named_with_the_near_one():
    text = broken(lambda values: values["method"].update(temprature=3.0))
    assert "run/config.json.method" in text and "'temprature'" in text and "did you mean 'temperature'" in text


EARLIER = {"augment.views": None, "train.steps_per_call": None, "train.precision": "float32", "cache.mode": "off"}
EARLIER |= {"cache.precision": "float32", "cache.budget": 2048, "optimizer.max_skipped": 0, "train.checkpoint_seconds": None}
EARLIER |= {"data.folder": None, "data.image_size": (32,), "data.channels": None, "data.test_share": 0.2, "data.max_unreadable": 0.05}
EARLIER |= {"teacher_input.layout": "nchw", "teacher_input.channels": "rgb", "teacher_input.value_range": "0-1", "teacher_input.mean": None}
EARLIER |= {"teacher_input.std": None, "teacher_input.size": None, "teacher_input.outputs": "logits", "teacher_input.classes": None}
EARLIER |= {"method.boundary_radius": 0.0}
"""Options that came later, and how things were before them."""


def without(path):
    """A change that takes an option out of stored values."""
    *parts, name = path.split(".")

    def change(values):
        for part in parts:
            values = values[part]
        del values[name]

    return change


@pytest.mark.parametrize("path", sorted(set(OPTIONS) - set(EARLIER)))
def test_a_missing_field_is_named(path):
    *parts, name = path.split(".")
    assert f"{'.'.join(['run/config.json', *parts])} lacks the field {name!r}" in broken(without(path))


def test_a_file_from_before_an_option_says_what_was_done_then():
    values = to_dict(edit(Config(), {"augment.name": "matching", "augment.views": 3, "train.steps_per_call": 7, "cache.budget": 5}))
    for path in EARLIER:
        without(path)(values)
    del values["cache"]
    restored = from_dict(Config, values)
    assert {path: get(restored, path) for path in EARLIER} == EARLIER
    assert restored == edit(Config(), {"augment.name": "matching", "cache.mode": "off", "train.checkpoint_seconds": None})


WRONG = {
    "train.steps": [True, 1.5, "3", None, [3]],
    "method.temperature": ["4", None, True, {}],
    "method.epsilon": ["none", False],
    "method.through_teacher": [1, "True", None],
    "data.n_per_class": ["10", 10.0, True],
    "data.name": [1, None],
    "method.aggregate": ["median", None, 1],
    "method.ground_norm": [2, "3"],
    "augment.name": ["None", None],
    "teacher": [3, ["a"]],
    "seed": ["0", 0.0, None, False],
    "method": [None, 3, []],
    "optimizer.clip_norm": [[], {}, [[1.0]]],
    "data.image_size": [32, None, "32", {}],
    "data.folder": [3, ["a"]],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in WRONG.items() for value in values])
def test_a_wrong_type_is_named_with_its_value(path, value):
    *parts, name = path.split(".")

    def change(values):
        for part in parts:
            values = values[part]
        values[name] = value

    text = broken(change)
    assert text.startswith(f"run/config.json.{path} is {value!r}; it must be ")


@pytest.mark.parametrize("value", [None, 3, [], "text"])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(UsageError, match="must be an object with the fields of Config"):
        from_dict(Config, value)


NAN, INF = math.nan, math.inf
LIMITS = {
    "data.n_per_class": ([1, None], [0, -1, 2**31]),
    "data.validation_size": ([0, 7], [-1, 2**31]),
    "data.channels": ([None, 1, 3], [0, 2, 4, -1]),
    "data.test_share": ([0.01, 0.99], [0.0, 1.0, -0.1, NAN, INF]),
    "data.max_unreadable": ([0.0, 0.99], [1.0, -0.1, NAN, INF]),
    "model.width": ([1, 1024], [0, -4, 1025]),
    "method.temperature": ([1e-3, 100.0], [0.0, -1.0, NAN, INF, -INF]),
    "method.epsilon": ([None, 0.0, 3.0, 1e6], [-1e-9, NAN, INF, -INF, 1.1e6]),
    "method.pretrain_epsilon": ([0.0, 3.0], [-0.5, NAN, INF, 1e300]),
    "method.sobolev_weight": ([0.0, 3.0], [-0.5, NAN, INF, 1e300]),
    "method.boundary_radius": ([0.0, 3.0], [-0.5, NAN, INF, 1e300]),
    "method.ab_margin": ([0.1], [0.0, -1.0, NAN, INF]),
    "method.pretrain_fraction": ([0.01, 0.99], [0.0, 1.0, -0.1, 2.0, NAN, INF]),
    "augment.padding": ([0, 4, 1024], [-1, 1025]),
    "augment.views": ([None, 1], [0, -2, 1001]),
    "optimizer.learning_rate": ([1e-6], [0.0, -1e-3, NAN, INF]),
    "optimizer.warmup_fraction": ([0.0, 0.99], [1.0, -0.1, NAN, INF]),
    "optimizer.weight_decay": ([0.0], [-1e-4, NAN, INF]),
    "optimizer.momentum": ([0.0, 0.99], [1.0, -0.1, NAN, INF]),
    "optimizer.clip_norm": ([None, 0.1], [0.0, -1.0, NAN, INF]),
    "optimizer.ema_decay": ([None, 0.999], [0.0, 1.0, -0.5, NAN, INF]),
    "optimizer.max_skipped": ([0, 5], [-1, 2**31]),
    "train.steps": ([1, 2**31 - 1], [0, -1, 2**31, 10**4000]),
    "train.batch_size": ([1, 65_536], [0, -64, 65_537]),
    "train.log_every": ([1], [0, -1, 2**31]),
    "train.checkpoint_every": ([1], [0, -1, 2**31]),
    "train.checkpoint_seconds": ([None, 0.5], [0.0, -1.0, NAN, INF]),
    "train.steps_per_call": ([None, 1, 1000], [0, -1, 1001]),
    "cache.budget": ([1, 2**20], [0, -1, 2**20 + 1]),
    "seed": ([0, 2**31 - 1], [-1, 2**31]),
}


def test_every_number_has_limits_that_are_tested():
    single = {path: hint for path, hint in OPTIONS.items() if get_origin(hint) is not tuple}
    numbers = {path for path, hint in single.items() if hint in (int, float) or {int, float} & set(get_args(hint))}
    assert numbers == set(LIMITS)


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, (good, _) in LIMITS.items() for value in good])
def test_values_within_limits_pass(path, value):
    edit(Config(), {path: value}).check()


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, (_, bad) in LIMITS.items() for value in bad])
def test_values_out_of_limits_are_named_with_the_limit(path, value):
    with pytest.raises(UsageError) as caught:
        edit(Config(), {path: value}).check()
    text = str(caught.value)
    assert text.startswith(f"{path} is {shown(value)}; it must be ") and "\n" not in text and len(text) < 200


NAMES = ("data.name", "model.name", "method.name")


@pytest.mark.parametrize("path", NAMES)
def test_names_that_could_leave_a_directory_or_a_line_are_refused(path):
    leaving = ["", ".", "..", "../x", "/x", "a/../../x", "a/b/c", "a//b", "a/", "a/..", "-x"]
    breaking = ["a\0", "a\n", "a\n/b", "a b", "$x$", "\ud800", "ä", "x" * 101]
    for name in leaving + breaking:
        with pytest.raises(UsageError) as caught:
            edit(Config(), {path: name}).check()
        text = str(caught.value)
        assert text.startswith(f"{path} is ") and text.isprintable() and len(text) < 200
    for name in ("emnist/balanced", "cifar10_corrupted/brightness_1", "wrn_16_2", "v1.2-x", "x" * 100):
        edit(Config(), {path: name}).check()


@pytest.mark.parametrize("path", ["teacher", "data.data_dir", "data.folder"])
def test_paths_that_are_none_are_refused(path):
    for name in ("", "a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 4096):
        with pytest.raises(UsageError) as caught:
            edit(Config(), {path: name}).check()
        assert str(caught.value).startswith(f"{path} is ") and str(caught.value).isprintable() and len(str(caught.value)) < 200
    for name in (None, "../teacher", "/a b/ä", os.fsdecode(b"bytes \xff"), "x" * 4095):
        edit(Config(), {path: name}).check()


def test_an_image_that_is_not_augmented_has_one_view():
    with pytest.raises(UsageError, match="augment.views is 2; it must be 1 or None with augment.name none"):
        edit(Config(), {"augment.views": 2}).check()
    assert edit(Config(), {"augment.views": None}).augment.finite_views == 1
    augmented = edit(Config(), {"augment.name": "matching"})
    assert augmented.check().augment.finite_views is None
    assert edit(augmented, {"augment.views": 2}).check().augment.finite_views == 2


def test_evaluating_on_a_validation_split_needs_one():
    with pytest.raises(UsageError, match="data.validation_size is 0; it must be above 0 to evaluate on validation"):
        edit(Config(), {"data.validation_size": 0, "data.evaluate_on": "validation"}).check()


@pytest.mark.parametrize(
    ("edits", "refused"),
    [
        ({"method.name": "wdkd"}, True),
        ({"method.name": "wdkd", "method.epsilon": 0.0}, False),
        ({"method.name": "kd"}, False),
        ({"method.name": "kd", "method.epsilon": 0.1}, True),
        ({"method.name": "ab", "method.pretrain_epsilon": 0.1}, True),
        ({"method.name": "sobolev"}, True),
    ],
)
def test_batch_norm_is_refused_where_input_gradients_are_needed(edits, refused):
    config = edit(Config(), {"model.norm": "batch"} | edits)
    if refused:
        with pytest.raises(UsageError, match="model.norm 'batch' mixes the examples of a batch.* use --model.norm group"):
            config.check()
    else:
        config.check()
    edit(config, {"model.norm": "group", "method.connector_norm": "group"}).check()


def test_batch_norm_in_connectors_is_refused_where_input_gradients_go_through_them():
    config = edit(Config(), {"method.name": "ab", "method.pretrain_epsilon": 0.1})
    with pytest.raises(UsageError, match="method.connector_norm 'batch' mixes the examples of a batch.* use --method.connector-norm group"):
        config.check()
    for edits in ({"method.pretrain_epsilon": 0.0}, {"method.connector_norm": "none"}, {"method.name": "fitnet"}):
        edit(config, edits).check()


def test_boundary_views_are_refused_where_labels_are_learned():
    for edits in ({"method.name": "ce"}, {"method.name": "kd", "method.loss": "ce"}):
        config = edit(Config(), {"method.boundary_radius": 0.1} | edits)
        with pytest.raises(UsageError, match="method.boundary_radius is 0.1: .* learns labels; use --method.boundary-radius 0"):
            config.check()
        edit(config, {"method.boundary_radius": 0.0}).check()


def test_the_radius_is_the_methods_own_unless_given():
    assert MethodConfig(name="wdkd").radius == DEFAULT_RADIUS["wdkd"] > 0
    assert MethodConfig(name="kd").radius == 0.0
    assert MethodConfig(name="wdkd", epsilon=0.0).radius == 0.0
    assert MethodConfig(name="kd", epsilon=0.5).radius == 0.5


@pytest.mark.parametrize("size", [(), (7,), (32, 7), (4097,), (32, 32, 3), (-1, 32)])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(UsageError, match="data.image_size is .*; it must be one or two numbers between 8 and 4096"):
        edit(Config(), {"data.image_size": size}).check()


def test_one_number_is_both_sides_of_an_image():
    assert edit(Config(), {"data.image_size": (48,)}).check().data.image_hw == (48, 48)
    assert edit(Config(), {"data.image_size": (48, 64)}).check().data.image_hw == (48, 64)


def test_a_sizes_elements_have_their_type_and_its_json_is_a_list():
    values = to_dict(Config())["data"]
    assert from_dict(DataConfig, values | {"image_size": [48, 64]}).image_size == (48, 64)
    with pytest.raises(UsageError, match=r"image_size\[1\] is 2.5; it must be int"):
        from_dict(DataConfig, values | {"image_size": [48, 2.5]})


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (None, "digits"),
        ("photos", "photos"),
        ("/a/b/My photos.v2/", "My-photos-v2"),
        ("a/cifar10", "cifar10-folder"),  # Not that set.
        ("folder", "folder-folder"),
        ("Cafe\u0301", "Cafe"),
        ("caf\u00e9", "cafe"),
    ],
)
def test_a_folder_gives_the_data_set_its_name(folder, name):
    assert edit(Config(), {"data.folder": folder}).data.dataset == name


def test_names_that_lose_letters_are_told_apart():
    folders = ("фото", "кошки", "写真", "x" * 61, "x" * 62, "/", "\udcff", "...")
    names = [DataConfig(folder=folder).dataset for folder in folders]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,70}", name) for name in names)
    assert edit(Config(), {"data.folder": "x/.."}).data.dataset == Path.cwd().name
