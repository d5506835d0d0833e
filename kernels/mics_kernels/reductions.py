"""From one loss a row to what the caller asked for."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def reduce(losses: Tensor, count: Tensor, reduction: str) -> Tensor:
    """Reduce losses; those of rows that do not count are already zero.

    Args:
        losses: any shape.
        count: how many rows count, a 0-d tensor: it may be known to the device only.
        reduction: "mean" (the sum over ``count``; 0 where nothing counts), "sum" or "none".
    """
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / count.clamp(min=1)
