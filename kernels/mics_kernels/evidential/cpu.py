"""The evidential operators in C++ (csrc/evidential_cpu.cpp), vectorised and multithreaded."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.evidential.native import prepare_fusion, prepare_fusion_gradient, prepare_rows
from mics_kernels.evidential.records import (
    EvidentialInputs,
    EvidentialResults,
    FusionGradientInputs,
    FusionInputs,
)


def loss_and_gradient(inputs: EvidentialInputs) -> EvidentialResults:
    """Compute losses, fused evidence and the gradient of the losses' sum in one sweep."""
    count = _counted_rows(inputs) if inputs.reduction == "mean" else None
    prepared = prepare_rows(inputs, count)
    _native.evidential_cpu(prepared.call, torch.get_num_threads())
    return prepared.results


def _counted_rows(inputs: EvidentialInputs) -> Tensor:
    """Number of rows that are not ignored, at least 1, as a float32 tensor."""
    target = inputs.target
    if target.dim() == 2:
        return torch.tensor(float(max(1, target.shape[0])))
    return target.ne(inputs.ignore_index).sum().clamp_(min=1).to(torch.float32)


def fuse_evidence(inputs: FusionInputs) -> Tensor:
    """Fuse evidence by Dempster's rule: (B, C) float32."""
    prepared = prepare_fusion(inputs)
    _native.fuse_evidence_cpu(prepared.call, torch.get_num_threads())
    return prepared.output


def fuse_evidence_gradient(inputs: FusionGradientInputs) -> Tensor:
    """Compute the gradient of the evidence from that of the fused evidence."""
    prepared = prepare_fusion_gradient(inputs)
    _native.fuse_evidence_gradient_cpu(prepared.call, torch.get_num_threads())
    return prepared.output
