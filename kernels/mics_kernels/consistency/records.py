"""Inputs and results of the consistency losses, as every backend takes and returns them.

Shapes: B samples, D feature width, K keys, Q queue rows, V modalities, P ordered pairs of them. The
public functions fill a record once; arguments and ranges: ``mics_kernels.consistency_loss``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mics_kernels.registration import Number


class ConsistencyInputs(NamedTuple):
    """Inputs of ``consistency_loss`` (V = 1, one pair) and ``multimodal_consistency_loss``.

    Args:
        queries: V of (B, D), one dtype.
        teachers: V of (B, D).
        keys: V of (K, D), K >= B.
        queues: V of (Q, D), or empty.
        temperature: number, or 0-d tensor.
        alpha: number, or 0-d tensor.
        queue_lengths: V ints or 0-d int64 tensors, or empty: all rows are read.
        key_ids: (K,) int64, or None.
        queue_ids: V of (Q,) int64, or empty.
        present: (K, V) bool, the modalities of the samples that the keys belong to, or None.
        query_modalities: for each pair, the modality of its queries.
        key_modalities: for each pair, the modality of its keys.
        backend: name of the implementation.
        want_gradient: compute gradients, too; the losses alone take half of the products.
    """

    queries: list[Tensor]
    teachers: list[Tensor]
    keys: list[Tensor]
    queues: list[Tensor]
    temperature: Number
    alpha: Number
    queue_lengths: list[int | Tensor]
    key_ids: Tensor | None
    queue_ids: list[Tensor]
    present: Tensor | None
    query_modalities: list[int]
    key_modalities: list[int]
    backend: str
    want_gradient: bool = False

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(modality of the queries, modality of the keys) of each pair."""
        return list(zip(self.query_modalities, self.key_modalities, strict=True))


class ConsistencyResults(NamedTuple):
    """Results of the consistency losses; gradients are float32, empty where not wanted.

    Args:
        losses: (P, B) float32, 0 where a query does not count.
        counted: (P, B) bool, True for each query that counts.
        gradient: (P, B, D), d losses / d queries.
        slope: (P, B), d losses / d temperature.
    """

    losses: Tensor
    counted: Tensor
    gradient: Tensor
    slope: Tensor
