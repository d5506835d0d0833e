"""A case: an operator on inputs of one size, and its implementations to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.roofline import Work
from mics_kernels.backends import explain

Step = Callable[[], Any]


@dataclass(frozen=True)
class Rival:
    """One implementation.

    Attributes:
        step: one call on fixed inputs; repeated calls are timed.
        check: takes the result of ``step``; raises AssertionError if it is wrong.
        call: one call as users make it, on inputs from ``Rivals.fresh``.
        ours: True for this project's implementations.
        compiled: True if torch.compile makes it: the first call is slow, and no CUDA graph can
            capture its backward pass.
        waits: True if a call waits for the GPU, so that no CUDA graph can capture it.
    """

    step: Step
    check: Callable[[Any], None]
    call: Callable[[Any], Any]
    ours: bool = False
    compiled: bool = False
    waits: bool = False


@dataclass(frozen=True)
class Rivals:
    """The implementations of a case, on the same inputs.

    Attributes:
        fresh: makes new inputs for ``Rival.call`` by torch operators, as a network's layers would;
            they require gradients if the case has any.
        found: implementation -> how to call it.
        absent: implementation -> why it cannot run here.
        failed: implementation -> the error in its result, or the one it raised.
    """

    fresh: Callable[[], Any]
    found: dict[str, Rival]
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An operator on inputs of one size.

    Attributes:
        operator: name of the operator.
        shape: the size, in words.
        work: unavoidable bytes and FLOPs.
        make: (device, tiny) -> implementations on new inputs, equal for every call; ``tiny``
            requests the smallest inputs of this kind.
        batch: rows, for plots.
        threads: CPU threads; None: as on the command line.
    """

    operator: str
    shape: str
    work: Work
    make: Callable[[torch.device, bool], Rivals]
    batch: int
    threads: int | None = None


def own_backends(operator: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Return this project's backends for an operator that run here, and why others do not.

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
    """Return the case's correct implementations; ``failed`` explains the others."""
    rivals = case.make(device, False)
    right: dict[str, Rival] = {}
    failed = {}
    for name, rival in rivals.found.items():
        try:
            rival.check(rival.step())
            right[name] = rival
        except AssertionError as error:
            failed[name] = f"is wrong: {error}"
        except Exception as error:  # the others are still measured
            failed[name] = in_a_line(error)
    return replace(rivals, found=right, failed=failed)


def in_a_line(error: BaseException) -> str:
    """Return the type and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def close(got: Any, true: Any, tolerance: float) -> None:
    """Compare tuples of tensors, each to ``tolerance`` times the largest element of the true one.

    Raises:
        AssertionError: one is further off.
    """
    for one, other in zip(got, true, strict=True):
        distance = (one.double() - other.double()).abs().max().item()
        allowed = tolerance * other.double().abs().max().item()
        assert distance <= allowed, f"off by {distance:.3g}, allowed {allowed:.3g}"
