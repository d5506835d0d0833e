"""A case: an operator on inputs of one size, and the implementations that are compared on them."""

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
        step: one call on inputs that stay where they are; repeated calls are timed.
        check: takes the result of ``step``; raises AssertionError where it is wrong.
        call: one call as a user makes it, on the inputs that ``Rivals.fresh`` gives.
        ours: whether it is this project's.
        compiled: whether torch.compile makes it: the first call takes long, and no CUDA graph can
            capture its backward pass.
        waits: whether a call waits for the GPU, so that no CUDA graph can capture it.
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
        fresh: new inputs for ``Rival.call``, made by operators of torch, as a network's layers
            make them; they want gradients where the case takes them.
        found: implementation -> how to call it.
        absent: implementation -> why it cannot run here.
        failed: implementation -> what was wrong with its result, or the error it raised.
    """

    fresh: Callable[[], Any]
    found: dict[str, Rival]
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An operator on inputs of one size.

    Attributes:
        operator: what is measured.
        shape: the size, in words.
        work: bytes and FLOPs that cannot be avoided.
        make: (device, tiny) -> implementations on new inputs, the same ones at every call;
            ``tiny`` asks for the smallest inputs of this kind.
        batch: rows, for plots.
        threads: CPU threads; None: as many as the command line says.
    """

    operator: str
    shape: str
    work: Work
    make: Callable[[torch.device, bool], Rivals]
    batch: int
    threads: int | None = None


def own_backends(operator: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """This project's implementations of an operator that can run here, and why the others cannot.

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
    """The case's implementations whose result is right; ``failed`` says why others are left out."""
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
    """The type and first line of an error."""
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
