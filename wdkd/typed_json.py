"""Dataclasses as JSON values and back, every type checked on the way."""

import dataclasses
import reprlib
import types
import typing
from typing import Any, Literal, get_args, get_origin

from wdkd.errors import UsageError, unknown
from wdkd.wording import shown

MOST = 10_000
"""Elements of the longest list: there are as many as classes, at most."""
EARLIER = "earlier"
"""Key of a field's metadata: what it was in files from before the field existed. Fields without it must be there."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Any, where: str = "config") -> Any:
    """The inverse of `to_dict`. Raises UsageError naming the first field that is unknown, missing or of a wrong type."""
    if not isinstance(values, dict):
        raise _wrong(where, values, f"an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise unknown(f"field in {where}", shown(name), fields)
    values = {name: field.metadata[EARLIER] for name, field in fields.items() if EARLIER in field.metadata} | values
    for name in fields:
        if name not in values:
            raise UsageError(f"{where} lacks the field {name!r}; it was written by another version of wdkd")
    return cls(**{name: convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type that `hint` says, all that is inside it too. Raises UsageError where it is of another."""
    if isinstance(hint, types.UnionType):
        (hint,) = (choice for choice in get_args(hint) if choice is not type(None))
        return None if value is None else convert(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        if type(value) is not str or value not in allowed:
            raise _wrong(where, value, f"one of {', '.join(allowed)}")
        return value
    if get_origin(hint) in (list, dict):
        return _convert_many(hint, value, where)
    if get_origin(hint) is tuple:
        return _convert_tuple(get_args(hint), value, where)
    if hint is float and type(value) is int:
        return _float(value, where)
    if type(value) is not hint:
        raise _wrong(where, value, hint.__name__)
    return value


def _convert_many(hint: Any, values: Any, where: str) -> Any:
    """A list or a dictionary, element by element."""
    kind, inner = get_origin(hint), get_args(hint)[-1]
    if type(values) is not kind:
        raise _wrong(where, values, kind.__name__)
    if len(values) > MOST:
        raise UsageError(f"{where} has {len(values):,} elements; at most {MOST:,} are taken")
    if kind is dict:
        return {key: convert(inner, value, f"{where}[{shown(key)!r}]") for key, value in values.items()}
    if all(type(value) is inner for value in values):  # Many numbers, as a rule.
        return values
    return [convert(inner, value, f"{where}[{index}]") for index, value in enumerate(values)]


def _convert_tuple(inner: tuple[Any, ...], values: Any, where: str) -> tuple[Any, ...]:
    """A list, which is what JSON has for a tuple, element by element: any number of one type, or one for each type."""
    length = None if inner[-1] is Ellipsis else len(inner)
    if type(values) not in (list, tuple) or len(values) != (len(values) if length is None else length):
        raise _wrong(where, values, "a list" if length is None else f"a list of {length} values")
    return tuple(_convert_many(list[inner[0]], list(values), where))


def _float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _wrong(where, value, "a number below 1.8e308") from None


def _wrong(where: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"{where} is {reprlib.repr(value)}; it must be {wanted}")
