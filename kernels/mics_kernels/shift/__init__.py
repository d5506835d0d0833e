"""Distribution shift of features: a random move along the directions its class varies in."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import checks
from mics_kernels.backends import implementation
from mics_kernels.shift.statistics import (
    ClassMoments,
    ClassStatistics,
    class_moments,
    merge_moments,
)

__all__ = ["ClassMoments", "ClassStatistics", "class_moments", "merge_moments", "shift_features"]


def shift_features(
    features: Tensor,
    target: Tensor,
    variance: Tensor,
    *,
    strength: float | Tensor,
    seed: Tensor,
    row_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add noise with the variance of each row's class: ``strength * sqrt(variance) * normal``.

    The normals are a function of (seed, row id, column) alone (``mics_kernels.philox.normals``):
    the same row id gets the same noise on every rank, device and tile.

    Args:
        features: (B, D), float32 / bfloat16 / float16 (float64: reference only). Gets a gradient:
            the identity.
        target: (B,) int64 class labels, -1 for a row left alone, or (B, C) posteriors: the
            variance is their mixture. No gradient.
        variance: (C, D), >= 0, any float dtype. No gradient.
        strength: >= 0, a float or (B,). No gradient.
        seed: (2,) int64 on the features' device, (seed, offset); of the offset the low 32 bits.
        row_ids: (B,) int64; default 0 .. B - 1.
        backend: see ``mics_kernels.backends``.

    Returns:
        (B, D), the dtype of ``features``.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a value out of range, or a gradient asked for a tensor
            that gets none.

    Source: Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, section 3.2 (sampled).
    """
    checks.check_tensor("features", features, ("B", "D"))
    (rows, dim), device = features.shape, features.device
    checks.check_tensor("variance", variance, ("C", dim), checks.FLOATS, device)
    checks.check_values("variance", variance, 0.0)
    checks.check_constant("variance", variance)
    checks.check_target("target", target, rows, len(variance), device, ignored=-1)
    if isinstance(strength, Tensor):
        checks.check_tensor("strength", strength, (rows,), checks.FLOATS, device)
        checks.check_values("strength", strength, 0.0)
        checks.check_constant("strength", strength)
    else:
        checks.check_number("strength", strength, 0.0)
    checks.check_tensor("seed", seed, (2,), checks.LABELS, device)
    if row_ids is None:
        row_ids = torch.arange(rows, device=device)
    checks.check_tensor("row_ids", row_ids, (rows,), checks.LABELS, device)
    return implementation("shift", features, backend).shift_features(
        features, target, variance, strength, seed, row_ids
    )
