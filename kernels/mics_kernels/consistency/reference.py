"""The consistency losses as formulas: the specification of every other file in this folder.

Shapes: B samples, D feature width, K keys, Q queue rows, V modalities, N = K + Q. Inputs of any
float dtype; losses are float32, or float64 for float64 queries. The logits are materialised here
(B x N). Derivation and sources: README.md beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels.consistency.records import ConsistencyInputs


def losses_and_counted(inputs: ConsistencyInputs) -> tuple[Tensor, Tensor]:
    """Compute losses (P, B) of P ordered pairs of modalities, and mark those that count."""
    results = [_losses_of_pair(inputs, a, b) for a, b in inputs.pairs]
    losses, counted = zip(*results, strict=True)
    return torch.stack(losses), torch.stack(counted)


def _losses_of_pair(inputs: ConsistencyInputs, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Losses (B,) of the queries of modality a against the keys of modality b, 0 where they do not
    count, and which of them count (B,) bool."""
    query, teacher, keys = inputs.queries[a], inputs.teachers[a], inputs.keys[b]
    queue = inputs.queues[b] if inputs.queues else None
    queue_ids = inputs.queue_ids[b] if inputs.queue_ids else None
    rows, temperature = len(query), inputs.temperature
    readable = _readable(inputs, b)
    counted = readable[:rows]
    if inputs.present is not None:
        counted = counted & inputs.present[:rows, a]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    pool = keys.to(dtype) if queue is None else torch.cat([keys.to(dtype), queue.to(dtype)])
    # Before the products: zero times NaN is NaN, also in the gradient.
    pool = torch.where(readable.unsqueeze(1), pool, 0.0)
    query = torch.where(counted.unsqueeze(1), query.to(dtype), 0.0)
    teacher = torch.where(counted.unsqueeze(1), teacher.to(dtype), 0.0)

    allowed = _allowed(readable, counted, inputs.key_ids, queue_ids, rows)
    with torch.autocast(query.device.type, enabled=False):  # it would round the products
        logits = query @ pool.T / temperature  # scaled first, then masked: -inf / T has no gradient
        log_sum = logits.masked_fill(~allowed, -torch.inf).logsumexp(1)
        targets = _targets(teacher, pool, allowed, temperature, inputs.alpha)
        losses = log_sum - (targets * logits).sum(1)
    return torch.where(counted, losses, 0.0), counted


def _readable(inputs: ConsistencyInputs, b: int) -> Tensor:
    """Mark the keys and queue rows of modality b that may be read, (N,) bool."""
    keys = inputs.keys[b]
    readable = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    if inputs.present is not None:
        readable = readable & inputs.present[:, b]
    if inputs.key_ids is not None:
        readable = readable & (inputs.key_ids >= 0)
    if not inputs.queues:
        return readable
    queue = inputs.queues[b]
    length = inputs.queue_lengths[b] if inputs.queue_lengths else len(queue)
    filled = torch.arange(len(queue), device=queue.device) < length
    if inputs.queue_ids:
        filled = filled & (inputs.queue_ids[b] >= 0)
    return torch.cat([readable, filled])


def _allowed(
    readable: Tensor,
    counted: Tensor,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    rows: int,
) -> Tensor:
    """Mark the keys in the softmax of each query, (B, N) bool.

    Queries that do not count keep all keys, so that no softmax is empty.
    """
    allowed = readable.unsqueeze(0) | ~counted.unsqueeze(1)
    if key_ids is None:
        return allowed
    own_ids = key_ids[:rows].unsqueeze(1)
    if queue_ids is None:  # equal to no query's id: a query that counts has none below 0
        queue_ids = key_ids.new_full((len(readable) - len(key_ids),), -1)
    repeats = own_ids == torch.cat([key_ids, queue_ids])
    positive = torch.eye(*repeats.shape, dtype=torch.bool, device=repeats.device)
    return allowed & (positive | ~repeats)


def _targets(
    teacher: Tensor,
    pool: Tensor,
    allowed: Tensor,
    temperature: float | Tensor,
    alpha: float | Tensor,
) -> Tensor:
    """Compute the targets ``alpha softmax(teacher . keys / T) + (1 - alpha) onehot``, (B, N)."""
    with torch.no_grad():
        logits = (teacher @ pool.T / temperature).masked_fill(~allowed, -torch.inf)
        positive = torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
        return alpha * logits.softmax(1) + (1.0 - alpha) * positive
