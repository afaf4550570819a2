"""Any option as an axis of a grid: OPTION=V1,V2, named as on the command line, its values of the option's type."""

import contextlib
import dataclasses
import functools
import re
import types
import typing
from typing import Any, get_args, get_origin

from wdkd.config import Config
from wdkd.errors import UsageError, suggestion
from wdkd.typed_json import convert
from wdkd.wording import shown

OWN_AXIS = {
    "data.n_per_class": "--n-per-class",
    "seed": "--seeds",
    "augment.name": "--augmentations",
    "method.name": "--methods",
    "method.epsilon": "--epsilons",
}
"""Options that a grid has an axis for already."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """An option of `Config` by its dotted name, and the values to try."""

    option: str
    values: tuple[Any, ...]


@functools.cache
def option_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """{dotted name: type} of every option of a nested dataclass."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        found |= option_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


def read_axis(text: str) -> Axis:
    """The axis that "method.temperature=1,4" says.

    Raises:
      UsageError: if it is of another form, the option is not there (suggests the nearest) or has an axis of its own, or a value is
        of another type.
    """
    name, _, values = text.partition("=")
    option = name.replace("-", "_")
    if option not in option_types():
        raise UsageError(f"vary: there is no option {shown(name)!r}{suggestion(option, option_types()) or ';'} --help lists all of them")
    if option in OWN_AXIS:
        raise UsageError(f"vary: {option} has an axis of its own; give its values to {OWN_AXIS[option]}")
    if not values:
        raise UsageError(f"vary: {option} has no values; write {option}=V1,V2")
    return Axis(option, tuple(from_word(option_types()[option], word, option) for word in values.split(",")))


def from_word(hint: Any, word: str, where: str) -> Any:
    """A word of the command line as the type that `hint` says; None stands for itself, and several values have spaces between.

    Raises UsageError where it is of another.
    """
    if isinstance(hint, types.UnionType):
        (hint,) = (choice for choice in get_args(hint) if choice is not types.NoneType)
        if word == "None":
            return None
    if get_origin(hint) is tuple:
        return convert(hint, [from_word(get_args(hint)[0], part, where) for part in word.split()], where)
    if hint in (int, float):
        with contextlib.suppress(ValueError):
            return hint(word)
    return convert(hint, {"True": True, "False": False}.get(word, word) if hint is bool else word, where)


def edited(config: Any, option: str, value: Any) -> Any:
    """The config with the option of that dotted name replaced."""
    part, _, rest = option.partition(".")
    return dataclasses.replace(config, **{part: edited(getattr(config, part), rest, value) if rest else value})


def suffix(option: str, value: Any) -> str:
    """What a value adds to the name of a run's directory, as -temperature4."""
    if isinstance(value, tuple):
        value = "x".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"-{option.rpartition('.')[2]}{re.sub(r'[^A-Za-z0-9_.+-]', '_', text)}"
