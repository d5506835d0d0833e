"""Class moments, feature shift and shifted cross-entropy in C++ (csrc/shift_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.addresses import address, dtype_name


def class_moments(
    features: Tensor, target: Tensor, num_classes: int, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count (C,) float64, mean and sum of squared deviations (C, D) float32, in one read.

    Args:
        features: (B, D), float32 / bfloat16 / float16.
        target: (B,) int64 labels, or (B, C) posteriors.
        num_classes: C.
        weight: (B,), or None.
    """
    rows, dim = features.shape
    features = features.contiguous()
    labels, shares = _labels_or_shares(target)
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    count = features.new_empty(num_classes, dtype=torch.float64)
    mean = features.new_empty((num_classes, dim), dtype=torch.float32)
    m2 = torch.empty_like(mean)
    call = _native.MomentsCall(
        features=features.data_ptr(),
        dtype=dtype_name(features),
        labels=address(labels),
        shares=address(shares),
        weight=address(weight),
        count=count.data_ptr(),
        mean=mean.data_ptr(),
        m2=m2.data_ptr(),
        rows=rows,
        dim=dim,
        classes=num_classes,
    )
    _native.class_moments_cpu(call, torch.get_num_threads())
    return count, mean, m2


def shift_features(
    features: Tensor,
    target: Tensor,
    variance: Tensor | None,
    strength: float | Tensor,
    seed: Tensor,
    row_ids: Tensor | None,
    directions: Tensor | None,
) -> Tensor:
    """``features + strength * noise``.

    Args:
        features: (B, D), float32 / bfloat16 / float16.
        target: (B,) int64 labels, or (B, C) posteriors.
        variance: (C, D); not read where there are directions.
        strength: a float, or a tensor, 0-d or (B,).
        seed: (2,) int64.
        row_ids: (B,) int64; None: 0 .. B - 1.
        directions: (C, r, D), or None.
    """
    features = features.contiguous()
    labels, shares = _labels_or_shares(target)
    if directions is not None:
        spread = None
        directions = directions.to(torch.float32).contiguous()
        classes, rank, _ = directions.shape
    else:
        assert variance is not None
        spread = variance.to(torch.float32).contiguous()
        spread = spread.sqrt() if shares is None else spread
        classes, rank = len(variance), 0
    strength, strengths = _strength(strength)
    seed = seed.contiguous()
    row_ids = None if row_ids is None else row_ids.contiguous()
    moved = features.new_empty(features.shape)
    call = _native.ShiftCall(
        features=features.data_ptr(),
        dtype=dtype_name(features),
        moved=moved.data_ptr(),
        labels=address(labels),
        shares=address(shares),
        spread=address(spread),
        directions=address(directions),
        strengths=address(strengths),
        row_ids=address(row_ids),
        seed=seed.data_ptr(),
        rows=features.shape[0],
        dim=features.shape[1],
        classes=classes,
        rank=rank,
        strength=strength,
    )
    _native.shift_cpu(call, torch.get_num_threads())
    return moved


def shifted_losses(
    logits: Tensor, target: Tensor, table: Tensor, strength: float | Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses (B,) float32 and the gradient of each for its logits, in one sweep.

    Args:
        logits: (B, C), float32 / bfloat16 / float16.
        target: (B,) int64 labels.
        table: (C, C), float32.
        strength: a float, or a tensor, 0-d or (B,).
        want_gradient: whether to compute it; otherwise it is empty.
    """
    logits, target, table = logits.contiguous(), target.contiguous(), table.contiguous()
    strength, strengths = _strength(strength)
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    gradient = logits.new_empty(logits.shape if want_gradient else 0)
    call = _native.ShiftedLossCall(
        logits=logits.data_ptr(),
        dtype=dtype_name(logits),
        labels=target.data_ptr(),
        table=table.data_ptr(),
        strengths=address(strengths),
        losses=losses.data_ptr(),
        gradient=gradient.data_ptr(),
        rows=logits.shape[0],
        classes=logits.shape[1],
        strength=strength,
    )
    _native.shifted_loss_cpu(call, torch.get_num_threads())
    return losses, gradient


def _labels_or_shares(target: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if target.dim() == 1:
        return target.contiguous(), None
    return None, target.to(torch.float32).contiguous()


def _strength(strength: float | Tensor) -> tuple[float, Tensor | None]:
    """One for all rows, or one a row."""
    if isinstance(strength, Tensor) and strength.dim() == 1:
        return 0.0, strength.to(torch.float32).contiguous()
    return float(strength), None
