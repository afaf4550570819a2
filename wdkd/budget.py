"""The largest student that a device has room and time for: --student auto --budget 200k-params, 10MFLOPs or 1MB."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from wdkd.config import ModelConfig
from wdkd.errors import UsageError
from wdkd.graph import flops, record
from wdkd.models import create_model, parameter_count, variable_shapes
from wdkd.wording import shown

Student = Literal["auto", "auto-whitened_cnn", "auto-cnn", "auto-resnet", "auto-wrn"]
FAMILIES: dict[str, tuple[str, ...]] = {
    "whitened_cnn": ("whitened_cnn",),
    "cnn": ("cnn",),
    "resnet": ("resnet56", "resnet44", "resnet32", "resnet20", "resnet14", "resnet8"),
    "wrn": ("wrn_40_1", "wrn_28_1", "wrn_22_1", "wrn_16_1", "wrn_10_1"),
}
"""Networks of each family, deepest first."""
PREFERRED = ("whitened_cnn", "cnn")
"""Families that auto tries: the first was measured better at equal cost, the second also fits where its first layer is too much."""
STEP, ENOUGH = 4, 16
"""Widths are multiples of the one, as group norm and vector instructions like them; a deep network is at least as wide as the other."""
WIDEST = 1024
OVERHEAD, PER_OPERATION = 8_192, 640
"""Bytes of an ONNX file beside its arrays, at most: its description, and each recorded operation with its names."""
UNITS = {"params": "parameters", "flops": "flops", "b": "bytes"}
PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclasses.dataclass(frozen=True)
class Size:
    """What a network takes, exactly."""

    parameters: int
    flops: int
    """Of one image's forward pass; a multiplication and an addition are two."""
    bytes: int
    """Of its export to ONNX in float32, at most."""

    def words(self) -> str:
        """All three."""
        return f"{self.parameters:,} parameters, {self.flops / 1e6:,.2f} MFLOPs, {self.bytes / 1e6:,.2f} MB"


def read_budgets(texts: Sequence[str]) -> dict[str, int]:
    """Limits by what they limit: {"parameters": 200000} for 200k-params. Raises UsageError for none, no budget, or a limit twice."""
    limits: dict[str, int] = {}
    for text in texts:
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)[ _-]?([kmg]?i?)[ _-]?(params|parameters|flops|b)", text.strip().lower())
        if match is None or match[2] not in PREFIXES:
            raise UsageError(
                f"budget is {shown(text)!r}; it must be a number of parameters, FLOPs or bytes, as 200k-params, 10MFLOPs or 1MB"
            )
        kind = UNITS[match[3].replace("parameters", "params")]
        if kind in limits:
            raise UsageError(f"budget has two limits of {kind}; give one")
        limits[kind] = int(float(match[1]) * PREFIXES[match[2]])
        if limits[kind] < 1:
            raise UsageError(f"budget is {shown(text)!r}; it must be above 0")
    if not limits:
        raise UsageError("--student auto needs a --budget, as 200k-params, 10MFLOPs or 1MB")
    return limits


def choose(student: Student, budgets: Sequence[str], norm: str, *, classes: int, image_shape: Sequence[int]) -> tuple[ModelConfig, str]:
    """The largest network within all budgets, and a line that says so.

    The rule: of the families that `student` allows, the first in which a network fits that is `STEP` wide (else any width); of its depths
    the deepest that fits `ENOUGH` wide (else the least deep); then the widest, in steps of `STEP`, below that of 1.

    Raises:
      UsageError: for a budget that is none, that no network fits, or that all do.
    """
    limits = read_budgets(budgets)
    families = PREFERRED if student == "auto" else (student.removeprefix("auto-"),)
    size = functools.cache(lambda name, width: size_of(ModelConfig(name, width, norm), classes=classes, image_shape=image_shape))

    def fits(name: str, width: int) -> bool:
        return all(getattr(size(name, width), kind) <= limit for kind, limit in limits.items())

    said = ", ".join(budgets)
    try:
        name, width = _largest(families, fits)
    except UsageError as error:
        raise UsageError(f"budget {said} is too large: {error}") from error
    if width < 1:
        raise UsageError(f"budget {said} is too small: the smallest {name} takes {size(name, 1).words()} for these images and classes")
    if width > WIDEST:
        raise UsageError(
            f"budget {said} has room for a {name} of width {WIDEST} ({size(name, WIDEST).words()}); give a smaller one, or --model.name"
        )
    chosen = ModelConfig(name, width, norm)
    return chosen, f"student: {name} of width {width} with {norm} norm, {size(name, width).words()}, within {said}"


def _largest(families: Sequence[str], fits: Callable[[str, int], bool]) -> tuple[str, int]:
    """(name, width); width 0: none fits, above `WIDEST`: all do."""
    family = next((family for family in families if fits(FAMILIES[family][-1], STEP)), families[-1])
    *deeper, least = FAMILIES[family]
    name = next((name for name in deeper if fits(name, ENOUGH)), least)
    if not fits(name, STEP):
        return name, next((width for width in range(STEP - 1, 0, -1) if fits(name, width)), 0)
    fit = STEP
    while 2 * fit <= WIDEST and fits(name, 2 * fit):
        fit *= 2
    if fit == WIDEST:
        return name, WIDEST + 1
    above = 2 * fit
    while above - fit > STEP:
        middle = (fit + above) // (2 * STEP) * STEP
        fit, above = (middle, above) if fits(name, middle) else (fit, middle)
    return name, fit


def size_of(config: ModelConfig, *, classes: int, image_shape: Sequence[int]) -> Size:
    """What a network takes, from its shapes: nothing is computed or compiled."""
    channels = image_shape[2]
    model = create_model(config, classes=classes, mean=[0.5] * channels, std=[0.5] * channels)
    statistic = jax.ShapeDtypeStruct((channels,), jnp.float32)
    variables: Mapping[str, Any] = {**variable_shapes(model, image_shape), "input": {"mean": statistic, "std": statistic}}
    numbers = parameter_count({name: tree for name, tree in variables.items() if name != "input"})
    graph = record(model, variables, image_shape)
    return Size(parameter_count(variables["params"]), flops(graph), 4 * numbers + OVERHEAD + PER_OPERATION * len(graph.nodes))
