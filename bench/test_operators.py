"""This project's operators under pytest-benchmark, with its storage and its comparison of runs.

    pytest bench --benchmark-autosave [-k "shift and cpu"]
    pytest bench --benchmark-compare

It shows whether a change made an operator slower. ``python -m bench`` compares the operators with
their rivals, and is the source of the documentation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.__main__ import OPERATORS
from bench.case import Case, own_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def own_cases() -> list[Any]:
    """List each operator, size and implementation of this project that runs here."""
    return [
        pytest.param(case, backend, id=f"{case.operator}, {case.shape}, {backend}")
        for subject in OPERATORS
        for case in importlib.import_module(f"bench.{subject}").cases(DEVICE)
        for backend in own_backends(subject, DEVICE)[0]
        if case.threads is None
    ]


@pytest.mark.parametrize(("case", "backend"), own_cases())
def test_operator(case: Case, backend: str, benchmark: Any) -> None:
    rivals = case.make(DEVICE, False)
    rival = rivals.found[backend]
    rival.check(rival.step())
    benchmark.group = f"{case.operator}, {case.shape}"
    benchmark.pedantic(waiting(rival.step), warmup_rounds=2, rounds=10)


def waiting(step: Callable[[], object]) -> Callable[[], object]:
    """Wrap a call so that on a GPU it returns when the result is ready."""
    if DEVICE.type == "cpu":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize()

    return call
