"""Class moments and the feature shift as formulas: the specification of every other file here.

Shapes: B rows, D feature width, C classes. Sources: README.md beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels.philox import normals


def class_moments(
    features: Tensor, target: Tensor, num_classes: int, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count (C,) float64, mean and sum of squared deviations (C, D), in two passes."""
    shares = _shares(target, num_classes)
    if weight is not None:
        shares = shares * weight.double().unsqueeze(1)
    # A skipped row may hold anything, and zero times NaN is NaN.
    rows = torch.where((shares > 0).any(1, keepdim=True), features.double(), 0.0)
    count = shares.sum(0)
    mean = (shares.T @ rows) / torch.where(count > 0, count, 1.0).unsqueeze(1)
    m2 = torch.zeros_like(mean)
    for label in range(num_classes):
        m2[label] = shares[:, label] @ (rows - mean[label]).square()
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return count, mean.to(dtype), m2.to(dtype)


def shift_features(
    features: Tensor,
    target: Tensor,
    variance: Tensor,
    strength: float | Tensor,
    seed: Tensor,
    row_ids: Tensor,
) -> Tensor:
    """``features + strength * sqrt(variance[target]) * normal``, in the dtype of the features."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    deviation = _row_variance(target, variance.double()).sqrt()
    noise = (deviation * normals(seed, row_ids, features.shape[1])).to(dtype)
    if isinstance(strength, Tensor):
        strength = strength.to(dtype).unsqueeze(1)
    return (features.to(dtype) + strength * noise).to(features.dtype)


def _row_variance(target: Tensor, variance: Tensor) -> Tensor:
    """(B, D) variance of each row's class or mixture of classes; 0 for a label that is no class."""
    if target.dim() == 2:
        return target.double() @ variance
    classes = len(variance)
    is_class = (target >= 0) & (target < classes)
    return torch.where(is_class.unsqueeze(1), variance[target.clamp(0, classes - 1)], 0.0)


def _shares(target: Tensor, num_classes: int) -> Tensor:
    """(B, C) float64 share of each class in each row; a label that is no class has none."""
    if target.dim() == 2:
        return target.double()
    classes = torch.arange(num_classes, device=target.device)
    return (target.unsqueeze(1) == classes).double()
