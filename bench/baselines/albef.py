"""ALBEF's contrastive loss, reimplemented as published (salesforce/ALBEF)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def albef(
    query: Tensor,
    teacher: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    temperature: Tensor | float,
    alpha: Tensor | float,
) -> Tensor:
    """Compute one direction of the soft-target contrastive loss with materialised scores; 0-d.

    Args:
        query, teacher, keys: (B, D), normalised; row i of ``keys`` is the positive of query i.
        columns: (D, Q), the queue as published: one column per feature, copied behind the keys.
        temperature: divides the scores.
        alpha: weight of the teacher's distribution in the targets.
    """
    pool = torch.cat([keys.T, columns.clone().detach()], dim=1)
    with torch.no_grad():
        soft = teacher @ pool / temperature
        target = torch.zeros_like(soft).fill_diagonal_(1)
        target = alpha * F.softmax(soft, dim=1) + (1 - alpha) * target
    logits = query @ pool / temperature
    return -(F.log_softmax(logits, dim=1) * target).sum(1).mean()


def albef_of_two(
    features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    queues: Sequence[Tensor],
    *,
    temperature: Tensor | float,
    alpha: Tensor | float,
    reduction: str,
    **masks: object,
) -> Tensor:
    """Compute both directions, with the arguments of ``multimodal_consistency_loss``; 0-d.

    Args:
        features, teachers, queues: two each; the queues are full, (Q, D).
        reduction: "sum" over rows and directions.
        masks: ids, lengths and presence, which the published loss ignores: all rows must be
            complete and distinct.
    """
    assert reduction == "sum", reduction
    losses = [
        albef(features[own], teachers[own], teachers[other], queues[other].T,
              temperature=temperature, alpha=alpha)
        for own, other in ((0, 1), (1, 0))
    ]  # fmt: skip
    return len(features[0]) * torch.stack(losses).sum()
