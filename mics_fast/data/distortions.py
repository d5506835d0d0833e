"""Distortions of the strong view, in torch: rotation, shear and erased boxes.

The square is rotated and sheared about its centre, equally for both modalities of a pair. Then one
box per modality is erased, at independent positions, so that the other modality may show what one
lacks. Pixels beyond the border are mirrored. An erased box is 0 after normalisation: the mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def warped(planes: Tensor, affine: Tensor) -> Tensor:
    """Rotate and shear squares, with bilinear interpolation.

    Args:
        planes: (B, 3, H, W) float32.
        affine: (B, 2, 3) float32, maps output positions to input positions, as in
            ``affine_grid``.

    Returns:
        (B, 3, H, W) float32.
    """
    grid = affine_grid(affine, list(planes.shape), align_corners=False)
    return grid_sample(planes, grid, padding_mode="reflection", align_corners=False)


def erased(view: Tensor, boxes: Tensor) -> Tensor:
    """Set the pixels whose centre lies inside a box to 0.

    Args:
        view: (B, 3, H, W).
        boxes: (B, 4) top, left, bottom, right as fractions of the square; an empty box erases
            nothing.
    """
    height, width = view.shape[2:]
    top, left, bottom, right = boxes.to(view.dtype).unsqueeze(-1).unbind(1)
    rows = (torch.arange(height, device=view.device, dtype=view.dtype) + 0.5) / height
    columns = (torch.arange(width, device=view.device, dtype=view.dtype) + 0.5) / width
    inside = ((rows >= top) & (rows < bottom)).unsqueeze(2)
    inside = inside & ((columns >= left) & (columns < right)).unsqueeze(1)
    return view.masked_fill(inside.unsqueeze(1), 0.0)


def affine_of(angle: float, shear: float) -> np.ndarray:
    """Return the matrix, (2, 3) float32, of a shear along the rows, then a rotation; in degrees."""
    turn, slant = np.radians(angle), np.tan(np.radians(shear))
    cosine, sine = np.cos(turn), np.sin(turn)
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    matrix = rotation @ np.array([[1.0, slant], [0.0, 1.0]])
    return np.concatenate([matrix, np.zeros((2, 1))], axis=1).astype(np.float32)


def boxes_of(largest: float, uniform: np.ndarray) -> np.ndarray:
    """Map (M, 4) uniform numbers to (M, 4) float32 boxes inside the square.

    The area is uniform up to ``largest``, the logarithm of the aspect ratio is uniform between
    log(1/2) and log(2), and the position is uniform. Sides are clipped to the square's.
    """
    area, ratio = largest * uniform[:, 0], 2.0 ** (2 * uniform[:, 1] - 1)
    sides = np.minimum(np.sqrt([area * ratio, area / ratio]), 1.0).T
    start = uniform[:, 2:] * (1 - sides)
    return np.concatenate([start, start + sides], axis=1).astype(np.float32)
