"""What a benchmark of an operator is: inputs of one size, and implementations that use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.roofline import Work
from mics_kernels.backends import explain

Step = Callable[[], Any]
OURS = ("cpu", "triton", "cuda")
"""Names of this project's own implementations."""


@dataclass(frozen=True)
class Rivals:
    """What is compared on the same inputs.

    Attributes:
        steps: one call of each implementation, by name; "compiled" in a name: of torch.compile.
        check: takes a name and what its step returned; AssertionError where that is wrong.
        absent: name -> why that implementation cannot run here.
        failed: name -> what was wrong with its result, or how it ended.
        synchronises: names whose calls wait for the GPU, so that no CUDA graph captures them.
    """

    steps: dict[str, Step]
    check: Callable[[str, Any], None]
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    synchronises: frozenset[str] = frozenset()

    def captured(self, name: str) -> bool:
        """Whether a GPU replays this one as a CUDA graph; a graph of the backward pass that
        torch.compile makes cannot be captured."""
        return "compiled" not in name and name not in self.synchronises


@dataclass(frozen=True)
class Case:
    """An operator on inputs of one size.

    Attributes:
        operator: what is measured.
        shape: the size, for a reader.
        work: what it cannot do without.
        make: (device, tiny) -> rivals on new inputs, the same ones at every call; ``tiny``: the
            smallest inputs of this kind, for what a process keeps after its first call.
        batch: rows, for the plots.
        threads: of the CPU; None: as many as the command line says.
    """

    operator: str
    shape: str
    work: Work
    make: Callable[[torch.device, bool], Rivals]
    batch: int
    threads: int | None = None


def own_backends(operator: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """This project's implementations that can run here, and why others cannot.

    Args:
        operator: folder of mics_kernels.
    """
    names = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
    found, absent = [], {}
    for name in names:
        try:
            explain(operator, torch.empty(0, device=device), name)
            found.append(name)
        except (RuntimeError, ValueError) as error:
            absent[name] = str(error)
    return found, absent


def checked(case: Case, device: torch.device) -> Rivals:
    """The case's rivals that have shown that their result is right; ``failed`` names the others."""
    rivals = case.make(device, False)
    right: dict[str, Step] = {}
    failed = {}
    for name, step in rivals.steps.items():
        try:
            rivals.check(name, step())
            right[name] = step
        except AssertionError as error:
            failed[name] = f"is wrong: {error}"
        except Exception as error:  # one that ends like this must not take the others with it
            failed[name] = in_a_line(error)
    return replace(rivals, steps=right, failed=failed)


def in_a_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def close(got: Any, true: Any, tolerance: float) -> None:
    """Differences of at most ``tolerance`` times the largest of ``true``; tuples go by element."""
    for one, other in zip(got, true, strict=True):
        distance = (one.double() - other.double()).abs().max().item()
        allowed = tolerance * other.double().abs().max().item()
        assert distance <= allowed, f"off by {distance:.3g}, allowed {allowed:.3g}"
