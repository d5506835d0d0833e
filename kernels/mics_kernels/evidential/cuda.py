"""The evidential operators in CUDA C++ (csrc/evidential_cuda.cu), on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.addresses import address
from mics_kernels.evidential.native import prepare_fusion, prepare_fusion_gradient, prepare_rows
from mics_kernels.evidential.records import (
    EvidentialInputs,
    EvidentialResults,
    FusionGradientInputs,
    FusionInputs,
)

if not _native.build_info()["cuda"]:
    raise ImportError("the native module was built without CUDA (MICS_CUDA=1 asks for it)")


def loss_and_gradient(inputs: EvidentialInputs) -> EvidentialResults:
    """Compute losses, fused evidence and the gradient of the losses' sum in one sweep."""
    with torch.cuda.device(inputs.values.device):
        stream = torch.cuda.current_stream().cuda_stream
        count = _count(inputs, stream) if inputs.reduction == "mean" else None
        prepared = prepare_rows(inputs, count)
        _native.evidential_cuda(prepared.call, stream)
    return prepared.results


def fuse_evidence(inputs: FusionInputs) -> Tensor:
    """Fuse evidence by Dempster's rule: (B, C) float32."""
    prepared = prepare_fusion(inputs)
    with torch.cuda.device(inputs.evidence.device):
        _native.fuse_evidence_cuda(prepared.call, torch.cuda.current_stream().cuda_stream)
    return prepared.output


def fuse_evidence_gradient(inputs: FusionGradientInputs) -> Tensor:
    """Compute the gradient of the evidence from that of the fused evidence."""
    prepared = prepare_fusion_gradient(inputs)
    with torch.cuda.device(inputs.evidence.device):
        _native.fuse_evidence_gradient_cuda(prepared.call, torch.cuda.current_stream().cuda_stream)
    return prepared.output


def _count(inputs: EvidentialInputs, stream: int) -> Tensor:
    """Number of rows that count, at least 1: 1 float32 on the device."""
    target = inputs.target.contiguous()
    count = target.new_empty(1, dtype=torch.float32)
    if target.dim() == 2:
        return count.fill_(max(len(target), 1))
    _native.count_labels_cuda(
        address(target), len(target), inputs.ignore_index, address(count), stream
    )
    return count
