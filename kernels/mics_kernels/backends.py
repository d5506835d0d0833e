"""Choice of the implementation that runs an operator.

The ``backend`` argument decides; without one, the environment variable ``MICS_KERNELS_BACKEND``;
without that, the first implementation in ``IMPLEMENTATIONS`` that serves the tensor and can be
imported. A requested implementation that cannot run is an error with the reason. An automatic
choice that cannot be imported is reported once, with the cause, and skipped.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mics_kernels.addresses import is_intercepted, is_plain, is_transformed

BACKENDS = ("reference", "cpu", "triton", "cuda")


class Implementation(NamedTuple):
    """One implementation of an operator.

    Args:
        backend: its name, one of ``BACKENDS``.
        module: its module, below ``mics_kernels``.
        refuses: returns the reason why it cannot serve a tensor (device, dtype, shape), or "".
    """

    backend: str
    module: str
    refuses: Callable[[Tensor], str]


class Choice(NamedTuple):
    """The chosen implementation and the reason for the choice."""

    backend: str
    reason: str


def _serves_everything(tensor: Tensor) -> str:
    return ""


def _on_cpu(tensor: Tensor) -> str:
    device = tensor.device
    return "" if device.type == "cpu" else f"it serves CPU tensors, not {device}"


def _on_gpu(tensor: Tensor) -> str:
    device = tensor.device
    return "" if device.type == "cuda" else f"it serves CUDA tensors, not {device}"


def _in_triton(tensor: Tensor) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":  # runs anywhere, slowly: for tests
        return ""
    return _on_gpu(tensor)


def _in_float32(tensor: Tensor) -> str:
    if tensor.dtype == torch.float64:
        return "it computes in float32, and float64 asks for more"
    return ""


def _up_to_8_views(tensor: Tensor) -> str:
    if tensor.dim() == 3 and tensor.shape[1] > 8:
        return f"it combines at most 8 views, not {tensor.shape[1]}"
    return ""


def _up_to_1024_features(tensor: Tensor) -> str:
    if tensor.dim() == 2 and tensor.shape[1] > 1024:
        return f"it serves at most 1024 features, not {tensor.shape[1]}"
    return ""


def _row(backend: str, module: str, *refusals: Callable[[Tensor], str]) -> Implementation:
    def refuses(tensor: Tensor) -> str:
        for refusal in refusals:
            if reason := refusal(tensor):
                return reason
        return ""

    return Implementation(backend, module, refuses)


_SHIFT = (
    _row("cpu", "shift.cpu", _on_cpu, _in_float32),
    _row("triton", "shift.triton_kernels", _in_triton, _in_float32),
    _row("reference", "shift.reference", _serves_everything),
)

IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {  # best first
    "consistency": (
        _row("cpu", "consistency.cpu", _on_cpu, _in_float32),
        _row("triton", "consistency.triton_kernels", _in_triton, _in_float32, _up_to_1024_features),
        _row("reference", "consistency.reference", _serves_everything),
    ),
    "evidential": (
        _row("cpu", "evidential.cpu", _on_cpu, _in_float32, _up_to_8_views),
        _row("triton", "evidential.triton_kernels", _in_triton, _in_float32, _up_to_8_views),
        _row("cuda", "evidential.cuda", _on_gpu, _in_float32, _up_to_8_views),
        _row("reference", "evidential.reference", _serves_everything),
    ),
    "moments": _SHIFT,
    "shift": _SHIFT,
}

_modules: dict[str, ModuleType] = {}
_broken: dict[str, str] = {}  # module -> why its import failed


def explain(op: str, tensor: Tensor, backend: str | None = None) -> Choice:
    """Return the implementation that serves ``tensor``, and why.

    Args:
        op: "consistency", "evidential", "moments" or "shift".
        tensor: first tensor argument of the operator; device, dtype and shape matter.
        backend: requested name; default ``MICS_KERNELS_BACKEND``, else the best one.

    Returns:
        ``Choice(backend, reason)``.

    Raises:
        ValueError: unknown operator or backend, or an operator without this backend.
        RuntimeError: the requested backend cannot run here; the message says why.

    Examples:
        >>> import torch
        >>> from mics_kernels.backends import explain
        >>> explain("shift", torch.zeros(2, 3), "reference").reason
        'asked for by the backend argument'
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op must be one of {', '.join(IMPLEMENTATIONS)}, got {op!r}")
    if backend is not None:
        return _requested(op, tensor, backend, "backend argument")
    if asked := os.environ.get("MICS_KERNELS_BACKEND"):
        return _requested(op, tensor, asked, "MICS_KERNELS_BACKEND")
    skipped: list[str] = []
    for row in IMPLEMENTATIONS[op]:
        if not (obstacle := _obstacle(row, tensor)):
            return Choice(row.backend, "; ".join(["the best available", *skipped]))
        skipped.append(f"not {row.backend}: {obstacle}")
    raise RuntimeError(f"no backend of {op} can run: {'; '.join(skipped)}")


def native_on_cpu(*tensors: Tensor) -> ModuleType | None:
    """Return the C++ module of the shift, if its functions may be called on these tensors as they
    are: plain ones on a CPU, outside tracers and transforms. None otherwise."""
    if torch.compiler.is_compiling() or is_transformed() or is_intercepted():
        return None
    if not all(own.device.type == "cpu" and is_plain(own) for own in tensors):
        return None
    return None if _import("cpu", "shift.cpu") else _modules["shift.cpu"]


def implementation(op: str, backend: str) -> ModuleType:
    """Return the module of the backend that ``explain`` chooses for an operator.

    Raises:
        RuntimeError: it cannot be imported in this process.
    """
    row = next(row for row in IMPLEMENTATIONS[op] if row.backend == backend)
    if broken := _import(row.backend, row.module):
        raise RuntimeError(f"the {backend} backend of {op} cannot be imported ({broken})")
    return _modules[row.module]


def _requested(op: str, tensor: Tensor, backend: str, source: str) -> Choice:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    rows = {row.backend: row for row in IMPLEMENTATIONS[op]}
    if backend not in rows:
        raise ValueError(f"{source} asks for {backend!r}, but {op} has only {', '.join(rows)}")
    if obstacle := _obstacle(rows[backend], tensor):
        raise RuntimeError(f"{source} asks for {backend!r}, but {op} cannot use it: {obstacle}")
    return Choice(backend, f"asked for by the {source}")


def _obstacle(row: Implementation, tensor: Tensor) -> str:
    """Import an implementation; return the reason why it cannot run, or ""."""
    if refusal := row.refuses(tensor):
        return refusal
    broken = _import(row.backend, row.module)
    return f"its import failed ({broken})" if broken else ""


def _import(backend: str, module: str) -> str:
    """Import an implementation once; return the reason why that failed, or ""."""
    if module in _modules or module in _broken:
        return _broken.get(module, "")
    try:
        _modules[module] = importlib.import_module(f"mics_kernels.{module}")
    except Exception as error:  # a broken library raises anything
        _broken[module] = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"mics_kernels does without its {backend} backend ({module}): its import failed "
            f"({_broken[module]})",
            RuntimeWarning,
            stacklevel=2,
        )
    return _broken.get(module, "")


# torch.compile calls it and does not trace the import. torch.compiler.assume_constant_result sets
# the same mark, but imports the whole compiler, which takes seconds.
_import._dynamo_marked_constant = True  # type: ignore[attr-defined]
