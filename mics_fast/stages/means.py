"""Masked means and class moments over the rows of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_fast.engine.distributed import sum_over_ranks, world_size
from mics_kernels import ClassMoments


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average the values whose mask is True; 0 if there are none. Other values are never read.

    The result is this rank's share of the mean over all ranks; see ``part_of_mean``.
    """
    kept = torch.where(mask, values, 0.0)
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


def moments_over_ranks(own: ClassMoments) -> ClassMoments:
    """Compute the class moments of the rows of all ranks from those of each.

    Two sums over the ranks, of C (1 + D) and C D numbers, whatever the number of rows: first the
    common means, then the squared deviations from them.

    Args:
        own: of this rank's rows.

    Returns:
        Moments of all rows, equal on all ranks; mean and m2 in float64 if there are several ranks.
    """
    if world_size() == 1:
        return own
    count = own.count.unsqueeze(1)
    total, weighted = sum_over_ranks(torch.cat([count, count * own.mean.double()], 1)).split(
        [1, own.mean.shape[1]], dim=1
    )
    mean = weighted / torch.where(total > 0, total, 1.0)
    apart = own.mean.double() - mean
    m2 = sum_over_ranks(own.m2.double() + count * apart.square())
    return ClassMoments(total.squeeze(1), mean, m2)
