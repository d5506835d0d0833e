"""Detect non-finite losses without a host sync, and report them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mics_fast.common.files import renamed

NEVER = 2**62
_NO_MEMORY = (
    "can't allocate memory",  # torch on a CPU
    "CUDA allocation failed",  # DALI
    "CUDA error: out of memory",  # of the driver, outside torch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_SHOWN = 8  # sample ids in a message; the file has all of them


class Guard:
    """Records, on the device, the first step at which each value was not finite."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, ...], Tensor] = {}

    def watch(self, step: Tensor, values: Mapping[str, Tensor]) -> None:
        """Check the scalars of a step (0-d int64) without reading anything back."""
        names = tuple(values)
        finite = torch.stack([value.detach() for value in values.values()]).isfinite()
        found = torch.where(finite, NEVER, step)
        first = self._first.setdefault(names, found)
        torch.minimum(first, found, out=first)

    def first_steps(self) -> dict[str, Tensor]:
        """Return name -> first non-finite step, 0-d int64, or ``NEVER``."""
        steps: dict[str, Tensor] = {}
        for names, first in self._first.items():
            steps |= zip(names, first, strict=True)
        return steps


def first_broken(steps: Mapping[str, float]) -> tuple[int, list[str]] | None:
    """Return the first non-finite step and the names of its values; None if all were finite.

    The total loss and the gradient norm follow from the terms; they are named only if no term is.
    """
    step = min(steps.values(), default=NEVER)
    if step >= NEVER:
        return None
    names = [name for name, at in steps.items() if at == step]
    terms = [name for name in names if name.startswith("loss_")]
    return int(step), terms or names


def describe_samples(batch: Sequence[Any]) -> str:
    """List the manifest rows of a batch, the first ones only."""
    ids = [int(i) for part in batch for i in part.sample_id]
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(str, ids[:_SHOWN])) + more


def write_batch(file: Path, batch: Sequence[Any], about: Mapping[str, Any]) -> None:
    """Store the parts of a batch for ``torch.load`` with ``weights_only``.

    The file holds ``about`` and, under ``batch``, the fields of each part, such as views,
    present, label and sample_id, on the CPU.
    """

    def on_cpu(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: on_cpu(own) for name, own in value.items()}
        return value.cpu() if isinstance(value, Tensor) else value

    file.parent.mkdir(parents=True, exist_ok=True)
    with renamed(file) as partial:
        torch.save({**about, "batch": [on_cpu(vars(part)) for part in batch]}, partial)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for errors of a device or the host that is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
