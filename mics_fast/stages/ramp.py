"""Ramps: weights that grow over training, computed on the device from the step."""

from __future__ import annotations

import torch
from torch import Tensor


def ramp(step: Tensor, end: float) -> Tensor:
    """Grow from 0 to 1 while ``step`` goes from 0 to ``end``; constant 1 for ``end`` = 0.

    Args:
        step: 0-d int64.
        end: number of steps, at least 0.

    Returns:
        0-d float64.
    """
    progress = step.double() / end if end > 0 else torch.ones_like(step, dtype=torch.float64)
    return progress.clamp(max=1.0)


def ramps(step: Tensor, ends: Tensor) -> Tensor:
    """Compute several ramps at once.

    Args:
        step: 0-d int64.
        ends: (R,) float64, numbers of steps, at least 0.

    Returns:
        (R,) float64.
    """
    return torch.where(ends > 0, step / ends, 1.0).clamp(max=1.0)
