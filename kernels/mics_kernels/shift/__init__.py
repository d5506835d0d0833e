"""Distribution shift of features: a random move along the directions its class varies in."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import checks
from mics_kernels.backends import explain
from mics_kernels.reductions import REDUCTIONS, reduce
from mics_kernels.shift import boundary, reference
from mics_kernels.shift.records import ClassMoments, ShiftedLossInputs, ShiftInputs
from mics_kernels.shift.statistics import ClassStatistics, class_moments, merge_moments

__all__ = [
    "ClassMoments",
    "ClassStatistics",
    "class_moments",
    "merge_moments",
    "shift_features",
    "shifted_cross_entropy",
]


def shift_features(
    features: Tensor,
    target: Tensor,
    variance: Tensor | None,
    *,
    strength: float | Tensor,
    seed: Tensor,
    row_ids: Tensor | None = None,
    directions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add noise that varies as each row's class does.

    ``strength * sqrt(variance[target]) * normal``, or along directions
    ``strength / sqrt(r) * sum_j normal_j * directions[target, j]``. The normals are a function of
    (seed, row id, column) alone (``mics_kernels.philox.normals``): the same row id gets the same
    noise on every rank, device and tile.

    Args:
        features: (B, D), float32 / bfloat16 / float16 (float64: reference only). Gets a gradient:
            the identity.
        target: (B,) int64 class labels, -1 for a row left alone, or (B, C) posteriors: the
            covariance is their mixture. No gradient.
        variance: (C, D), >= 0, any float dtype; None where directions stand. No gradient.
        strength: >= 0, a float or (B,). No gradient.
        seed: (2,) int64 on the features' device, (seed, offset); of the offset the low 32 bits.
            It is read when the operator runs: a replayed CUDA graph draws anew where its caller
            has advanced the offset.
        row_ids: (B,) int64; default 0 .. B - 1.
        directions: (C, r, D), r >= 1, any float dtype, as ``ClassStatistics.directions`` gives
            them; they take the place of the variance. No gradient.
        backend: see ``mics_kernels.backends``.

    Returns:
        (B, D), the dtype of ``features``.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a value out of range, neither variance nor directions,
            or a gradient asked for a tensor that gets none.

    Source: Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, section 3.2 (sampled).
    """
    checks.check_tensor("features", features, ("B", "D"))
    checks.check_not_empty("features", features, 1, "feature")
    (rows, dim), device = features.shape, features.device
    classes = _check_spread(variance, directions, "C", dim, device)
    checks.check_target("target", target, rows, classes, device, ignored=-1)
    _check_strength(strength, rows, device)
    checks.check_tensor("seed", seed, (2,), checks.LABELS, device)
    if row_ids is not None:
        checks.check_tensor("row_ids", row_ids, (rows,), checks.LABELS, device)
    inputs = ShiftInputs(
        features=features,
        target=target,
        variance=variance,
        strength=strength,
        seed=seed,
        row_ids=row_ids,
        directions=directions,
        backend=explain("shift", features, backend).backend,
    )
    if inputs.backend == "reference":
        return reference.shift_features(inputs)
    return boundary.shifted_features(inputs)


def shifted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    variance: Tensor | None,
    *,
    strength: float | Tensor,
    directions: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Upper bound of the expected softmax cross-entropy of shifted features, without drawing any.

    Cross-entropy of logits to which ``strength**2 / 2 * (w_j - w_y)^T Sigma_y (w_j - w_y)`` has
    been added, Sigma_y being diag(variance[y]) or the mean of the outer products of the
    directions of class y (derivation: README.md beside this file).

    Args:
        logits: (B, C) of the features as they are, float32 / bfloat16 / float16 (float64:
            reference only). Gets a gradient, in its own dtype.
        target: (B,) int64 class labels, or -1: the row has loss 0, gradient 0, does not count.
        weight: (C, D) of the linear layer that made the logits, any float dtype. Gets a gradient.
        variance: (C, D), >= 0, any float dtype; None where directions stand. No gradient.
        strength: of the shift, >= 0, a float or (B,). No gradient.
        directions: (C, r, D), r >= 1, in place of the variance. No gradient.
        reduction: "mean" over the rows that count (0 where there is none), "sum", or "none": (B,).
        backend: see ``mics_kernels.backends``.

    Returns:
        The loss, float32 (float64 for float64 logits).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a value out of range, neither variance nor directions,
            an unknown reduction, or a gradient asked for a tensor that gets none.

    Source: Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, proposition 1.
    """
    checks.check_tensor("logits", logits, ("B", "C"))
    checks.check_not_empty("logits", logits, 1, "class")
    (rows, classes), device = logits.shape, logits.device
    checks.check_tensor("target", target, (rows,), checks.LABELS, device)
    checks.check_target("target", target, rows, classes, device, ignored=-1)
    checks.check_tensor("weight", weight, (classes, "D"), checks.FLOATS, device)
    checks.check_not_empty("weight", weight, 1, "feature")
    _check_spread(variance, directions, classes, weight.shape[1], device)
    _check_strength(strength, rows, device)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    chosen = explain("shift", logits, backend).backend
    table = reference.spread_table(weight, variance, directions)
    if chosen == "reference":
        losses = reference.shifted_losses(
            ShiftedLossInputs(logits, target, table, strength, chosen)
        )
    else:
        losses = boundary.shifted_losses(
            ShiftedLossInputs(logits, target, table.float(), strength, chosen)
        ).losses
    return reduce(losses, (target >= 0).sum(), reduction)


def _check_spread(
    variance: Tensor | None,
    directions: Tensor | None,
    classes: int | str,
    dim: int,
    device: torch.device,
) -> int:
    """Check what a class varies by; the number of classes."""
    if variance is not None:
        checks.check_tensor("variance", variance, (classes, dim), checks.FLOATS, device)
        checks.check_values("variance", variance, 0.0)
        checks.check_constant("variance", variance)
        checks.check_not_empty("variance", variance, 0, "class")
        classes = len(variance)
    if directions is not None:
        checks.check_tensor("directions", directions, (classes, "r", dim), checks.FLOATS, device)
        checks.check_constant("directions", directions)
        checks.check_not_empty("directions", directions, 0, "class")
        checks.check_not_empty("directions", directions, 1, "direction per class")
        classes = len(directions)
    if isinstance(classes, str):
        raise ValueError("variance must be given where directions are not, got None for both")
    return classes


def _check_strength(strength: float | Tensor, rows: int, device: torch.device) -> None:
    if isinstance(strength, Tensor):
        checks.check_tensor("strength", strength, (rows,), checks.FLOATS, device)
        checks.check_values("strength", strength, 0.0)
        checks.check_constant("strength", strength)
    else:
        checks.check_number("strength", strength, 0.0)
