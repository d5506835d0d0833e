"""Where autograd and torch.compile meet the fast implementations of the evidential operators.

One registered operator a call (``torch.library``), so that ``torch.compile(fullgraph=True)`` traces
through it; in eager mode the same functions run in a plain ``autograd.Function``, since crossing
that border costs more than a small kernel. A loss and its gradient come out of one sweep: the
backward pass only scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mics_kernels.backends import implementation
from mics_kernels.registration import differentiable_once, library, register


def reduced_loss(
    values: Tensor,
    target: Tensor,
    kl_weight: float | Tensor,
    activation: str | None,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Reduced loss and fused evidence; differentiable once, in ``values``.

    Args:
        activation: None for ``evidential_loss`` (``values`` are evidence, fused is empty), else
            that of ``evidential_fusion_loss``.
        backend: the implementation, by name; never "reference", which needs no border.
    """
    wanted = values.requires_grad and torch.is_grad_enabled()
    run: Any = _Loss.apply if wanted else _loss
    if torch.compiler.is_compiling():
        run = torch.ops.mics_kernels.evidential_loss
        # As a tensor: a float of a registered operator is a constant, and one that changes every
        # step, as an annealed weight does, would be compiled anew every step.
        one = torch.ones((), device=values.device)  # torch.full would be a constant too
        kl_weight = one * kl_weight
    if isinstance(kl_weight, Tensor):
        kl_weight = kl_weight.to(torch.float32)
    arguments = (target, kl_weight, activation, present, weight, ignore_index, reduction, backend)
    loss, fused, _ = run(values, *arguments, wanted)
    return loss, fused


def fused_evidence(evidence: Tensor, present: Tensor | None, backend: str) -> Tensor:
    """``fuse_evidence``; differentiable once."""
    if torch.compiler.is_compiling():
        return torch.ops.mics_kernels.fuse_evidence(evidence, present, backend)
    if evidence.requires_grad and torch.is_grad_enabled():
        return _Fusion.apply(evidence, present, backend)
    return _fuse(evidence, present, backend)


def _loss(
    values: Tensor,
    target: Tensor,
    kl_weight: float | Tensor,
    activation: str | None,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    backend: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced loss, fused evidence, gradient of the reduced loss ("none": of each loss)."""
    losses, fused, gradient = implementation("evidential", values, backend).loss_and_gradient(
        values,
        target,
        kl_weight,
        activation,
        present,
        weight,
        ignore_index,
        reduction == "mean",
        want_gradient,
    )
    return losses if reduction == "none" else losses.sum(), fused, gradient


def _loss_shapes(
    values: Tensor,
    target: Tensor,
    kl_weight: float | Tensor,
    activation: str | None,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    backend: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = values.shape[0], values.shape[-1]
    losses = (rows,) if activation is not None else values.shape[:-1]
    loss = values.new_empty(losses if reduction == "none" else (), dtype=torch.float32)
    fused = values.new_empty((rows, classes) if activation is not None else 0, dtype=torch.float32)
    return loss, fused, values.new_empty(values.shape if want_gradient else 0)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, fused, gradient = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(fused, gradient)
    ctx.set_materialize_grads(False)


@differentiable_once
def _scale_gradient(ctx: Any, outer: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if outer is None:
        return None, *nothing
    (gradient,) = ctx.saved_tensors
    outer = outer.reshape(outer.shape + (1,) * (gradient.dim() - outer.dim()))
    return (gradient * outer).to(gradient.dtype), *nothing


@differentiable_once
def _scale_gradient_now(ctx: Any, outer: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    # On a CPU a look costs nothing, and the common factor 1 saves a pass over the gradient.
    if outer is not None and outer.dim() == 0 and outer.device.type == "cpu" and outer == 1.0:
        return ctx.saved_tensors[0], *(None,) * 9
    return _scale_gradient(ctx, outer, *rest)


def _fuse(evidence: Tensor, present: Tensor | None, backend: str) -> Tensor:
    return implementation("evidential", evidence, backend).fuse_evidence(evidence, present)


def _fuse_shapes(evidence: Tensor, present: Tensor | None, backend: str) -> Tensor:
    return evidence.new_empty((evidence.shape[0], evidence.shape[2]), dtype=torch.float32)


def _keep_evidence(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    evidence, present, ctx.backend = inputs
    ctx.save_for_backward(evidence, present, output)


def _fuse_gradient(
    evidence: Tensor, present: Tensor | None, fused: Tensor, outer: Tensor, backend: str
) -> Tensor:
    module = implementation("evidential", evidence, backend)
    return module.fuse_evidence_gradient(evidence, present, fused, outer)


def _fuse_gradient_shapes(
    evidence: Tensor, present: Tensor | None, fused: Tensor, outer: Tensor, backend: str
) -> Tensor:
    return evidence.new_empty(evidence.shape)


@differentiable_once
def _scale_evidence(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    compute = torch.ops.mics_kernels.fuse_evidence_gradient
    return compute(*ctx.saved_tensors, outer, ctx.backend), None, None


@differentiable_once
def _scale_evidence_now(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    evidence, present, fused = ctx.saved_tensors
    return _fuse_gradient(evidence, present, fused, outer, ctx.backend), None, None


class _Loss(torch.autograd.Function):
    # Not a setup_context of its own: torch would bind the arguments to their names at every call,
    # which takes longer than a small batch.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _loss(*inputs)
        _keep_gradient(ctx, inputs, output)
        return output

    backward = staticmethod(_scale_gradient_now)


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _fuse(*inputs)
        _keep_evidence(ctx, inputs, output)
        return output

    backward = staticmethod(_scale_evidence_now)


register(
    "evidential_loss(Tensor values, Tensor target, Tensor kl_weight, str? activation, "
    "Tensor? present, Tensor? weight, int ignore_index, str reduction, str backend, "
    "bool want_gradient) -> (Tensor, Tensor, Tensor)",
    _loss,
    _loss_shapes,
)
register(
    "fuse_evidence(Tensor evidence, Tensor? present, str backend) -> Tensor", _fuse, _fuse_shapes
)
register(
    "fuse_evidence_gradient(Tensor evidence, Tensor? present, Tensor fused, Tensor outer, "
    "str backend) -> Tensor",
    _fuse_gradient,
    _fuse_gradient_shapes,
)
torch.library.register_autograd(
    "mics_kernels::evidential_loss", _scale_gradient, setup_context=_keep_gradient, lib=library
)
torch.library.register_autograd(
    "mics_kernels::fuse_evidence", _scale_evidence, setup_context=_keep_evidence, lib=library
)
