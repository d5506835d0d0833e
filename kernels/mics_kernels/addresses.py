"""Tensors as the native module takes them: an address, and the name of a dtype."""

from __future__ import annotations

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """Where the first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(tensor: Tensor) -> str:
    """As the native module spells it: "float32", "bfloat16" or "float16"."""
    return str(tensor.dtype).removeprefix("torch.")
