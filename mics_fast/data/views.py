"""From square uint8 frames to views: colour and normalisation, in torch, where the batch lives.

Both are linear in a pixel, so they cost three multiplications and additions a value here; DALI's
colour operator took longer on a CPU than decoding half of the frame.

The colour of a pixel x = (r, g, b) in 0..255 becomes

    brightness * (contrast * T x + 128 * (1 - contrast)),  T = Y^-1 R(hue) diag(1, s, s) Y

clipped to 0..255, where Y goes from RGB to YIQ, s is the saturation factor and R turns the (I, Q)
plane by the hue.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mics_fast.config import DataConfig
from mics_fast.data.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Added to the variance in squared grey levels: the rounding of a flat channel stays small.
_VARIANCE_FLOOR = 1.0
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def make_view(
    frames: Tensor, modality: str, data: DataConfig, colours: np.ndarray | None
) -> Tensor:
    """The view of one modality.

    Args:
        frames: (B, H, W, 3) uint8.
        modality: its name, for mean and standard deviation.
        data: how to normalise.
        colours: (B, 5) colour numbers of each sample, as in ``Augmentation``; None: no change.

    Returns:
        (B, 3, H, W) float32.
    """
    planes = frames.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if colours is not None:
        planes = coloured(planes, colours)
    if data.normalize == "image":
        variance, mean = torch.var_mean(planes, (2, 3), correction=0, keepdim=True)
        return (planes - mean) * (variance + _VARIANCE_FLOOR).rsqrt()
    mean, std = (
        255 * torch.tensor(values, device=planes.device).reshape(3, 1, 1)
        for values in (
            data.mean.get(modality, IMAGENET_MEAN),
            data.std.get(modality, IMAGENET_STD),
        )
    )
    return planes.sub_(mean).div_(std)


def coloured(planes: Tensor, numbers: np.ndarray) -> Tensor:
    """(B, 3, H, W) float32 in 0..255, changed by the (B, 5) colour numbers of its samples."""
    matrix, offset = (
        torch.from_numpy(values.astype(np.float32)).to(planes.device)
        for values in colour_matrices(numbers.astype(np.float64))
    )
    # Not as a matrix product, which some GPUs round to ten bits and which may depend on the batch.
    changed = offset[:, None, None, None]
    for channel in range(3):
        weights = matrix[:, :, channel, None, None]
        changed = torch.addcmul(changed, weights, planes[:, channel : channel + 1])
    return changed.clamp_(0, 255)


def colour_matrices(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, 3, 3) and (B,): what multiplies a pixel, and what is added to each of its channels."""
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
