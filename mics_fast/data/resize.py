"""Resize and blur on a CPU, in torch, equal to the DALI graph on a GPU.

DALI's own resize takes as long on a CPU as its decoder. Along one axis, resize and blur are both
weighted sums of lines: line i of the result is sum_k weight[i, k] * line[index[i, k]], which
``embedding_bag`` computes for words and their embeddings. All sums are float32 in a fixed order, so
the number of threads does not matter. The frame is rounded once after the resize and once after the
blur, as in the graph.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Taps = tuple[Tensor, Tensor]
"""For each output line, the indices of its input lines, (N, K) int32, and their weights, (N, K)."""


def resized_square(frame: Tensor, side: int, region: np.ndarray) -> Tensor:
    """Resize a region of a frame to a square.

    The filter is a triangle that widens with the scale (antialiased), with half-pixel centres.
    Beyond the border the frame repeats its last pixel.

    Args:
        frame: (H, W, 3) uint8.
        side: of the square, pixels.
        region: (4,) top, left, bottom, right as fractions of the frame; swapped ends flip it.

    Returns:
        (3, side, side) float32 whole grey levels; strides are arbitrary.
    """
    top, left, bottom, right = region.tolist()
    first, last, rows = _triangle(frame.shape[0], side, top, bottom)
    frame = frame[first:last]
    first, last, columns = _triangle(frame.shape[1], side, left, right)
    frame = frame[:, first:last]
    lines = _weighted(frame.to(torch.float32, memory_format=torch.contiguous_format), rows)
    return _weighted(lines.permute(1, 2, 0), columns).round_().permute(1, 2, 0)


def blurred(square: Tensor, sigma: float) -> Tensor:
    """Blur a square by a Gaussian of 2 * ceil(3 * sigma) + 1 taps, mirrored at its last pixels.

    Args:
        square: (3, H, W) float32.
        sigma: in pixels; 0: no change.

    Returns:
        (3, H, W) float32 whole grey levels; strides are arbitrary.
    """
    # Columns first: their lines are contiguous in the output of ``resized_square``.
    lines = _weighted(square.permute(2, 0, 1), _gaussian(square.shape[2], sigma))
    rows = _weighted(lines.permute(2, 1, 0), _gaussian(square.shape[1], sigma))
    return rows.round_().permute(1, 0, 2)


def _weighted(lines: Tensor, taps: Taps) -> Tensor:
    """Return (N, ...) weighted sums of lines (M, ...)."""
    index, weight = taps
    sums = torch.nn.functional.embedding_bag(
        index, lines.reshape(len(lines), -1), per_sample_weights=weight, mode="sum"
    )
    return sums.view(-1, *lines.shape[1:])


@lru_cache(maxsize=8)
def _triangle(length: int, side: int, start: float, end: float) -> tuple[int, int, Taps]:
    """Return the first input line, the one after the last, and the taps relative to the first.

    Cached for the other images of a pair, which mostly have the same size.
    """
    step = (end - start) * length / side
    centres = start * length + (np.arange(side) + 0.5) * step - 0.5
    reach = max(1.0, abs(step))
    index = np.floor(centres - reach)[:, None] + np.arange(1, np.ceil(2 * reach) + 1)
    weight = np.maximum(0.0, 1 - np.abs(index - centres[:, None]) / reach)
    index = index.clip(0, length - 1)
    first = index.min()
    return int(first), int(index.max()) + 1, _taps(index - first, weight)


def _gaussian(length: int, sigma: float) -> Taps:
    """Return the taps of a Gaussian, mirrored at the first and the last line."""
    reach = int(np.ceil(3 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    period = max(1, 2 * (length - 1))
    index = np.abs(np.arange(length)[:, None] + offsets) % period
    return _taps(np.minimum(index, period - index), np.broadcast_to(weight, index.shape))


def _taps(index: np.ndarray, weight: np.ndarray) -> Taps:
    """Normalise weights to sum 1, and convert to taps."""
    weight = weight / weight.sum(1, keepdims=True)
    return torch.from_numpy(index.astype(np.int32)), torch.from_numpy(weight.astype(np.float32))
