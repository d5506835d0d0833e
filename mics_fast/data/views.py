"""Views: colour and normalisation of square frames, in torch, on the batch's device.

Both are linear in a pixel, so they cost three multiply-adds per value here; DALI's colour operator
took longer on a CPU than decoding half of the frame.

The colour of a pixel x = (r, g, b) in 0..255 becomes

    brightness * (contrast * T x + 128 * (1 - contrast)),  T = Y^-1 R(hue) diag(1, s, s) Y

clipped to 0..255, where Y goes from RGB to YIQ, s is the saturation factor and R turns the (I, Q)
plane by the hue.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mics_fast.data.augmentation import BRIGHTNESS, CONTRAST, HUE, SATURATION
from mics_fast.data.distortions import erased, warped
from mics_fast.options import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Added to the variance, in squared grey levels, so that noise in a flat channel is not amplified.
_VARIANCE_FLOOR = 1.0
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


class Changes(NamedTuple):
    """Pixel changes of a batch, beyond crop, flip and blur.

    Args:
        matrix: (B, 3, 3), multiplies each pixel.
        offset: (B,), added to each pixel.
        affine: (B, 2, 3), rotation and shear; None: no distortion.
        boxes: (B, 4), erased; None: no box.
    """

    matrix: Tensor
    offset: Tensor
    affine: Tensor | None = None
    boxes: Tensor | None = None

    def of_sample(self, k: int) -> Changes:
        """Return the changes of one sample, as a batch of one."""
        own = slice(k, k + 1)
        affine = None if self.affine is None else self.affine[own]
        boxes = None if self.boxes is None else self.boxes[own]
        return Changes(self.matrix[own], self.offset[own], affine, boxes)


def make_view(planes: Tensor, modality: str, data: DataConfig, changes: Changes | None) -> Tensor:
    """Make the view of one modality.

    Args:
        planes: (B, 3, H, W) float32 of grey levels, 0..255.
        modality: its name, for mean and standard deviation.
        data: normalisation options.
        changes: of these samples; None: no augmentation.

    Returns:
        (B, 3, H, W) float32.
    """
    if changes is not None:
        if changes.affine is not None:
            planes = warped(planes, changes.affine)
        planes = coloured(planes, changes.matrix, changes.offset)
    view = _normalised(planes, modality, data)
    if changes is not None and changes.boxes is not None:
        view = erased(view, changes.boxes)
    return view


def _normalised(planes: Tensor, modality: str, data: DataConfig) -> Tensor:
    """Normalise grey levels for the encoders."""
    if data.normalize == "image":
        variance, mean = torch.var_mean(planes, (2, 3), correction=0, keepdim=True)
        return (planes - mean) * (variance + _VARIANCE_FLOOR).rsqrt()
    mean = _levels(tuple(data.mean.get(modality, IMAGENET_MEAN)), planes.device)
    std = _levels(tuple(data.std.get(modality, IMAGENET_STD)), planes.device)
    return (planes - mean).div_(std)


@lru_cache
def _levels(shares: tuple[float, ...], device: torch.device) -> Tensor:
    """Convert fractions of white to grey levels, (3, 1, 1)."""
    return 255 * torch.tensor(shares, device=device).reshape(3, 1, 1)


def coloured(planes: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Apply matrix and offset of ``Changes`` to (B, 3, H, W) float32 pixels in 0..255."""
    # Not a matrix product: some GPUs round it to ten bits, and results may depend on the batch.
    changed = offset[:, None, None, None].expand_as(planes).contiguous()
    for channel in range(3):
        changed.addcmul_(matrix[:, :, channel, None, None], planes[:, channel : channel + 1])
    return changed.clamp_(0, 255)


def colours_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return matrix and offset, float32, for (B, 5) colour numbers as in ``Augmentation``."""
    matrix, offset = colour_matrices(numbers.astype(np.float64))
    return matrix.astype(np.float32), offset.astype(np.float32)


def colour_matrices(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix for a pixel, (B, 3, 3), and the offset of its channels, (B,)."""
    hue = np.radians(numbers[:, HUE])
    saturation, zero, one = numbers[:, SATURATION], np.zeros(len(hue)), np.ones(len(hue))
    cosine, sine = saturation * np.cos(hue), saturation * np.sin(hue)
    turn = np.array([[one, zero, zero], [zero, cosine, sine], [zero, -sine, cosine]])
    matrix = np.linalg.inv(_YIQ) @ turn.transpose(2, 0, 1) @ _YIQ
    brightness, contrast = numbers[:, BRIGHTNESS], numbers[:, CONTRAST]
    return (
        (brightness * contrast)[:, None, None] * matrix,
        brightness * 128 * (1 - contrast),
    )
