"""Times of several things in one run: interleaved, because machines drift; medians with quartiles; ratios round by round."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wdkd import parallel
from wdkd.progress import track


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float


def spread(values: Any) -> Spread:
    """Of a list of numbers."""
    lower, median, upper = (float(value) for value in np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75)))
    return Spread(median, lower, upper)


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int, *, title: str, show: bool) -> dict[str, list[float]]:
    """Seconds of each case in each of `rounds` rounds, every round running all of them, after one call of each that is not timed.

    Odd rounds go through the cases backward, so that none always runs after the same other. A case must have finished when it returns.
    """
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in track(range(rounds), title=title, total=rounds, show=show):
        for name in names if turn % 2 == 0 else reversed(names):
            began = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> Spread:
    """Of what was timed in the same rounds, round by round."""
    return spread(np.asarray(above) / np.asarray(below))


def matrix_product(side: int) -> tuple[Callable[[], Any], float]:
    """A product of two float32 matrices of `side` x `side` on one device, to time, and its FLOPs."""
    matrix = jnp.full((side, side), 1 / side, jnp.float32)
    multiply = parallel.on_one_device(lambda a, b: a @ b)
    return lambda: jax.block_until_ready(multiply(matrix, matrix)), 2.0 * side**3
