"""Contrastive consistency between modalities, with a momentum teacher and a queue of negatives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from mics_kernels import checks
from mics_kernels.backends import explain
from mics_kernels.consistency import boundary, reference
from mics_kernels.consistency.queue import FeatureQueue
from mics_kernels.consistency.records import ConsistencyInputs
from mics_kernels.reductions import REDUCTIONS, reduce

__all__ = ["FeatureQueue", "consistency_loss", "multimodal_consistency_loss"]


def consistency_loss(
    query: Tensor,
    teacher: Tensor,
    keys: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor,
    alpha: float | Tensor = 0.4,
    queue_length: int | Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Compute the contrastive loss of queries against keys, with soft targets from a teacher.

    Cross-entropy of ``softmax(query . keys / T)`` over keys and queue, under the target
    ``alpha * softmax(teacher . keys / T) + (1 - alpha) * onehot(positive)``. Row i of ``keys`` is
    the positive of query i.

    Args:
        query: (B, D), D >= 1, L2-normalised, float32 / bfloat16 / float16 (float64: reference
            only). Gets a gradient, in its own dtype.
        teacher: (B, D), the momentum teacher's features of the queries; no gradient.
        keys: (K, D), K >= B, the teacher's features of the other modality; no gradient.
        queue: (Q, D), older keys; no gradient.
        temperature: T > 0: a float, or a 0-d tensor on the same device, which may require a
            gradient (the soft targets contribute none).
        alpha: share of the teacher's soft target, in [0, 1]: a float, or a 0-d tensor on the same
            device, which a captured CUDA graph reads anew; no gradient.
        queue_length: number of queue rows to read, from the first: an int in [0, Q], or a 0-d int64
            tensor on the same device; default all.
        key_ids: (K,) int64, the sample (or group) of each key. A key with the id of query i, which
            is ``key_ids[i]``, is left out of both softmaxes unless it is the positive. A key with
            a negative id is never read; a query whose positive is not read has loss 0 and does
            not count.
        queue_ids: (Q,) int64, likewise; needs ``key_ids``.
        reduction: "mean" over the queries that count (0 if there are none), "sum", or "none": (B,).
        backend: see ``mics_kernels.backends``.

    Returns:
        The loss, float32 (float64 for a float64 query).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a value out of range, or an input that requires a
            gradient but gets none.

    Source: Li et al., Align before Fuse (ALBEF), NeurIPS 2021, equations 1, 2 and 6.

    Examples:
        >>> import torch
        >>> from mics_kernels import consistency_loss
        >>> query = torch.eye(4).requires_grad_()
        >>> teacher, queue = torch.eye(4), -torch.eye(4)
        >>> loss = consistency_loss(query, teacher, teacher, queue, temperature=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 3), tuple(query.grad.shape)
        (0.975, (4, 4))
    """
    _check_query("query", query)
    _check_features("teacher", teacher, query, len(query))
    _check_keys("keys", keys, query, "K")
    _check_queue("", queue, queue_length, queue_ids, query, key_ids)
    _check_ids("key_ids", key_ids, len(keys), query.device)
    _check_scalars(temperature, alpha, query.device, reduction)
    inputs = ConsistencyInputs(
        queries=[query],
        teachers=[teacher],
        keys=[keys],
        queues=[] if queue is None else [queue],
        temperature=temperature,
        alpha=alpha,
        queue_lengths=[] if queue_length is None else [queue_length],
        key_ids=key_ids,
        queue_ids=[] if queue_ids is None else [queue_ids],
        present=None,
        query_modalities=[0],
        key_modalities=[0],
        backend=explain("consistency", query, backend).backend,
    )
    losses, counted = _losses_and_counted(inputs)
    return reduce(losses[0], counted.sum(), reduction)


