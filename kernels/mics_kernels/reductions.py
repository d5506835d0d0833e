"""Reductions of per-row losses: mean over the rows that count, sum, none."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def reduce(losses: Tensor, count: Tensor, reduction: str) -> Tensor:
    """Reduce losses, in which rows that do not count are 0.

    Args:
        losses: tensor of any shape.
        count: number of rows that count, 0-d, on the same device.
        reduction: "mean" (the sum divided by ``count``; 0 if that is 0), "sum" or "none".
    """
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / count.clamp(min=1)
