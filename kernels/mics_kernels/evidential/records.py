"""Inputs and results of the evidential operators, as every backend takes and returns them.

Shapes: B rows, V views, C classes. Public functions fill a record once; arguments and ranges:
``mics_kernels.evidential_loss``, ``mics_kernels.fuse_evidence``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mics_kernels.registration import Number


class EvidentialInputs(NamedTuple):
    """Inputs of ``evidential_loss`` and ``evidential_fusion_loss``.

    Args:
        values: (B, C) or (B, V, C) evidence; with an activation (B, V, C) logits.
        target: (B,) int64 labels, or (B, C) probabilities.
        kl_weight: weight of the KL term; as a tensor 0-d float32.
        activation: from logits to evidence, which is then fused; None: ``values`` are evidence.
        present: (B, V) bool, or None.
        weight: (B,), or None.
        ignore_index: label of rows that do not count.
        reduction: "mean", "sum" or "none".
        backend: name of the implementation.
        want_gradient: compute the gradient, too.
    """

    values: Tensor
    target: Tensor
    kl_weight: Number
    activation: str | None
    present: Tensor | None
    weight: Tensor | None
    ignore_index: int
    reduction: str
    backend: str
    want_gradient: bool = False


class EvidentialResults(NamedTuple):
    """Results of a loss.

    Args:
        loss: float32, one per row with fusion, else one per opinion; 0-d once reduced. A backend
            has divided it by the number of rows that count, for the reduction "mean".
        fused: (B, C) float32 fused evidence; empty without fusion.
        gradient: gradient of the summed losses, like ``values``; empty where not wanted.
    """

    loss: Tensor
    fused: Tensor
    gradient: Tensor


class FusionInputs(NamedTuple):
    """Inputs of ``fuse_evidence``: (B, V, C) evidence, (B, V) bool or None, a backend's name."""

    evidence: Tensor
    present: Tensor | None
    backend: str


class FusionGradientInputs(NamedTuple):
    """Inputs of the gradient of ``fuse_evidence``.

    Args:
        evidence: (B, V, C).
        present: (B, V) bool, or None.
        outer: (B, C), the gradient of that result.
        backend: name of the implementation.
    """

    evidence: Tensor
    present: Tensor | None
    outer: Tensor
    backend: str
