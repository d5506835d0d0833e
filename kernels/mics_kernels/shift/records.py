"""Inputs and results of shift, moments and shifted cross-entropy, as every backend takes them.

Shapes: B rows, D feature width, C classes, r directions per class. The public functions fill a
record once; arguments and ranges: ``mics_kernels.shift_features``, ``mics_kernels.class_moments``,
``mics_kernels.shifted_cross_entropy``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mics_kernels.registration import Number


class ShiftInputs(NamedTuple):
    """Inputs of ``shift_features``.

    Args:
        features: (B, D).
        target: (B,) int64 labels, or (B, C) posteriors.
        variance: (C, D), or None with directions.
        strength: number, or tensor, 0-d or (B,).
        seed: (2,) int64.
        row_ids: (B,) int64, or None: 0 .. B - 1.
        directions: (C, r, D), or None.
        backend: name of the implementation.
    """

    features: Tensor
    target: Tensor
    variance: Tensor | None
    strength: Number
    seed: Tensor
    row_ids: Tensor | None
    directions: Tensor | None
    backend: str


class MomentsInputs(NamedTuple):
    """Inputs of ``class_moments``.

    Args:
        features: (B, D).
        target: (B,) int64 labels, or (B, C) posteriors.
        num_classes: C.
        weight: (B,), or None.
        backend: name of the implementation.
    """

    features: Tensor
    target: Tensor
    num_classes: int
    weight: Tensor | None
    backend: str


class ClassMoments(NamedTuple):
    """Weighted first and second moments of each class.

    Args:
        count: (C,) float64, sum of weights.
        mean: (C, D), 0 for a class without rows.
        m2: (C, D), weighted sum of squared deviations from the mean.
    """

    count: Tensor  # type: ignore[assignment]  # the name of a method of tuple, too
    mean: Tensor
    m2: Tensor


class ShiftedLossInputs(NamedTuple):
    """Inputs of the losses of ``shifted_cross_entropy``.

    Args:
        logits: (B, C).
        target: (B,) int64 labels.
        table: (C, C), ``(w_j - w_y)^T Sigma_y (w_j - w_y)`` for class y and logit j.
        strength: number, or tensor, 0-d or (B,).
        backend: name of the implementation.
        want_gradient: compute the gradient, too.
    """

    logits: Tensor
    target: Tensor
    table: Tensor
    strength: Number
    backend: str
    want_gradient: bool = False


class ShiftedLossResults(NamedTuple):
    """Results of the losses of ``shifted_cross_entropy``.

    Args:
        losses: (B,) float32.
        gradient: (B, C), of each loss in its own logits, like them; empty where not wanted.
    """

    losses: Tensor
    gradient: Tensor


class BoundInputs(NamedTuple):
    """Inputs of ``shifted_cross_entropy`` with its table and its reduction.

    Args:
        logits: (B, C).
        target: (B,) int64 labels.
        weight: (C, D).
        variance: (C, D).
        strength: number, or (B,).
        reduction: "mean", "sum" or "none".
        backend: name of the implementation.
        want_gradient: compute the gradient, too.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor
    variance: Tensor
    strength: Number
    reduction: str
    backend: str
    want_gradient: bool = False


class BoundResults(NamedTuple):
    """Results of ``shifted_cross_entropy`` with its table and its reduction.

    Args:
        loss: float32, 0-d, or (B,) where the reduction is "none".
        gradient: (B, C), of each row's loss in its own logits, like them; empty where not wanted.
        sums: (G, 2) float32, first the number of rows that count, for the backward pass; empty
            where the reduction is "none".
    """

    loss: Tensor
    gradient: Tensor
    sums: Tensor


class BoundGradientInputs(NamedTuple):
    """Inputs of the backward pass of ``shifted_cross_entropy``.

    Args:
        gradient, sums: of ``BoundResults``.
        target, weight, variance, strength, reduction, backend: of ``BoundInputs``.
        outer: gradient of the loss, float32.
        want_weight: compute the gradient of the weight, too.
    """

    gradient: Tensor
    sums: Tensor
    target: Tensor
    weight: Tensor
    variance: Tensor
    strength: Number
    outer: Tensor
    reduction: str
    backend: str
    want_weight: bool


class BoundGradients(NamedTuple):
    """Gradients of the inputs of ``shifted_cross_entropy``.

    Args:
        logits: (B, C).
        weight: (C, D), empty where not wanted.
    """

    logits: Tensor
    weight: Tensor
