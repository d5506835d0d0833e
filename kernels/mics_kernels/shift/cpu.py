"""Class moments, feature shift and shifted cross-entropy in C++ (csrc/shift_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.addresses import address, dtype_name
from mics_kernels.shift.records import (
    ClassMoments,
    MomentsInputs,
    ShiftedLossInputs,
    ShiftedLossResults,
    ShiftInputs,
)


def class_moments(inputs: MomentsInputs) -> ClassMoments:
    """Count (C,) float64, mean and sum of squared deviations (C, D) float32, in one read."""
    features = inputs.features.contiguous()
    rows, dim = features.shape
    labels, shares = _labels_or_shares(inputs.target)
    weight = None if inputs.weight is None else inputs.weight.to(torch.float32).contiguous()
    count = features.new_empty(inputs.num_classes, dtype=torch.float64)
    mean = features.new_empty((inputs.num_classes, dim), dtype=torch.float32)
    moments = ClassMoments(count, mean, torch.empty_like(mean))
    call = _native.MomentsCall(
        features=address(features),
        dtype=dtype_name(features),
        labels=address(labels),
        shares=address(shares),
        weight=address(weight),
        count=address(moments.count),
        mean=address(moments.mean),
        m2=address(moments.m2),
        rows=rows,
        dim=dim,
        classes=inputs.num_classes,
    )
    _native.class_moments_cpu(call, torch.get_num_threads())
    return moments


def shift_features(inputs: ShiftInputs) -> Tensor:
    """Compute ``features + strength * noise``."""
    features = inputs.features.contiguous()
    labels, shares = _labels_or_shares(inputs.target)
    spread, directions = None, inputs.directions
    if directions is not None:
        directions = directions.to(torch.float32).contiguous()
        classes, rank, _ = directions.shape
    else:
        assert inputs.variance is not None
        spread = inputs.variance.to(torch.float32).contiguous()
        spread = spread.sqrt() if shares is None else spread
        classes, rank = len(spread), 0
    strength, strengths = _strength(inputs.strength)
    seed = inputs.seed.contiguous()
    row_ids = None if inputs.row_ids is None else inputs.row_ids.contiguous()
    moved = features.new_empty(features.shape)
    call = _native.ShiftCall(
        features=address(features),
        dtype=dtype_name(features),
        moved=address(moved),
        labels=address(labels),
        shares=address(shares),
        spread=address(spread),
        directions=address(directions),
        strengths=address(strengths),
        row_ids=address(row_ids),
        seed=address(seed),
        rows=features.shape[0],
        dim=features.shape[1],
        classes=classes,
        rank=rank,
        strength=strength,
    )
    _native.shift_cpu(call, torch.get_num_threads())
    return moved


def shifted_losses(inputs: ShiftedLossInputs) -> ShiftedLossResults:
    """Compute losses, and the gradient of each in its logits, in one sweep."""
    logits, target = inputs.logits.contiguous(), inputs.target.contiguous()
    table = inputs.table.contiguous()
    strength, strengths = _strength(inputs.strength)
    results = ShiftedLossResults(
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(logits.shape if inputs.want_gradient else 0),
    )
    call = _native.ShiftedLossCall(
        logits=address(logits),
        dtype=dtype_name(logits),
        labels=address(target),
        table=address(table),
        strengths=address(strengths),
        losses=address(results.losses),
        gradient=address(results.gradient),
        rows=logits.shape[0],
        classes=logits.shape[1],
        strength=strength,
    )
    _native.shifted_loss_cpu(call, torch.get_num_threads())
    return results


def merge_moments(running: ClassMoments, new: ClassMoments, momentum: float | None) -> None:
    """Merge new rows into running statistics, in place.

    Args:
        running: all float64 and contiguous.
        new: count float64, mean and m2 float32.
        momentum: weight of one new row, in (0, 1); None: all rows count alike.
    """
    count, mean, m2 = (part.contiguous() for part in new)
    classes, dim = mean.shape
    call = _native.MergeCall(
        count=address(running.count),
        mean=address(running.mean),
        m2=address(running.m2),
        new_count=address(count),
        new_mean=address(mean),
        new_m2=address(m2),
        classes=classes,
        dim=dim,
        momentum=momentum or 0.0,
    )
    _native.merge_moments_cpu(call, torch.get_num_threads())


def row_uniforms(seed: int, row_ids: Tensor, columns: int) -> Tensor:
    """Compute ``mics_kernels.philox.row_uniforms``."""
    row_ids = row_ids.contiguous()
    found = torch.empty((len(row_ids), columns), dtype=torch.float64)
    _native.philox_uniforms_cpu(
        seed,
        address(row_ids),
        len(row_ids),
        columns,
        address(found),
        torch.get_num_threads(),
    )
    return found


def _labels_or_shares(target: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if target.dim() == 1:
        return target.contiguous(), None
    return None, target.to(torch.float32).contiguous()


def _strength(strength: float | Tensor) -> tuple[float, Tensor | None]:
    """Return one strength for all rows, or one per row."""
    if isinstance(strength, Tensor) and strength.dim() == 1:
        return 0.0, strength.to(torch.float32).contiguous()
    return float(strength), None
