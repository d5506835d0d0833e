"""Class moments, shift and shifted cross-entropy as formulas: the specification of this folder.

Shapes: B rows, D feature width, C classes, r directions per class. Sources: README.md beside this
file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels.philox import normals
from mics_kernels.shift.records import ClassMoments, MomentsInputs, ShiftedLossInputs, ShiftInputs


def class_moments(inputs: MomentsInputs) -> ClassMoments:
    """Count (C,) float64, mean and sum of squared deviations (C, D), in two passes."""
    features, shares = inputs.features, _shares(inputs)
    # Skipped rows may hold NaN, and zero times NaN is NaN.
    rows = torch.where((shares > 0).any(1, keepdim=True), features.double(), 0.0)
    count = shares.sum(0)
    mean = (shares.T @ rows) / torch.where(count > 0, count, 1.0).unsqueeze(1)
    m2 = [own @ (rows - centre).square() for own, centre in zip(shares.T, mean, strict=True)]
    dtype = _result_dtype(features)
    return ClassMoments(count, mean.to(dtype), torch.stack(m2).to(dtype))


def shift_features(inputs: ShiftInputs) -> Tensor:
    """Compute ``features + strength * noise`` in the dtype of the features."""
    features, row_ids, strength = inputs.features, inputs.row_ids, inputs.strength
    dtype = _result_dtype(features)
    if row_ids is None:
        row_ids = torch.arange(len(features), device=features.device)
    if inputs.directions is not None:
        noise = _combination(inputs.target, inputs.directions.double(), inputs.seed, row_ids)
    else:
        assert inputs.variance is not None
        deviation = _row_variance(inputs.target, inputs.variance.double()).sqrt()
        noise = deviation * normals(inputs.seed, row_ids, features.shape[1])
    if isinstance(strength, Tensor):
        strength = strength.to(dtype).reshape(-1, 1)
    moved = (features.to(dtype) + strength * noise.to(dtype)).to(features.dtype)
    if inputs.target.dim() == 2:
        return moved
    return torch.where((inputs.target >= 0).unsqueeze(1), moved, features)


def spread_table(weight: Tensor, variance: Tensor | None, directions: Tensor | None) -> Tensor:
    """Compute (C, C) float64 ``(w_j - w_y)^T Sigma_y (w_j - w_y)`` for class y and logit j.

    Expanded into matrix products, which need no tensor of shape (C, C, D). They cancel, and float64
    has the digits to spare.
    """
    weight = weight.double()
    if directions is not None:
        projected = directions.double() @ weight.T  # (C, r, C): direction of class y on w_j
        own = projected.diagonal(dim1=0, dim2=2).T
        return (projected - own.unsqueeze(2)).square().mean(1)
    assert variance is not None
    variance = variance.double()
    cross = (variance * weight) @ weight.T
    return variance @ weight.square().T - 2.0 * cross + cross.diagonal().unsqueeze(1)


def shifted_losses(inputs: ShiftedLossInputs) -> Tensor:
    """Compute cross-entropy (B,) of ``logits + strength**2 / 2 * table[target]``; 0 for -1."""
    logits, strength = inputs.logits, inputs.strength
    is_class, label = _class_of(inputs.target, logits.shape[1])
    if isinstance(strength, Tensor):
        strength = strength.double().reshape(-1, 1)
        strength = torch.where(is_class.unsqueeze(1), strength, 0.0)
    moved = logits.double() + 0.5 * strength**2 * inputs.table[label]
    moved = torch.where(is_class.unsqueeze(1), moved, 0.0)
    right = moved.gather(1, label.unsqueeze(1)).squeeze(1)
    losses = torch.where(is_class, moved.logsumexp(1) - right, 0.0)
    return losses.to(_result_dtype(logits))


def _combination(target: Tensor, directions: Tensor, seed: Tensor, row_ids: Tensor) -> Tensor:
    """Compute (B, D) ``sum_j normal_j directions[target, j] / sqrt(r)``.

    With posteriors p each class takes its own normals, number c r + j, times sqrt(p_c), so that the
    covariance is the mixture.
    """
    classes, rank, dim = directions.shape
    if target.dim() == 2:
        own = target.double().sqrt().repeat_interleave(rank, dim=1)
        noise = (own * normals(seed, row_ids, classes * rank)) @ directions.reshape(-1, dim)
        return noise / rank**0.5
    draws = normals(seed, row_ids, rank)
    noise = draws.new_zeros(len(target), dim)
    for label in range(classes):
        noise = torch.where((target == label).unsqueeze(1), draws @ directions[label], noise)
    return noise / rank**0.5


def _row_variance(target: Tensor, variance: Tensor) -> Tensor:
    """Return the (B, D) variance of each row's class or mixture; 0 for a label that is no class."""
    if target.dim() == 2:
        return target.double() @ variance
    is_class, label = _class_of(target, len(variance))
    return torch.where(is_class.unsqueeze(1), variance[label], 0.0)


def _class_of(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mark the labels that are classes, (B,) bool; also clamp labels to valid indices, (B,)."""
    return (target >= 0) & (target < classes), target.clamp(0, classes - 1)


def _shares(inputs: MomentsInputs) -> Tensor:
    """Return the (B, C) float64 weights of rows in classes; 0 for a label that is no class."""
    shares = inputs.target.double()
    if inputs.target.dim() == 1:
        classes = torch.arange(inputs.num_classes, device=inputs.target.device)
        shares = (inputs.target.unsqueeze(1) == classes).double()
    if inputs.weight is not None:
        weighted = shares * inputs.weight.double().unsqueeze(1)
        shares = torch.where(shares == 0, 0.0, weighted)  # a skipped row may weigh NaN
    return shares


def _result_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32