def multimodal_consistency_loss(
    features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    queues: Sequence[Tensor] | None = None,
    *,
    keys: Sequence[Tensor] | None = None,
    temperature: float | Tensor,
    alpha: float | Tensor = 0.4,
    queue_lengths: Sequence[int | Tensor] | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Sequence[Tensor] | None = None,
    present: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Compute ``consistency_loss`` of every modality against every other one.

    For each ordered pair (a, b): queries ``features[a]``, teacher ``teachers[a]``, keys
    ``keys[b]`` and ``queues[b]``.

    Args:
        features: V tensors (B, D), D >= 1, L2-normalised, one dtype; V >= 2, or 1 with ``pairs``.
            Get gradients.
        teachers: V tensors (B, D), the momentum teacher's features; no gradient.
        queues: V tensors (Q, D), older keys of each modality; no gradient.
        keys: V tensors (K, D), the teachers' features of all ranks, this rank's own B rows first;
            default ``teachers``.
        temperature: see ``consistency_loss``.
        alpha: see ``consistency_loss``.
        queue_lengths: V numbers of queue rows to read, ints or 0-d int64 tensors.
        key_ids: (K,) int64, shared by the modalities; see ``consistency_loss``.
        queue_ids: V tensors (Q,) int64; needs ``key_ids``.
        present: (B, V) bool. A pair counts in the rows where both modalities are present; an
            absent feature is never read, as query or as key. With gathered keys, (K, V) flags of
            all ranks; with (B, V) flags the keys of other ranks count as present.
        pairs: the ordered pairs (a, b), indices of modalities; default all with a != b. (a, a)
            contrasts two views of the same image, the student's and the teacher's.
        reduction: "mean" over the ordered pairs and rows that count (0 if there are none), "sum",
            or "none": (B,), the sum of each row over ordered pairs.
        backend: see ``mics_kernels.backends``.

    Returns:
        The loss, float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: as ``consistency_loss``.

    Source: Li et al., Align before Fuse (ALBEF), NeurIPS 2021, equations 1, 2 and 6.

    Examples:
        >>> import torch
        >>> from mics_kernels import multimodal_consistency_loss
        >>> wli, nbi = torch.eye(4).requires_grad_(), torch.eye(4).requires_grad_()
        >>> teachers = [torch.eye(4), torch.eye(4)]
        >>> present = torch.tensor([[True, True]] * 3 + [[True, False]])
        >>> losses = multimodal_consistency_loss(
        ...     [wli, nbi], teachers, temperature=0.5, present=present, reduction="none"
        ... )
        >>> [round(loss, 3) for loss in losses.tolist()]  # the last row has no pair
        [0.982, 0.982, 0.982, 0.0]
    """
    keys_of = "teachers" if keys is None else "keys"
    keys = teachers if keys is None else keys
    _check_lists(features, teachers, keys, queues, queue_lengths, queue_ids, pairs)
    query = features[0]
    _check_query("features[0]", query)
    for index in range(len(features)):
        checks.check_tensor(
            f"features[{index}]", features[index], query.shape, (query.dtype,), query.device
        )
        _check_features(f"teachers[{index}]", teachers[index], query, len(query))
        _check_keys(f"{keys_of}[{index}]", keys[index], query, len(keys[0]) if index else "K")
        _check_queue(
            f"[{index}]",
            None if queues is None else queues[index],
            None if queue_lengths is None else queue_lengths[index],
            None if queue_ids is None else queue_ids[index],
            query,
            key_ids,
            len(queues[0]) if queues and index else "Q",
        )
    _check_ids("key_ids", key_ids, len(keys[0]), query.device)
    _check_scalars(temperature, alpha, query.device, reduction)
    pairs = _checked_pairs(pairs, len(features))
    inputs = ConsistencyInputs(
        queries=list(features),
        teachers=list(teachers),
        keys=list(keys),
        queues=list(queues or ()),
        temperature=temperature,
        alpha=alpha,
        queue_lengths=list(queue_lengths or ()),
        key_ids=key_ids,
        queue_ids=list(queue_ids or ()),
        present=_present_keys(present, query, keys[0], len(features)),
        query_modalities=[a for a, _ in pairs],
        key_modalities=[b for _, b in pairs],
        backend=explain("consistency", query, backend).backend,
    )
    losses, counted = _losses_and_counted(inputs)
    return reduce(losses.sum(0) if reduction == "none" else losses, counted.sum(), reduction)


def _losses_and_counted(inputs: ConsistencyInputs) -> tuple[Tensor, Tensor]:
    if inputs.backend == "reference":
        return reference.losses_and_counted(inputs)
    results = boundary.losses_and_counted(inputs)
    return results.losses, results.counted


def _checked_pairs(
    pairs: Sequence[tuple[int, int]] | None, views: int
) -> Sequence[tuple[int, int]]:
    if pairs is None:
        return list(permutations(range(views), 2))
    valid = isinstance(pairs, list | tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and all(isinstance(index, int) and 0 <= index < views for index in pair)
        for pair in pairs
    )
    if not (valid and pairs):
        raise ValueError(
            f"pairs must be a list of tuples (a, b) of modalities from 0 to {views - 1}, "
            f"got {pairs!r}"
        )
    return pairs


def _present_keys(present: Tensor | None, query: Tensor, keys: Tensor, views: int) -> Tensor | None:
    """Return (K, V) flags of the keys from these, or from (B, V) flags of the queries."""
    if present is None:
        return None
    rows = len(query)
    if checks.shape_of(present) == (len(keys), views):
        rows = len(keys)
    checks.check_tensor("present", present, (rows, views), checks.FLAGS, query.device)
    if rows == len(keys):
        return present
    return torch.cat([present, present.new_ones(len(keys) - rows, views)])


def _check_lists(
    features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keys: Sequence[Tensor],
    queues: Sequence[Tensor] | None,
    queue_lengths: Sequence[int | Tensor] | None,
    queue_ids: Sequence[Tensor] | None,
    pairs: Sequence[tuple[int, int]] | None,
) -> None:
    given = {
        "features": features,
        "teachers": teachers,
        "keys": keys,
        "queues": queues,
        "queue_lengths": queue_lengths,
        "queue_ids": queue_ids,
    }
    for name, values in given.items():
        if values is None:
            continue
        if not isinstance(values, list | tuple):
            raise TypeError(
                f"{name} must be a list with one entry per modality, got {type(values).__name__}"
            )
        if len(values) != len(features):
            raise ValueError(
                f"{name} must have one entry per modality like features, {len(features)}, "
                f"got {len(values)}"
            )
    least = "two modalities" if pairs is None else "one modality"
    if len(features) < (2 if pairs is None else 1):
        raise ValueError(f"features must hold at least {least}, got {len(features)}")


def _check_query(name: str, query: Tensor) -> None:
    checks.check_tensor(name, query, ("B", "D"))
    checks.check_not_empty(name, query, 1, "feature")


def _check_features(name: str, value: Tensor, query: Tensor, rows: int | str) -> None:
    checks.check_tensor(name, value, (rows, query.shape[1]), checks.FLOATS, query.device)
    checks.check_constant(name, value)


def _check_keys(name: str, keys: Tensor, query: Tensor, rows: int | str) -> None:
    _check_features(name, keys, query, rows)
    if len(keys) < len(query):
        raise ValueError(
            f"{name} must start with one row per query, {len(query)}, got {len(keys)} rows"
        )


def _check_queue(
    entry: str,
    queue: Tensor | None,
    length: int | Tensor | None,
    ids: Tensor | None,
    query: Tensor,
    key_ids: Tensor | None,
    rows: int | str = "Q",
) -> None:
    """``entry`` is "" for one queue, or the index of this one of ``queues``."""
    plural = "s" if entry else ""
    length_name = f"queue_length{plural}{entry}"
    if queue is None:
        if length is not None or ids is not None:
            name = length_name if length is not None else f"queue_ids{entry}"
            raise ValueError(f"{name} needs a queue, got None")
        return
    _check_features(f"queue{plural}{entry}", queue, query, rows)
    if isinstance(length, Tensor):
        checks.check_tensor(length_name, length, (), checks.LABELS, query.device)
        checks.check_values(length_name, length, 0, len(queue))
    elif length is not None:
        checks.check_whole(length_name, length, 0, len(queue))
    if ids is not None and key_ids is None:
        raise ValueError(f"queue_ids{entry} needs key_ids, got None")
    _check_ids(f"queue_ids{entry}", ids, len(queue), query.device)


def _check_ids(name: str, ids: Tensor | None, rows: int, device: torch.device) -> None:
    if ids is not None:
        checks.check_tensor(name, ids, (rows,), checks.LABELS, device)


def _check_scalars(
    temperature: float | Tensor, alpha: float | Tensor, device: torch.device, reduction: str
) -> None:
    if isinstance(temperature, Tensor):
        checks.check_tensor("temperature", temperature, (), checks.FLOATS, device)
        checks.check_values("temperature", temperature, 0.0, above=True)
    else:
        checks.check_number("temperature", temperature, 0.0, above=True)
    checks.check_scalar("alpha", alpha, 0.0, 1.0, device)
    checks.check_choice("reduction", reduction, REDUCTIONS)
