"""Shift, moments and shifted cross-entropy as autograd and ``torch.compile`` see them.

The shift saves nothing for its backward pass, since its gradient is the identity; the loss comes
with its gradient, which the backward pass scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mics_kernels.addresses import is_transformed
from mics_kernels.backends import implementation
from mics_kernels.registration import (
    Gradients,
    Operator,
    differentiable_once,
    has_addresses,
    refuse_gradient,
    save_nothing,
)
from mics_kernels.shift.records import (
    BoundGradientInputs,
    BoundGradients,
    BoundInputs,
    BoundResults,
    ClassMoments,
    MomentsInputs,
    ShiftedLossInputs,
    ShiftedLossResults,
    ShiftInputs,
)


def _shift(inputs: ShiftInputs) -> Tensor:
    return implementation("shift", inputs.backend).shift_features(inputs)


def _shift_shapes(inputs: ShiftInputs) -> Tensor:
    return inputs.features.new_empty(inputs.features.shape)


def _pass_on(ctx: Any, outer: Tensor) -> Gradients:
    return {"features": outer}


def _moments(inputs: MomentsInputs) -> ClassMoments:
    return implementation("moments", inputs.backend).class_moments(inputs)


def update_in_place(
    inputs: MomentsInputs, pending: ClassMoments, running: ClassMoments, momentum: float | None
) -> bool:
    """Merge the moments of rows into ``pending`` and ``running`` in two kernels; False where
    that is not possible, and nothing was done."""
    if inputs.backend != "triton" or torch.compiler.is_compiling() or is_transformed():
        return False
    if not has_addresses([*inputs, *pending, *running]):
        return False
    if not all(part.is_contiguous() for part in (*pending, *running)):
        return False
    implementation("moments", "triton").update_statistics(inputs, pending, running, momentum)
    return True


def _moments_shapes(inputs: MomentsInputs) -> ClassMoments:
    features, shape = inputs.features, (inputs.num_classes, inputs.features.shape[1])
    return ClassMoments(
        features.new_empty(inputs.num_classes, dtype=torch.float64),
        features.new_empty(shape, dtype=torch.float32),
        features.new_empty(shape, dtype=torch.float32),
    )


def _losses(inputs: ShiftedLossInputs) -> ShiftedLossResults:
    return implementation("shift", inputs.backend).shifted_losses(inputs)


def _losses_shapes(inputs: ShiftedLossInputs) -> ShiftedLossResults:
    logits = inputs.logits
    return ShiftedLossResults(
        logits.new_empty(logits.shape[0], dtype=torch.float32),
        logits.new_empty(logits.shape if inputs.want_gradient else 0),
    )


def _save_gradient(ctx: Any, inputs: ShiftedLossInputs, results: ShiftedLossResults) -> None:
    in_memory = isinstance(inputs.strength, Tensor)
    ctx.strength = None if in_memory else inputs.strength
    ctx.save_for_backward(results.gradient, inputs.target, inputs.strength if in_memory else None)
    ctx.backend, ctx.of_table = inputs.backend, inputs.table.requires_grad


@differentiable_once
def _scale_gradient(ctx: Any, outer: Tensor) -> Gradients:
    gradient, target, strength = ctx.saved_tensors
    strength = ctx.strength if strength is None else strength.reshape(-1, 1)
    rows = gradient * outer.unsqueeze(1)
    of_table = None
    if ctx.of_table:
        # Row y of the table is part of every logit of the rows of class y.
        parts = (rows * (0.5 * strength**2)).float()
        sums = moments(MomentsInputs(parts, target, rows.shape[1], None, ctx.backend))
        of_table = (sums.mean * sums.count.unsqueeze(1)).float()
    return {"logits": rows.to(gradient.dtype), "table": of_table}


def _bound(inputs: BoundInputs) -> BoundResults:
    return implementation("shift", inputs.backend).shifted_cross_entropy(inputs)


def _bound_shapes(inputs: BoundInputs) -> BoundResults:
    logits, by_row = inputs.logits, inputs.reduction == "none"
    rows, classes = logits.shape
    parts, _ = implementation("shift", inputs.backend).bound_programs(rows, classes)
    return BoundResults(
        logits.new_empty(rows if by_row else (), dtype=torch.float32),
        logits.new_empty(logits.shape if inputs.want_gradient else 0),
        logits.new_empty((0 if by_row else max(parts, 1), 2), dtype=torch.float32),
    )


def _save_bound(ctx: Any, inputs: BoundInputs, results: BoundResults) -> None:
    in_memory = isinstance(inputs.strength, Tensor)
    ctx.strength = None if in_memory else inputs.strength
    ctx.reduction, ctx.backend = inputs.reduction, inputs.backend
    ctx.of_weight = inputs.weight.requires_grad
    ctx.save_for_backward(
        results.gradient, results.sums, inputs.target, inputs.weight, inputs.variance,
        inputs.strength if in_memory else None,
    )  # fmt: skip


@differentiable_once
def _scale_bound(ctx: Any, outer: Tensor) -> Gradients:
    gradient, sums, target, weight, variance, strength = ctx.saved_tensors
    inputs = BoundGradientInputs(
        gradient, sums, target, weight.detach(), variance,
        ctx.strength if strength is None else strength, outer, ctx.reduction, ctx.backend,
        ctx.of_weight,
    )  # fmt: skip
    found = bound_gradient(inputs)
    return {"logits": found.logits, "weight": found.weight if ctx.of_weight else None}


def _bound_gradient(inputs: BoundGradientInputs) -> BoundGradients:
    return implementation("shift", inputs.backend).shifted_cross_entropy_gradient(inputs)


def _bound_gradient_shapes(inputs: BoundGradientInputs) -> BoundGradients:
    return BoundGradients(
        inputs.gradient.new_empty(inputs.gradient.shape),
        inputs.weight.new_empty(inputs.weight.shape if inputs.want_weight else 0),
    )


shifted_features = Operator(
    "shift_features",
    ShiftInputs,
    Tensor,
    run=_shift,
    shapes=_shift_shapes,
    save=save_nothing,
    backward=_pass_on,
    differentiable=("features",),
)
moments = Operator(
    "class_moments",
    MomentsInputs,
    ClassMoments,
    run=_moments,
    shapes=_moments_shapes,
    save=save_nothing,
    backward=refuse_gradient,
    differentiable=("features",),
    slopes=("mean", "m2"),
)
shifted_losses = Operator(
    "shifted_losses",
    ShiftedLossInputs,
    ShiftedLossResults,
    run=_losses,
    shapes=_losses_shapes,
    save=_save_gradient,
    backward=_scale_gradient,
    differentiable=("logits", "table"),
    slopes=("gradient",),
)
bound = Operator(
    "shifted_cross_entropy",
    BoundInputs,
    BoundResults,
    run=_bound,
    shapes=_bound_shapes,
    save=_save_bound,
    backward=_scale_bound,
    differentiable=("logits", "weight"),
    slopes=("gradient",),
)
bound_gradient = Operator(
    "shifted_cross_entropy_gradient",
    BoundGradientInputs,
    BoundGradients,
    run=_bound_gradient,
    shapes=_bound_gradient_shapes,
    save=save_nothing,
    backward=refuse_gradient,
    differentiable=("gradient", "outer"),
    slopes=("weight",),
)
