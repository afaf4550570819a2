"""Any option may be an axis of a grid, with values of its type, and no other word is taken for one."""

import typing

import pytest
from test_config import OPTIONS, get

from wdkd.config import Config, differences
from wdkd.errors import UsageError
from wdkd.vary import OWN_AXIS, edited, from_word, option_types, read_axis, suffix

WORDS = {int: ("3", "-7"), float: ("1e-3", "4", "inf"), str: ("kd", "4", "a/b"), bool: ("True", "False")}
WORDS |= {tuple[float, ...]: ("0.5", "0.5 0.25"), tuple[int, int]: ("3 4",), tuple[str, ...]: ("a", "a b")}


def test_every_option_is_known_with_its_type():
    assert option_types() == OPTIONS


SINGLE = [option for option, hint in OPTIONS.items() if typing.get_origin(hint) is not tuple]


@pytest.mark.parametrize("option", sorted(set(SINGLE) - set(OWN_AXIS)))
def test_every_option_can_be_varied_and_nothing_else_changes(option):
    kinds = typing.get_args(OPTIONS[option]) or (OPTIONS[option],)
    words = [word for kind in kinds for word in WORDS.get(kind, ("None",) if kind is type(None) else (kind,))]
    axis = read_axis(f"{option.replace('_', '-')}={','.join(words)}")
    assert axis.option == option
    for word, value in zip(words, axis.values, strict=True):
        said = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert value == float(word) if float in kinds and word != "None" else said == word
        config = edited(Config(), option, value)
        assert get(config, option) == value and type(get(config, option)) in (*kinds, *map(type, kinds), *map(typing.get_origin, kinds))
        assert [line.split(":")[0] for line in differences(Config(), config)] in ([option], [])


REFUSED = {
    "unknown": ("method.temprature=4", "vary: there is no option 'method.temprature'; did you mean 'method.temperature'? --help lists"),
    "unlike any": ("qqqq=4", "vary: there is no option 'qqqq'; --help lists all of them"),
    "a part of a config": ("method=4", "vary: there is no option 'method'"),
    "no value": ("method.temperature", "vary: method.temperature has no values; write method.temperature=V1,V2"),
    "an empty value": ("method.temperature=4,", "method.temperature is ''; it must be float"),
    "no number": ("method.temperature=4,warm", "method.temperature is 'warm'; it must be float"),
    "no whole number": ("train.steps=1.5", "train.steps is '1.5'; it must be int"),
    "digits without end": ("train.steps=" + "9" * 5000, "train.steps is '999"),
    "no truth": ("augment.flip=true", "augment.flip is 'true'; it must be bool"),
    "too few values": ("teacher-input.size=32", "teacher_input.size is [32]; it must be a list of 2 values"),
    "no numbers": ("teacher-input.mean=0.5 x", "teacher_input.mean is 'x'; it must be float"),
    "no choice": ("method.aggregate=median", "method.aggregate is 'median'; it must be one of mean, rms, max"),
    "None for what has a value": ("method.temperature=None", "method.temperature is 'None'; it must be float"),
    "an own axis": ("method.epsilon=0,1", "vary: method.epsilon has an axis of its own; give its values to --epsilons"),
}


@pytest.mark.parametrize(("text", "line"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_option_or_no_value_of_it_is_refused(text, line):
    with pytest.raises(UsageError) as refused:
        read_axis(text)
    assert str(refused.value).startswith(line) and len(str(refused.value)) < 300


def test_a_literal_that_looks_like_a_number_stays_text():
    assert read_axis("method.ground-norm=1,inf").values == ("1", "inf")
    assert from_word(int | None, "5", "x") == 5 and from_word(int | None, "None", "x") is None


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("method.temperature", 4.0, "-temperature4"),
        ("optimizer.learning_rate", 0.001, "-learning_rate0.001"),
        ("optimizer.clip_norm", None, "-clip_normNone"),
        ("teacher", "../runs/teacher 1", "-teacher.._runs_teacher_1"),
    ],
)
def test_a_directory_is_named_by_the_value_and_leads_nowhere_else(option, value, expected):
    assert suffix(option, value) == expected


def test_sizes_are_written_with_an_x():
    axis = read_axis("data.image-size=32,48 64")
    assert axis.values == ((32,), (48, 64))
    assert [suffix(axis.option, value) for value in axis.values] == ["-image_size32", "-image_size48x64"]
    with pytest.raises(UsageError, match="data.image_size is 'big'; it must be int"):
        read_axis("data.image_size=big")
