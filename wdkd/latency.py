"""What a network costs on a device: parameters, FLOPs, bytes, and the time that one core takes for one image."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wdkd.exported import session
from wdkd.graph import PIXELS
from wdkd.timing import Spread, interleaved, spread

ROUNDS = 200
"""Images that each network is timed on, in turn with the others."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One row of the table."""

    name: str
    model: str
    parameters: int
    flops: int
    """Of one image, before batch norm is folded, as XLA's compiler counts."""
    bytes: int
    """Of the exported file."""
    accuracy: float | None
    """On the data set's test images."""
    milliseconds: Spread | None
    """For one image, by onnxruntime on one thread; None where that is not installed."""


def single_image(
    models: Mapping[str, bytes], image_shapes: Mapping[str, Sequence[int]], rounds: int = ROUNDS, *, show: bool
) -> dict[str, Spread]:
    """Milliseconds of one image through each ONNX model, on one thread, in turn.

    Args:
      models: by name.
      image_shapes: (H, W, C) by name.
    """
    random = np.random.default_rng(0)

    def case(content: bytes, shape: Sequence[int]) -> Any:
        opened = session(content, threads=1)
        pixels = random.uniform(size=(1, shape[2], *shape[:2])).astype(np.float32)
        return lambda: opened.run(None, {PIXELS: pixels})

    cases = {name: case(content, image_shapes[name]) for name, content in models.items()}
    seconds = interleaved(cases, rounds, title="latency", show=show)
    return {name: spread(1e3 * np.asarray(values)) for name, values in seconds.items()}


def table(costs: Sequence[Cost]) -> list[str]:
    """The costs as aligned lines of text, the header first."""
    rows = [("", "parameters", "MFLOPs", "file", "accuracy", "one image, one core")]
    for cost in costs:
        accuracy = "-" if cost.accuracy is None else f"{cost.accuracy:.2%}"
        time = cost.milliseconds
        taken = "-" if time is None else f"{time.median:.2f} ms ({time.lower:.2f} to {time.upper:.2f})"
        rows.append((cost.name, f"{cost.parameters:,}", f"{cost.flops / 1e6:,.1f}", f"{cost.bytes / 1e3:,.0f} kB", accuracy, taken))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ("<", ">", ">", ">", ">", ">")
    return ["  ".join(f"{text:{a}{w}}" for text, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in rows]
