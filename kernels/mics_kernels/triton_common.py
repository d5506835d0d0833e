"""Helpers shared by the Triton implementations."""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

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


def cdiv(number: int, size: int) -> int:
    """Round number / size up: ``triton.cdiv`` without what makes it callable in kernels."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two >= number >= 1; as ``triton.next_power_of_2``."""
    return 1 << (number - 1).bit_length()


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Make kernels launch on the GPU of the tensor; does nothing on a CPU."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def chip_of(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and number of processors; for the interpreter any."""
    if device.type != "cuda":
        return 80, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any
) -> None:
    """Launch a kernel: ``kernel[grid](*arguments, **constants)`` in less host time.

    Args:
        kernel: decorated by ``triton.jit``.
        grid: number of programs along one to three axes.
        arguments: all arguments but the constants, in the order of the kernel.
        constants: ``tl.constexpr`` arguments, and options of the compiler.
    """
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        kernel[grid](*arguments, **constants)
        return
    compiled, values = compiled_for(kernel, grid, arguments, constants)
    compiled[(*grid, 1, 1)](*arguments, *values)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def compiled_for(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """Return the kernel compiled for such arguments, and the values of its constants.

    Triton finds it by looking at each argument, option and global of the kernel at every launch;
    here it is looked up by what it depends on.
    """
    device = triton.runtime.driver.active.get_current_device()
    key = (id(kernel), device, *map(_kind, arguments), *constants.items())
    found = _compiled.get(key)
    if found is None:
        rest = kernel.params[len(arguments) :]
        assert all(one.is_constexpr for one in rest), [one.name for one in rest]
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        found = _compiled[key] = compiled, tuple(constants[one.name] for one in rest)
    return found


def _kind(value: Any) -> Any:
    """Return what a compiled kernel depends on of an argument, or more than that."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return type(value)


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in this dtype, contiguous: itself where it is."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()
