"""Helpers shared by the Triton implementations."""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The compiler accepts global constants only as tl.constexpr, the interpreter only as plain values.
constant = tuple if triton.knobs.runtime.interpret else tl.constexpr


@triton.jit
def polynomial(t, c: tl.constexpr):
    """Horner's rule: c[0] + t (c[1] + t (c[2] + ...))."""
    total = t * 0.0 + c[len(c) - 1]
    for i in tl.static_range(1, len(c)):
        total = total * t + c[len(c) - 1 - i]
    return total


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Make kernels launch on the GPU of the tensor; does nothing on a CPU."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def chip_of(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and number of processors; for the interpreter any."""
    if device.type != "cuda":
        return 80, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
