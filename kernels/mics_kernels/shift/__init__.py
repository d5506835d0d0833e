"""Distribution shift: noise on features with the covariance of their class."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import checks
from mics_kernels.backends import explain
from mics_kernels.reductions import REDUCTIONS, reduce
from mics_kernels.shift import boundary, reference
from mics_kernels.shift.records import BoundInputs, ClassMoments, ShiftedLossInputs, ShiftInputs
from mics_kernels.shift.statistics import ClassStatistics, class_moments, merge_moments

__all__ = [
    "ClassMoments",
    "ClassStatistics",
    "class_moments",
    "merge_moments",
    "shift_features",
    "shifted_cross_entropy",
]

FEW_CLASSES = 32
"""Up to so many classes, programs of the shifted cross-entropy on a GPU make their own table."""


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
    """Add noise with the variance, or along the directions, of the class of each row.

    ``strength * sqrt(variance[target]) * normal``, or along directions
    ``strength / sqrt(r) * sum_j normal_j * directions[target, j]``. The normals are a function of
    (seed, row id, column) alone (``mics_kernels.philox.normals``): a row id gets the same noise on
    every rank, device and tile size.

    Args:
        features: (B, D), D >= 1, float32 / bfloat16 / float16 (float64: reference only). Gets a
            gradient, the identity.
        target: (B,) int64 class labels, -1 for rows to return unchanged, or (B, C) posteriors,
            whose mixture of covariances applies. No gradient.
        variance: (C, D), >= 0, any float dtype; may be None if there are directions. No gradient.
        strength: >= 0, a float or (B,). No gradient.
        seed: (2,) int64 on the device of the features: seed, and offset, whose low 32 bits count.
            Read when the operator runs: a replayed CUDA graph draws new numbers once its caller
            has advanced the offset.
        row_ids: (B,) int64; default 0 .. B - 1.
        directions: (C, r, D), r >= 1, any float dtype, from ``ClassStatistics.directions``; they
            replace the variance. No gradient.
        backend: see ``mics_kernels.backends``.

    Returns:
        (B, D), the dtype of ``features``.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a value out of range, neither variance nor directions,
            or an input that requires a gradient but gets none.

    Source: Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, section 3.2 (sampled).

    Examples:
        >>> import torch
        >>> from mics_kernels import shift_features
        >>> features, target = torch.zeros(3, 4), torch.tensor([0, 1, -1])
        >>> variance = torch.tensor([[1.0] * 4, [0.0] * 4])
        >>> seed = torch.tensor([17, 0])
        >>> moved = shift_features(features, target, variance, strength=0.5, seed=seed)
        >>> moved.any(dim=1).tolist()  # class 1 does not vary, and the last row has no class
        [True, False, False]
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
    """Bound the expected cross-entropy of shifted features from above, without sampling.

    Softmax cross-entropy of logits raised by
    ``strength**2 / 2 * (w_j - w_y)^T Sigma_y (w_j - w_y)``, where Sigma_y is diag(variance[y]) or
    the mean of the outer products of the directions of class y (derivation: README.md beside this
    file).

    Args:
        logits: (B, C), C >= 1, of the unshifted features, float32 / bfloat16 / float16 (float64:
            reference only). Gets a gradient, in its own dtype.
        target: (B,) int64 class labels; a row with -1 has loss 0 and gradient 0, and does not
            count.
        weight: (C, D) weight of the linear layer that computed the logits, any float dtype. Gets a
            gradient.
        variance: (C, D), >= 0, any float dtype; may be None if there are directions. No gradient.
        strength: strength of the shift, >= 0, a float or (B,). No gradient.
        directions: (C, r, D), r >= 1; they replace the variance. No gradient.
        reduction: "mean" over the rows that count (0 if there are none), "sum", or "none": (B,).
        backend: see ``mics_kernels.backends``.

    Returns:
        The loss, float32 (float64 for float64 logits).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a value out of range, neither variance nor directions,
            an unknown reduction, or an input that requires a gradient but gets none.

    Source: Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, proposition 1.

    Examples:
        >>> import torch
        >>> from mics_kernels import shifted_cross_entropy
        >>> features, weight = torch.eye(2), torch.eye(2).requires_grad_()
        >>> logits, target = features @ weight.T, torch.tensor([0, 1])
        >>> variance = torch.ones(2, 2)
        >>> for strength in (0.0, 1.0):
        ...     loss = shifted_cross_entropy(logits, target, weight, variance, strength=strength)
        ...     print(round(loss.item(), 3))
        0.313
        0.693
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
    if chosen == "triton" and directions is None and classes <= FEW_CLASSES:
        assert variance is not None
        given = (logits, target, weight, variance, strength, reduction, chosen)
        return boundary.bound(BoundInputs(*given)).loss
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
    """Check variance and directions; return the number of classes."""
    if variance is None and directions is None:
        raise ValueError("variance or directions must be given, got None for both")
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
    assert isinstance(classes, int)
    return classes


def _check_strength(strength: float | Tensor, rows: int, device: torch.device) -> None:
    if isinstance(strength, Tensor):
        checks.check_tensor("strength", strength, (rows,), checks.FLOATS, device)
        checks.check_values("strength", strength, 0.0)
        checks.check_constant("strength", strength)
    else:
        checks.check_number("strength", strength, 0.0)
