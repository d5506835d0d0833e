"""The consistency losses in C++ (csrc/consistency_cpu.cpp), vectorised and multithreaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.addresses import address, dtype_name


class _Inputs(NamedTuple):
    """What the native call reads: contiguous, in dtypes it knows; kept alive until it returns."""

    queries: list[Tensor]
    teachers: list[Tensor]
    keys: list[Tensor]
    queues: list[Tensor]
    lengths: list[int]
    key_ids: Tensor | None
    queue_ids: list[Tensor]
    present: Tensor | None


def losses_and_gradients(
    queries: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keys: Sequence[Tensor],
    queues: Sequence[Tensor],
    temperature: float | Tensor,
    alpha: float | Tensor,
    queue_lengths: Sequence[int | Tensor],
    key_ids: Tensor | None,
    queue_ids: Sequence[Tensor],
    present: Tensor | None,
    pairs: Sequence[tuple[int, int]],
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of P ordered pairs of modalities, and their gradients, in one sweep over the keys.

    Args:
        queries: V of (B, D), one dtype; float32 / bfloat16 / float16, as the teachers.
        teachers: V of (B, D).
        keys: V of (K, D), K >= B.
        queues: V of (Q, D), or empty.
        temperature: a number, or a 0-d tensor.
        alpha: likewise.
        queue_lengths: V numbers or 0-d int64 tensors, or empty: all rows.
        key_ids: (K,) int64, or None.
        queue_ids: V of (Q,) int64, or empty.
        present: (K, V) bool, or None.
        pairs: (a, b): the queries of a against the keys of b.
        want_gradient: whether to compute it; without it half of the products are saved.

    Returns:
        losses (P, B) float32, 0 where a query does not count; whether it counts (P, B) bool;
        d losses / d queries (P, B, D) and d losses / d temperature (P, B), float32, both empty
        where not wanted.
    """
    inputs = _Inputs(
        [query.to(torch.float32).contiguous() for query in queries],
        [teacher.to(torch.float32).contiguous() for teacher in teachers],
        [_readable(key) for key in keys],
        [_readable(queue) for queue in queues],
        _lengths(queues, queue_lengths),
        None if key_ids is None else key_ids.contiguous(),
        [ids.contiguous() for ids in queue_ids],
        None if present is None else present.contiguous(),
    )
    query = inputs.queries[0]
    rows, dim = query.shape
    losses = query.new_empty((len(pairs), rows))
    counted = query.new_empty((len(pairs), rows), dtype=torch.bool)
    gradient = query.new_empty((len(pairs), rows, dim) if want_gradient else 0)
    slope = query.new_empty((len(pairs), rows) if want_gradient else 0)
    _native.consistency_cpu(
        [
            _pair(
                inputs,
                a,
                b,
                losses[p],
                counted[p],
                *((x[p] if want_gradient else x) for x in (gradient, slope)),
            )
            for p, (a, b) in enumerate(pairs)
        ],
        key_ids=address(inputs.key_ids),
        queries=rows,
        keys=len(keys[0]),
        present_stride=len(queries),
        dim=dim,
        temperature=float(temperature),
        alpha=float(alpha),
        want_gradient=want_gradient,
        threads=torch.get_num_threads(),
    )
    return losses, counted, gradient, slope


def _pair(
    inputs: _Inputs,
    a: int,
    b: int,
    losses: Tensor,
    counted: Tensor,
    gradient: Tensor,
    slope: Tensor,
) -> _native.ConsistencyPair:
    queue = inputs.queues[b] if inputs.queues else None
    present = inputs.present
    return _native.ConsistencyPair(
        query=inputs.queries[a].data_ptr(),
        teacher=inputs.teachers[a].data_ptr(),
        query_present=0 if present is None else present.data_ptr() + a,
        keys=inputs.keys[b].data_ptr(),
        keys_dtype=dtype_name(inputs.keys[b]),
        queue=address(queue),
        queue_dtype=dtype_name(inputs.keys[b] if queue is None else queue),
        key_present=0 if present is None else present.data_ptr() + b,
        queue_ids=address(inputs.queue_ids[b] if inputs.queue_ids else None),
        queue_length=inputs.lengths[b] if inputs.lengths else 0,
        losses=losses.data_ptr(),
        counted=counted.data_ptr(),
        gradient=gradient.data_ptr(),
        temperature=slope.data_ptr(),
    )


def _lengths(queues: Sequence[Tensor], lengths: Sequence[int | Tensor]) -> list[int]:
    """Rows to read; in a compiled graph nobody has looked whether the queue has as many."""
    rows = [len(queue) for queue in queues]
    if not lengths:
        return rows
    return [min(max(int(n), 0), most) for n, most in zip(lengths, rows, strict=True)]


def _readable(keys: Tensor) -> Tensor:
    """float64 keys are rounded; the others are read as they are."""
    return keys.to(torch.float32 if keys.dtype == torch.float64 else keys.dtype).contiguous()
