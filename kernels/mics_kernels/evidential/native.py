"""What the C++ and the CUDA implementation share: from tensors to addresses in a native call.

Outputs are allocated here; every array is made contiguous, targets and weights float32. A native
call holds addresses only: whoever makes it keeps what it was prepared from alive until it is
launched (memory freed after that is reused in the order of the stream).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.addresses import address, dtype_name


class NativeRows(NamedTuple):
    """A prepared call of the loss: its outputs, and the inputs it reads."""

    call: _native.EvidentialCall
    losses: Tensor
    fused: Tensor
    gradient: Tensor
    inputs: tuple[object, ...]


def prepare_rows(
    values: Tensor,
    target: Tensor,
    kl_weight: float | Tensor,
    activation: str | None,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    count: Tensor | None,
    want_gradient: bool,
) -> NativeRows:
    """Allocate outputs and describe a call; arguments as ``cpu.loss_and_gradient``.

    Args:
        count: 1 float32 that losses and gradients are divided by; None: by 1.
    """
    rows, classes = values.shape[0], values.shape[-1]
    views = values.shape[1] if values.dim() == 3 else 1
    values = values.contiguous()
    labels = target.contiguous() if target.dim() == 1 else None
    targets = target.to(torch.float32).contiguous() if target.dim() == 2 else None
    present = None if present is None else present.contiguous()
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    fuse = activation is not None
    losses_shape = (rows,) if fuse else values.shape[:-1]
    losses = values.new_empty(losses_shape, dtype=torch.float32)
    fused = values.new_empty((rows, classes) if fuse else 0, dtype=torch.float32)
    gradient = values.new_empty(values.shape if want_gradient else 0)
    on_gpu = kl_weight if isinstance(kl_weight, Tensor) and kl_weight.is_cuda else None
    call = _native.EvidentialCall(
        input=values.data_ptr(),
        dtype=dtype_name(values),
        labels=address(labels),
        targets=address(targets),
        present=address(present),
        weight=address(weight),
        count=address(count),
        losses=losses.data_ptr(),
        fused=fused.data_ptr(),
        gradient=gradient.data_ptr(),
        rows=rows,
        views=views,
        classes=classes,
        activation=activation or "identity",
        kl_weight=float(kl_weight) if on_gpu is None else 0.0,
        kl_weight_on_gpu=address(on_gpu),
        ignore_index=ignore_index,
    )
    inputs = (values, labels, targets, present, weight, count, kl_weight)
    return NativeRows(call, losses, fused, gradient, inputs)


class NativeFusion(NamedTuple):
    """A prepared call of the fusion or its gradient: its output, and the inputs it reads."""

    call: _native.FusionCall
    output: Tensor
    inputs: tuple[object, ...]


def prepare_fusion(
    evidence: Tensor, present: Tensor | None, fused: Tensor | None, outer: Tensor | None
) -> NativeFusion:
    """Allocate the output and describe a call.

    Args:
        evidence: (B, V, C).
        present: (B, V) bool, or None.
        fused: (B, C) the result, where the gradient is wanted; else None.
        outer: (B, C) its gradient, where that of ``evidence`` is wanted; else None.
    """
    rows, views, classes = evidence.shape
    evidence = evidence.contiguous()
    present = None if present is None else present.contiguous()
    outer = None if outer is None else outer.contiguous()
    if fused is None:
        output = fused = evidence.new_empty((rows, classes), dtype=torch.float32)
    else:
        output, fused = evidence.new_empty(evidence.shape), fused.contiguous()
    call = _native.FusionCall(
        evidence=evidence.data_ptr(),
        dtype=dtype_name(evidence),
        present=address(present),
        fused=fused.data_ptr(),
        outer=address(outer),
        gradient=0 if outer is None else output.data_ptr(),
        rows=rows,
        views=views,
        classes=classes,
    )
    return NativeFusion(call, output, (evidence, present, fused, outer))
