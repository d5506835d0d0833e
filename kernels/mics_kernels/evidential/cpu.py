"""The evidential operators in C++ (csrc/evidential_cpu.cpp), vectorised and multithreaded."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.evidential.native import prepare_fusion, prepare_rows


def loss_and_gradient(
    values: Tensor,
    target: Tensor,
    kl_weight: float | Tensor,
    activation: str | None,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    mean: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, fused evidence and the gradient of the losses' sum, in one sweep.

    Args:
        values: (B, C) or (B, V, C), float32 / bfloat16 / float16.
        target: (B,) int64 labels, or (B, C) probabilities.
        kl_weight: weight of the KL term; a tensor is a 0-d float32 one.
        activation: how logits become evidence, and views are fused; None: values are evidence,
            and there is no fusion.
        present: (B, V) bool, or None.
        weight: (B,), or None.
        ignore_index: label of rows that do not count.
        mean: divide losses and gradient by the number of rows that count.
        want_gradient: whether to compute it.

    Returns:
        losses float32, (B,) with fusion, else one for each opinion; fused evidence (B, C)
        float32, empty without fusion; gradient like ``values``, empty where not wanted.
    """
    count = None
    if mean:
        rows = target.ne(ignore_index).sum() if target.dim() == 1 else torch.tensor(len(target))
        count = rows.clamp(min=1).to(torch.float32)
    prepared = prepare_rows(
        values, target, kl_weight, activation, present, weight, ignore_index, count, want_gradient
    )
    _native.evidential_cpu(prepared.call, torch.get_num_threads())
    return prepared.losses, prepared.fused, prepared.gradient


def fuse_evidence(evidence: Tensor, present: Tensor | None) -> Tensor:
    """Dempster's rule: (B, V, C) -> (B, C) float32."""
    prepared = prepare_fusion(evidence, present, None, None)
    _native.fuse_evidence_cpu(prepared.call, torch.get_num_threads())
    return prepared.output


def fuse_evidence_gradient(
    evidence: Tensor, present: Tensor | None, fused: Tensor, outer: Tensor
) -> Tensor:
    """Gradient of ``fuse_evidence``, given that of its result: like ``evidence``."""
    prepared = prepare_fusion(evidence, present, fused, outer)
    _native.fuse_evidence_gradient_cpu(prepared.call, torch.get_num_threads())
    return prepared.output
