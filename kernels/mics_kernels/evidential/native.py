"""Native calls of the C++ and CUDA implementations, prepared from tensors.

Outputs are allocated, arrays made contiguous, targets and weights float32. A native call holds
addresses only: the caller keeps its inputs alive until the launch (memory freed later is reused in
the order of the stream).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.addresses import address, dtype_name
from mics_kernels.evidential.records import (
    EvidentialInputs,
    EvidentialResults,
    FusionGradientInputs,
    FusionInputs,
)


class NativeRows(NamedTuple):
    """Prepared call of a loss: its results, and the inputs to keep alive."""

    call: _native.EvidentialCall
    results: EvidentialResults
    inputs: tuple[object, ...]


def prepare_rows(inputs: EvidentialInputs, count: Tensor | None) -> NativeRows:
    """Allocate outputs and describe a call.

    Args:
        inputs: the record.
        count: 1 float32 that losses and gradients are divided by; None: by 1.
    """
    target, kl_weight = inputs.target, inputs.kl_weight
    values = inputs.values.contiguous()
    rows, classes = values.shape[0], values.shape[-1]
    views = values.shape[1] if values.dim() == 3 else 1
    labels = target.contiguous() if target.dim() == 1 else None
    targets = target.to(torch.float32).contiguous() if target.dim() == 2 else None
    present = None if inputs.present is None else inputs.present.contiguous()
    weight = None if inputs.weight is None else inputs.weight.to(torch.float32).contiguous()
    fuse = inputs.activation is not None
    results = EvidentialResults(
        values.new_empty((rows,) if fuse else values.shape[:-1], dtype=torch.float32),
        values.new_empty((rows, classes) if fuse else 0, dtype=torch.float32),
        values.new_empty(values.shape if inputs.want_gradient else 0),
    )
    on_gpu = None
    if isinstance(kl_weight, Tensor) and kl_weight.is_cuda:
        on_gpu = kl_weight.to(torch.float32)
    call = _native.EvidentialCall(
        input=address(values),
        dtype=dtype_name(values),
        labels=address(labels),
        targets=address(targets),
        present=address(present),
        weight=address(weight),
        count=address(count),
        losses=address(results.loss),
        fused=address(results.fused),
        gradient=address(results.gradient),
        rows=rows,
        views=views,
        classes=classes,
        activation=inputs.activation or "identity",
        kl_weight=float(kl_weight) if on_gpu is None else 0.0,
        kl_weight_on_gpu=address(on_gpu),
        ignore_index=inputs.ignore_index,
    )
    return NativeRows(call, results, (values, labels, targets, present, weight, count, on_gpu))


class NativeFusion(NamedTuple):
    """Prepared call of the fusion or its gradient: its output, and the inputs to keep alive."""

    call: _native.FusionCall
    output: Tensor
    inputs: tuple[object, ...]


def prepare_fusion(inputs: FusionInputs) -> NativeFusion:
    """Allocate the fused evidence (B, C) and describe the call that computes it."""
    rows, _, classes = inputs.evidence.shape
    return _fusion_call(inputs, inputs.evidence.new_empty((rows, classes), dtype=torch.float32))


def prepare_fusion_gradient(inputs: FusionGradientInputs) -> NativeFusion:
    """Allocate the gradient of the evidence (B, V, C) and describe the call that computes it."""
    gradient = inputs.evidence.new_empty(inputs.evidence.shape)
    return _fusion_call(inputs, gradient, inputs.outer.contiguous())


def _fusion_call(
    inputs: FusionInputs | FusionGradientInputs, output: Tensor, outer: Tensor | None = None
) -> NativeFusion:
    rows, views, classes = inputs.evidence.shape
    evidence = inputs.evidence.contiguous()
    present = None if inputs.present is None else inputs.present.contiguous()
    call = _native.FusionCall(
        evidence=address(evidence),
        dtype=dtype_name(evidence),
        present=address(present),
        fused=address(output if outer is None else None),
        outer=address(outer),
        gradient=address(None if outer is None else output),
        rows=rows,
        views=views,
        classes=classes,
    )
    return NativeFusion(call, output, (evidence, present, outer))
