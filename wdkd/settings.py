"""The options that may change what a run finds: which of them differ between runs, and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from wdkd.config import to_dict
from wdkd.result import Result
from wdkd.tables import METHODS

NOT_SETTINGS = (
    *("data.n_per_class", "method.name", "seed"),  # A column, a row and an average of every table.
    *("data.name", "data.data_dir", "data.folder", "data.evaluate_on", "teacher"),  # Whose differences the tables' warnings name.
    # These change no result, nor does it matter whether the teacher was recorded.
    *("train.log_every", "train.checkpoint_every", "train.checkpoint_seconds", "train.steps_per_call", "cache.mode", "cache.budget"),
)

OUTPUTS, PRETRAINED = ("kd", "fitnet", "ab", "wdkd", "sobolev"), ("fitnet", "ab")
OF_METHODS: Mapping[str, Sequence[str]] = {
    "method.loss": OUTPUTS,
    "method.temperature": OUTPUTS,
    "method.pretrain_epsilon": PRETRAINED,
    "method.pretrain_fraction": PRETRAINED,
    "method.fitnet_stage": ("fitnet",),
    "method.ab_margin": ("ab",),
    "method.connector_norm": ("ab",),
    "method.sobolev_weight": ("sobolev",),
}
"""Options that some of METHODS never look at."""


def options(result: Result) -> dict[str, Any]:
    """The options that a run's method looks at, by dotted name, with the radius that was used."""
    found = {"method.epsilon": result.epsilon, "method.through_teacher": result.through_teacher}
    values = dict(flat(to_dict(result.config))) | found
    unused = {name for name, methods in OF_METHODS.items() if result.method in METHODS and result.method not in methods}
    return {name: value for name, value in values.items() if name not in NOT_SETTINGS and name not in unused}


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as pairs of dotted name and value."""
    pairs = []
    for name, value in values.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


def differing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the options that have more than one value among those that have them."""
    names = dict.fromkeys(name for options in found for name in options)
    return [name for name in names if len({written(options[name]) for options in found if name in options}) > 1]


def short(name: str) -> str:
    """An option's name without the part of the config that it belongs to, unless that says what it is of."""
    part, _, last = name.partition(".")
    return name if last in ("name", "padding", "precision", "width", "norm") else last.replace("_", " ")


def written(value: Any) -> str:
    """An option's value in words, different ones differently."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def is_number(value: Any) -> bool:
    """Whether values like this one have a size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Orders values of any type: numbers by size, then the others by their words."""
    number = is_number(value)
    return (not number, value if number else 0.0, written(value))
