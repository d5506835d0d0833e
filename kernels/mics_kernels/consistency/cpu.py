"""The consistency losses in C++ (csrc/consistency_cpu.cpp), vectorised and multithreaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.addresses import address, dtype_name
from mics_kernels.consistency.records import ConsistencyInputs, ConsistencyResults


def losses_and_gradients(inputs: ConsistencyInputs) -> ConsistencyResults:
    """Compute the losses of the ordered pairs and their gradients in one sweep over the keys."""
    inputs = _as_read(inputs)  # kept alive until the native call returns
    query, pairs = inputs.queries[0], inputs.pairs
    rows, dim = query.shape
    wanted = inputs.want_gradient
    results = ConsistencyResults(
        query.new_empty((len(pairs), rows)),
        query.new_empty((len(pairs), rows), dtype=torch.bool),
        query.new_empty((len(pairs), rows, dim) if wanted else 0),
        query.new_empty((len(pairs), rows) if wanted else 0),
    )
    _native.consistency_cpu(
        [_pair(inputs, results, *pair) for pair in enumerate(pairs)],
        key_ids=address(inputs.key_ids),
        queries=rows,
        keys=len(inputs.keys[0]),
        present_stride=len(inputs.queries),
        dim=dim,
        temperature=float(inputs.temperature),
        alpha=float(inputs.alpha),
        want_gradient=wanted,
        threads=torch.get_num_threads(),
    )
    return results


def _as_read(inputs: ConsistencyInputs) -> ConsistencyInputs:
    """Prepare the record for the native call: contiguous, known dtypes, lengths in range.

    Queries and teachers are float32; keys and queues are read in half precision, too.
    """
    return inputs._replace(
        queries=[query.to(torch.float32).contiguous() for query in inputs.queries],
        teachers=[teacher.to(torch.float32).contiguous() for teacher in inputs.teachers],
        keys=[_readable(key) for key in inputs.keys],
        queues=[_readable(queue) for queue in inputs.queues],
        queue_lengths=_lengths(inputs.queues, inputs.queue_lengths),
        key_ids=None if inputs.key_ids is None else inputs.key_ids.contiguous(),
        queue_ids=[ids.contiguous() for ids in inputs.queue_ids],
        present=None if inputs.present is None else inputs.present.contiguous(),
    )


def _pair(
    inputs: ConsistencyInputs, results: ConsistencyResults, index: int, modalities: tuple[int, int]
) -> _native.ConsistencyPair:
    a, b = modalities
    queue = inputs.queues[b] if inputs.queues else None
    present = inputs.present
    wanted = inputs.want_gradient
    return _native.ConsistencyPair(
        query=address(inputs.queries[a]),
        teacher=address(inputs.teachers[a]),
        query_present=0 if present is None else address(present) + a,
        keys=address(inputs.keys[b]),
        keys_dtype=dtype_name(inputs.keys[b]),
        queue=address(queue),
        queue_dtype=dtype_name(inputs.keys[b] if queue is None else queue),
        key_present=0 if present is None else address(present) + b,
        queue_ids=address(inputs.queue_ids[b] if inputs.queue_ids else None),
        queue_length=int(inputs.queue_lengths[b]) if inputs.queue_lengths else 0,
        losses=address(results.losses[index]),
        counted=address(results.counted[index]),
        gradient=address(results.gradient[index]) if wanted else 0,
        temperature=address(results.slope[index]) if wanted else 0,
    )


def _lengths(queues: Sequence[Tensor], lengths: Sequence[int | Tensor]) -> list[int | Tensor]:
    """Return the rows to read as ints, limited to the existing ones even if unchecked."""
    rows = [len(queue) for queue in queues]
    if not lengths:
        return [*rows]
    return [min(max(int(n), 0), most) for n, most in zip(lengths, rows, strict=True)]


def _readable(keys: Tensor) -> Tensor:
    """Convert keys to a dtype of the native call; float64 is rounded to float32."""
    return keys.to(torch.float32 if keys.dtype == torch.float64 else keys.dtype).contiguous()
