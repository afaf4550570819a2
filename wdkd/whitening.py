"""A first layer that decorrelates small patches of the image: computed from the training images, not learned."""

import numpy as np

PATCH = 2
"""Pixels on a side of a patch."""
FLOOR = 5e-4
"""Added to the variances, so that directions in which patches hardly differ are not blown up to noise."""
MOST_IMAGES = 5000


def whitening_filters(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Filters whose responses on the patches of standardised images are uncorrelated, with variance about 1, and their negatives.

    With Σ = V diag(λ) Vᵀ the covariance of 2×2 patches, the filters are V diag(1/sqrt(λ + 5e-4)); the negatives let a rectifier
    behind them keep all that they say (Jordan 2024, arXiv 2404.00498; Page 2018).

    Args:
      images: uint8 (n, H, W, C); the first 5,000 are looked at.
      mean, std: of the pixels in [0, 1], (C,) each, as `models` standardises them.

    Returns:
      float32 (2, 2, C, 8 C), in the layout of a convolution's kernel.
    """
    chosen = images[:MOST_IMAGES]
    channels = chosen.shape[-1]
    size = PATCH * PATCH * channels
    total, products, count = np.zeros(size), np.zeros((size, size)), 0
    for start in range(0, len(chosen), 500):
        x = (chosen[start : start + 500].astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
        windows = np.lib.stride_tricks.sliding_window_view(x, (PATCH, PATCH), axis=(1, 2))
        # (n, h, w, C, row, column) to rows of (row, column, C).
        patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size).astype(np.float64)
        total += patches.sum(0)
        products += patches.T @ patches
        count += len(patches)
    centre = total / count
    variances, directions = np.linalg.eigh(products / count - np.outer(centre, centre))
    filters = (directions / np.sqrt(variances.clip(min=0) + FLOOR))[:, ::-1].reshape(PATCH, PATCH, channels, size)
    return np.concatenate([filters, -filters], axis=-1).astype(np.float32)
