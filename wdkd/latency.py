"""What a network costs on a device: parameters, FLOPs, bytes, and the time that one core takes for one image."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wdkd.exported import session
from wdkd.timing import Spread, interleaved, spread

ROUNDS = 200
"""Images that each network is timed on, in turn with the others."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One row of the table."""

    name: str
    model: str
    parameters: int
    flops: int | None
    """Of one image, before batch norm is folded, as XLA's compiler counts."""
    bytes: int | None
    """Of the file; None of Python code."""
    accuracy: float | None
    """On the data set's test images."""
    milliseconds: Spread | None
    """For one image, by onnxruntime on one thread; None where that is not installed or cannot run it."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """How one image is given to an ONNX model."""

    model: bytes | str
    """Its content, or the path of its file, beside which its parameters may be."""
    input: str
    shape: tuple[int, ...]
    """Of one image with its batch axis, as the model takes it."""
    dtype: np.dtype = np.dtype(np.float32)


def single_image(cases: Mapping[str, Timed], rounds: int = ROUNDS, *, show: bool) -> dict[str, Spread]:
    """Milliseconds of one image through each ONNX model, by name, on one thread, in turn."""
    random = np.random.default_rng(0)

    def call(case: Timed) -> Any:
        opened = session(case.model, threads=1)
        image = random.uniform(size=case.shape).astype(case.dtype)
        return lambda: opened.run(None, {case.input: image})

    seconds = interleaved({name: call(case) for name, case in cases.items()}, rounds, title="latency", show=show)
    return {name: spread(1e3 * np.asarray(values)) for name, values in seconds.items()}


def table(costs: Sequence[Cost]) -> list[str]:
    """The costs as aligned lines of text, the header first."""
    rows = [("", "parameters", "MFLOPs", "file", "accuracy", "one image, one core")]
    for cost in costs:
        accuracy = "-" if cost.accuracy is None else f"{cost.accuracy:.2%}"
        time = cost.milliseconds
        taken = "-" if time is None else f"{time.median:.2f} ms ({time.lower:.2f} to {time.upper:.2f})"
        flops = "-" if cost.flops is None else f"{cost.flops / 1e6:,.1f}"
        size = "-" if cost.bytes is None else f"{cost.bytes / 1e3:,.0f} kB"
        rows.append((cost.name, f"{cost.parameters:,}", flops, size, accuracy, taken))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ("<", ">", ">", ">", ">", ">")
    return ["  ".join(f"{text:{a}{w}}" for text, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in rows]
