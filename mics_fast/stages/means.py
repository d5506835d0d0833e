"""Means over the rows of all ranks that count."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_fast.engine.distributed import sum_over_ranks, world_size


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values whose mask is True; 0 where none is. Others may hold anything.

    This rank's part of the mean over all ranks, as ``part_of_mean`` gives it.
    """
    kept = torch.where(mask, values, torch.zeros_like(values))
    return part_of_mean(kept.sum(), mask.sum())


def part_of_mean(total: Tensor, count: Tensor) -> Tensor:
    """This rank's part of a mean over the rows of all ranks.

    How many rows count differs between ranks, so the mean of the ranks' means is not the mean.
    These parts are scaled such that their mean over the ranks, which is what becomes of losses
    and gradients, is the sum of all ranks' totals over the sum of their counts.

    Args:
        total: 0-d sum over this rank's rows that count.
        count: 0-d int64, how many they are.

    Returns:
        0-d; 0 where no rank has a row that counts.
    """
    return total * world_size() / sum_over_ranks(count).clamp(min=1)
