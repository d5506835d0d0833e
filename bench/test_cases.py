"""The cases under pytest-benchmark: its statistics, its storage, its comparison of runs.

    pytest bench --benchmark-autosave [-k "shift and eager"]
    pytest bench --benchmark-compare

Each implementation is checked, then runs alone. ``python -m bench`` is what lets them take turns;
only its ratios are in the documents.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from bench.__main__ import OPERATORS
from bench.case import Case, Rivals, checked

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES: dict[str, Case] = {
    f"{case.operator} {case.shape}{f' {case.threads} thread' if case.threads else ''}": case
    for subject in OPERATORS
    for case in importlib.import_module(f"bench.{subject}").cases(DEVICE)
}


@cache
def implementations(label: str) -> list[str]:
    """Names of a case's implementations; made on tiny inputs, where that is quick."""
    return list(CASES[label].make(DEVICE, True).steps)


@lru_cache(maxsize=1)  # inputs of one case at a time
def rivals_of(label: str) -> Rivals:
    """A case's implementations, each checked."""
    return checked(CASES[label], DEVICE)


def waiting(step: Callable[[], object]) -> Callable[[], object]:
    """A call that waits for the GPU, where there is one."""
    if DEVICE.type == "cpu":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize()

    return call


@pytest.mark.parametrize(
    ("label", "name"), [(label, name) for label in CASES for name in implementations(label)]
)
def test_time(label: str, name: str, benchmark: Any) -> None:
    """One implementation of one case; groups are cases."""
    threads = torch.get_num_threads()
    torch.set_num_threads(CASES[label].threads or threads)
    benchmark.group = label
    rivals = rivals_of(label)
    assert not rivals.failed.get(name), rivals.failed[name]
    step = waiting(rivals.steps[name])
    benchmark.pedantic(step, warmup_rounds=2, rounds=10)
    torch.set_num_threads(threads)
