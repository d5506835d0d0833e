"""Shared by the tests of all fast implementations: which ones run here, and on which device.

It imports only torch, so that the other tests run on a machine without hypothesis.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] * (GPU or INTERPRETED) + ["cpu"] * (not INTERPRETED)

# A half-precision result is rounded once, to 8 or 11 bits; Triton's interpreter cuts bfloat16 off.
BFLOAT16 = 2.0**-7 if INTERPRETED else 2.0**-8
ROUNDING = {torch.float32: 4e-7, torch.bfloat16: BFLOAT16, torch.float16: 2.0**-11}


def device_of(backend: str) -> str:
    """Return the device for the inputs of an implementation."""
    return "cuda" if GPU and backend in ("triton", "cuda") else "cpu"


def on_device(x: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on a device with the strides of ``x`` and the alignment of its address.

    ``Tensor.to`` starts the copy at an aligned address: no kernel would see a misaligned one.
    """
    if x.numel() == 0 or 0 in x.stride():
        return x.to(device, dtype)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    offset = x.data_ptr() % 64 // x.element_size()
    storage = torch.empty(offset + extent, device=device, dtype=dtype or x.dtype)
    return storage.as_strided(x.shape, x.stride(), offset).copy_(x)


def moved_to(device: str, values: dict[str, Any]) -> dict[str, Any]:
    """The tensors among named values on a device, the others as they are."""
    return {k: on_device(v, device) if isinstance(v, Tensor) else v for k, v in values.items()}


def captured(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of a step, and the tensors that every replay of it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and takes what memory it keeps
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
