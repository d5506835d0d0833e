"""Latest rows of each class, and the directions they span around their mean.

Shapes: B rows, D feature width, C classes, r rows kept per class. No host synchronisation: the slot
of each row is computed in tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RecentRows(NamedTuple):
    """Up to r rows of each class, newest last, after the free slots.

    Args:
        rows: (C, r, D) float32.
        weight: (C, r) float64, 0 in a free slot.
    """

    rows: Tensor
    weight: Tensor


def latest_rows(
    features: Tensor, target: Tensor, weight: Tensor | None, classes: int, size: int
) -> RecentRows:
    """Select the last ``size`` rows of each class in a batch; arguments as ``class_moments``.

    A row with posteriors counts for its most probable class, by that probability.
    """
    if target.dim() == 2:
        share, target = target.max(1)
        share = share.double()
    else:
        share = torch.ones_like(target, dtype=torch.float64)
    if weight is not None:
        share = share * weight.double()
    counts = (target >= 0) & (target < classes) & (share > 0)
    member = counts.unsqueeze(1) & (
        target.unsqueeze(1) == torch.arange(classes, device=target.device)
    )
    later = member.long().flip(0).cumsum(0).flip(0) - 1  # rows of the class after this one
    label = target.clamp(0, classes - 1).unsqueeze(1)
    slot = size - 1 - later.gather(1, label)
    # Rows without a slot go to an extra slot after the last one, which is dropped below.
    place = torch.where(counts.unsqueeze(1) & (slot >= 0), label * size + slot, classes * size)
    source = torch.full((classes * size + 1,), len(features), device=target.device)
    source = source.scatter(0, place.squeeze(1), torch.arange(len(features), device=target.device))
    source = source[:-1].reshape(classes, size)
    # Free slots read a row of zeros after the batch.
    padded = torch.cat([features.float(), features.new_zeros(1, features.shape[1]).float()])
    return RecentRows(padded[source], torch.cat([share, share.new_zeros(1)])[source])


def append_rows(old: RecentRows, new: RecentRows) -> RecentRows:
    """Keep the latest rows of each class when ``new`` rows follow ``old`` ones."""
    size = old.weight.shape[1]
    added = (new.weight > 0).sum(1, keepdim=True)
    slot = torch.arange(size, device=added.device)
    is_new = slot >= size - added
    moved = (slot + added).clamp(max=size - 1)  # previous slot of the old row
    rows = old.rows.gather(1, moved.unsqueeze(2).expand_as(old.rows))
    return RecentRows(
        torch.where(is_new.unsqueeze(2), new.rows, rows),
        torch.where(is_new, new.weight, old.weight.gather(1, moved)),
    )


def centred_directions(recent: RecentRows) -> Tensor:
    """Compute ``R`` (C, r, D) float32 so that ``R^T R / r`` is the rows' weighted covariance."""
    size = recent.weight.shape[1]
    mass = recent.weight.sum(1, keepdim=True)
    share = (recent.weight / torch.where(mass > 0, mass, 1.0)).unsqueeze(2)
    rows = recent.rows.double()
    return ((rows - (share * rows).sum(1, keepdim=True)) * (size * share).sqrt()).float()
