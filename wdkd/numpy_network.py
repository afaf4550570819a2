"""A recorded network computed with NumPy alone: what a safetensors export is run with, and a reader to copy where there is no JAX.

The operations are those that `wdkd.graph.Node` describes; images are (B, H, W, C), pixels float32 in [0, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def run(nodes: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Logits (B, classes) of pixels (B, H, W, C).

    Args:
      nodes: each with "op", "inputs", "output" and "attributes", in the order in which they are computed.
      values: the parameters, by name.
    """
    known: dict[str, np.ndarray] = {"pixels": pixels}
    for node in nodes:
        operands = [known[name] if name in known else values[name] for name in node["inputs"]]
        known[node["output"]] = OPERATIONS[node["op"]](*operands, **node["attributes"])
    return known[nodes[-1]["output"]]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (B, classes)."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def _conv(x: np.ndarray, kernel: np.ndarray, *, strides: Sequence[int], padding: Sequence[Sequence[int]]) -> np.ndarray:
    x = np.pad(x, ((0, 0), *map(tuple, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, :: strides[0], :: strides[1]]
    # (B, h, w, in, kh, kw) and (kh, kw, in, out).
    return np.tensordot(windows, kernel, ((4, 5, 3), (0, 1, 2)))


def _max_pool(x: np.ndarray) -> np.ndarray:
    height, width = x.shape[1:3]
    x = np.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.maximum(np.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]), np.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2]))


def _group_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, *, groups: int, epsilon: float) -> np.ndarray:
    apart = x.reshape(*x.shape[:3], groups, -1)
    mean, var = (statistic(apart, axis=(1, 2, 4), keepdims=True) for statistic in (np.mean, np.var))
    return ((apart - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * scale + bias


def _batch_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray, *, epsilon: float) -> np.ndarray:
    return (x - mean) * (scale / np.sqrt(var + epsilon)) + bias


OPERATIONS = {
    "sub": np.subtract,
    "div": np.divide,
    "add": np.add,
    "mul": np.multiply,
    "relu": lambda x: np.maximum(x, 0),
    "conv": _conv,
    "max_pool": _max_pool,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "mean": lambda x: x.mean((1, 2)),
    "dense": np.matmul,
}
