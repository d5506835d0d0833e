"""Masked means over the rows of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_fast.engine.distributed import sum_over_ranks, world_size


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average the values whose mask is True; 0 if there are none. Other values are never read.

    The result is this rank's share of the mean over all ranks; see ``part_of_mean``.
    """
    kept = torch.where(mask, values, torch.zeros_like(values))
    return part_of_mean(kept.sum(), mask.sum())


def part_of_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return this rank's share of a mean over the rows of all ranks.

    Ranks may have different numbers of rows, so the mean of their means is not the overall mean.
    These shares are scaled so that their average over the ranks, which is what training takes of
    losses and gradients, equals the sum of all totals over the sum of all counts.

    Args:
        total: 0-d sum over this rank's valid rows.
        count: 0-d int64, number of these rows.

    Returns:
        0-d; 0 if no rank has a valid row.
    """
    return total * world_size() / sum_over_ranks(count).clamp(min=1)
