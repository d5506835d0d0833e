"""The consistency losses as formulas: the specification of every other file in this folder.

Shapes: B samples, D feature width, K keys, Q queue rows, V modalities, N = K + Q. Inputs of any
float dtype; losses are float32, or float64 for float64 queries. The logits are materialised here
(B x N). Derivation and sources: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def consistency_loss(
    query: Tensor,
    teacher: Tensor,
    keys: Tensor,
    queue: Tensor | None,
    temperature: float | Tensor,
    alpha: float | Tensor,
    queue_length: int | Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    rows: Tensor | None = None,
    key_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each query (B,), 0 where it does not count, and which queries count (B,) bool.

    Args:
        rows: (B,) bool; a query marked False does not count and is never read.
        key_rows: (K,) bool; a key marked False is never read.
        The others: see ``mics_kernels.consistency_loss``.
    """
    readable = _readable(keys, queue, queue_length, key_ids, queue_ids, key_rows)
    counted = readable[: len(query)] if rows is None else readable[: len(query)] & rows
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    pool = keys.to(dtype) if queue is None else torch.cat([keys.to(dtype), queue.to(dtype)])
    # Before the products: zero times NaN is NaN, also in the gradient.
    pool = torch.where(readable.unsqueeze(1), pool, 0.0)
    query = torch.where(counted.unsqueeze(1), query.to(dtype), 0.0)
    teacher = torch.where(counted.unsqueeze(1), teacher.to(dtype), 0.0)

    allowed = _allowed(readable, counted, key_ids, queue_ids, len(query))
    with torch.autocast(query.device.type, enabled=False):  # it would round the products
        logits = query @ pool.T / temperature  # scaled first, then masked: -inf / T has no gradient
        log_sum = logits.masked_fill(~allowed, -torch.inf).logsumexp(1)
        targets = _targets(teacher, pool, allowed, temperature, alpha)
        losses = log_sum - (targets * logits).sum(1)
    return torch.where(counted, losses, 0.0), counted


def multimodal_consistency_loss(
    features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keys: Sequence[Tensor],
    queues: Sequence[Tensor] | None,
    temperature: float | Tensor,
    alpha: float | Tensor,
    queue_lengths: Sequence[int | Tensor] | None,
    key_ids: Tensor | None,
    queue_ids: Sequence[Tensor] | None,
    present: Tensor | None,
    pairs: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Losses of P ordered pairs of modalities (P, B), and which of them count.

    Args:
        pairs: which modality's queries are held against which one's keys.
        present: (K, V) bool, of the samples the keys belong to.
        The others: see ``mics_kernels.multimodal_consistency_loss``.
    """
    losses, counted = [], []
    for a, b in pairs:
        pair_losses, pair_counted = consistency_loss(
            features[a],
            teachers[a],
            keys[b],
            None if queues is None else queues[b],
            temperature,
            alpha,
            None if queue_lengths is None else queue_lengths[b],
            key_ids,
            None if queue_ids is None else queue_ids[b],
            rows=None if present is None else present[: len(features[a]), a],
            key_rows=None if present is None else present[:, b],
        )
        losses.append(pair_losses)
        counted.append(pair_counted)
    return torch.stack(losses), torch.stack(counted)


def _readable(
    keys: Tensor,
    queue: Tensor | None,
    queue_length: int | Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    key_rows: Tensor | None,
) -> Tensor:
    """(N,) bool: keys that are there, whoever asks."""
    readable = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    if key_rows is not None:
        readable = readable & key_rows
    if key_ids is not None:
        readable = readable & (key_ids >= 0)
    if queue is None:
        return readable
    queue_rows = torch.arange(len(queue), device=queue.device)
    filled = queue_rows < (len(queue) if queue_length is None else queue_length)
    if queue_ids is not None:
        filled = filled & (queue_ids >= 0)
    return torch.cat([readable, filled])


def _allowed(
    readable: Tensor,
    counted: Tensor,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    rows: int,
) -> Tensor:
    """(B, N) bool: keys in the softmax of each query.

    A query that does not count keeps them all, so that no softmax is empty.
    """
    allowed = readable.unsqueeze(0) | ~counted.unsqueeze(1)
    if key_ids is None:
        return allowed
    own_ids = key_ids[:rows].unsqueeze(1)
    if queue_ids is None:  # nobody's repeats: a query that counts has no negative id
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
    """``alpha softmax(teacher . keys / T) + (1 - alpha) onehot(positive)``, (B, N), a constant."""
    with torch.no_grad():
        logits = (teacher @ pool.T / temperature).masked_fill(~allowed, -torch.inf)
        positive = torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
        return alpha * logits.softmax(1) + (1.0 - alpha) * positive
