"""The evidential operators in CUDA C++ (csrc/evidential_cuda.cu), on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels import _native
from mics_kernels.evidential.native import prepare_fusion, prepare_rows

if not _native.build_info()["cuda"]:
    raise ImportError("the native module was built without CUDA (MICS_CUDA=1 asks for it)")


def loss_and_gradient(
    values: Tensor,
    target: Tensor,
    kl_weight: float | Tensor,
    activation: str | None,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    mean: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, fused evidence and gradient; arguments and results as in cpu.py."""
    with torch.cuda.device(values.device):
        stream = torch.cuda.current_stream().cuda_stream
        count = _count(target.contiguous(), ignore_index, stream) if mean else None
        prepared = prepare_rows(
            values,
            target,
            kl_weight,
            activation,
            present,
            weight,
            ignore_index,
            count,
            want_gradient,
        )
        _native.evidential_cuda(prepared.call, stream)
    return prepared.losses, prepared.fused, prepared.gradient


def fuse_evidence(evidence: Tensor, present: Tensor | None) -> Tensor:
    """Dempster's rule: (B, V, C) -> (B, C) float32."""
    prepared = prepare_fusion(evidence, present, None, None)
    with torch.cuda.device(evidence.device):
        _native.fuse_evidence_cuda(prepared.call, torch.cuda.current_stream().cuda_stream)
    return prepared.output


def fuse_evidence_gradient(
    evidence: Tensor, present: Tensor | None, fused: Tensor, outer: Tensor
) -> Tensor:
    """Gradient of ``fuse_evidence``, given that of its result: like ``evidence``."""
    prepared = prepare_fusion(evidence, present, fused, outer)
    with torch.cuda.device(evidence.device):
        _native.fuse_evidence_gradient_cuda(prepared.call, torch.cuda.current_stream().cuda_stream)
    return prepared.output


def _count(target: Tensor, ignore_index: int, stream: int) -> Tensor:
    count = target.new_empty(1, dtype=torch.float32)
    if target.dim() == 2:
        return count.fill_(max(len(target), 1))
    _native.count_labels_cuda(
        target.data_ptr(), len(target), ignore_index, count.data_ptr(), stream
    )
    return count
