"""Raw addresses for compiled kernels, which are for plain tensors with storage only."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def address(tensor: Tensor | None) -> int:
    """Return the address of the first element; 0 for None.

    Raises:
        RuntimeError: the tensor has elements but no memory.
    """
    if tensor is None:
        return 0
    start = tensor.data_ptr()
    if start == 0 and tensor.numel() > 0:
        raise RuntimeError(
            f"a {type(tensor).__name__} without memory reached a compiled kernel: "
            'use backend="reference"'
        )
    return start


def dtype_name(tensor: Tensor) -> str:
    """Name of a dtype in the native module: "float32", "bfloat16" or "float16"."""
    return _NAMES[tensor.dtype]


def is_plain(tensor: Tensor) -> bool:
    """Return True if the memory of the tensor holds its elements as they are.

    Subclasses, lazily negated tensors and tensors without storage (fake, batched, zero) are not
    plain.
    """
    if type(tensor) not in _PLAIN or tensor.is_neg():
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # wrappers of functorch and of the older vmap have none
        return False


def is_transformed() -> bool:
    """Return True inside a functorch transform (grad, vmap, jacrev, ...)."""
    return torch._C._are_functorch_transforms_active()


def is_intercepted() -> bool:
    """Return True if a dispatch mode (FakeTensorMode, make_fx, ...) or torch.jit.trace is on."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
