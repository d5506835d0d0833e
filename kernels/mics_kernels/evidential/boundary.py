"""The evidential operators as autograd and ``torch.compile`` see them.

A loss and its gradient come out of one sweep; the backward pass only scales. The gradient of the
fusion is a second sweep, and an operator of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mics_kernels.addresses import is_plain, is_transformed
from mics_kernels.backends import implementation
from mics_kernels.evidential.records import (
    EvidentialInputs,
    EvidentialResults,
    FusionGradientInputs,
    FusionInputs,
)
from mics_kernels.registration import (
    Gradients,
    Operator,
    differentiable_once,
    refuse_gradient,
    save_nothing,
)


def _loss(inputs: EvidentialInputs) -> EvidentialResults:
    results = implementation("evidential", inputs.backend).loss_and_gradient(inputs)
    if inputs.reduction == "none":
        return results
    return results._replace(loss=results.loss.sum())


def _loss_shapes(inputs: EvidentialInputs) -> EvidentialResults:
    values, fuses = inputs.values, inputs.activation is not None
    rows, classes = values.shape[0], values.shape[-1]
    losses = (rows,) if fuses else values.shape[:-1]
    return EvidentialResults(
        values.new_empty(losses if inputs.reduction == "none" else (), dtype=torch.float32),
        values.new_empty((rows, classes) if fuses else 0, dtype=torch.float32),
        values.new_empty(values.shape if inputs.want_gradient else 0),
    )


def _save_gradient(ctx: Any, inputs: EvidentialInputs, results: EvidentialResults) -> None:
    ctx.save_for_backward(results.gradient)


@differentiable_once
def _scale_gradient(ctx: Any, outer: Tensor) -> Gradients:
    (gradient,) = ctx.saved_tensors
    if _is_last_use(outer) and outer == 1.0:
        return {"values": gradient}
    outer = outer.reshape(outer.shape + (1,) * (gradient.dim() - outer.dim()))
    return {"values": (gradient * outer).to(gradient.dtype)}


def _is_last_use(outer: Tensor) -> bool:
    """Return True if the saved gradient can be returned as it is for ``outer`` = 1.

    The graph must not be kept, since others may write into the gradient, and reading ``outer`` must
    not synchronise.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return False
    if outer.dim() > 0 or outer.device.type != "cpu" or not is_plain(outer):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _fuse(inputs: FusionInputs) -> Tensor:
    return implementation("evidential", inputs.backend).fuse_evidence(inputs)


def _fuse_shapes(inputs: FusionInputs) -> Tensor:
    rows, _, classes = inputs.evidence.shape
    return inputs.evidence.new_empty((rows, classes), dtype=torch.float32)


def _save_evidence(ctx: Any, inputs: FusionInputs, _fused: Tensor) -> None:
    ctx.backend = inputs.backend
    ctx.save_for_backward(inputs.evidence, inputs.present)


@differentiable_once
def _scale_evidence(ctx: Any, outer: Tensor) -> Gradients:
    evidence, present = ctx.saved_tensors
    inputs = FusionGradientInputs(evidence, present, outer, ctx.backend)
    return {"evidence": fused_evidence_gradient(inputs)}


def _fuse_gradient(inputs: FusionGradientInputs) -> Tensor:
    return implementation("evidential", inputs.backend).fuse_evidence_gradient(inputs)


def _fuse_gradient_shapes(inputs: FusionGradientInputs) -> Tensor:
    return inputs.evidence.new_empty(inputs.evidence.shape)


reduced_loss = Operator(
    "evidential_loss",
    EvidentialInputs,
    EvidentialResults,
    run=_loss,
    shapes=_loss_shapes,
    save=_save_gradient,
    backward=_scale_gradient,
    differentiable=("values",),
    slopes=("gradient",),
)
fused_evidence = Operator(
    "fused_evidence",
    FusionInputs,
    Tensor,
    run=_fuse,
    shapes=_fuse_shapes,
    save=_save_evidence,
    backward=_scale_evidence,
    differentiable=("evidence",),
)
fused_evidence_gradient = Operator(
    "fused_evidence_gradient",
    FusionGradientInputs,
    Tensor,
    run=_fuse_gradient,
    shapes=_fuse_gradient_shapes,
    save=save_nothing,
    backward=refuse_gradient,
    differentiable=("evidence", "outer"),
)
