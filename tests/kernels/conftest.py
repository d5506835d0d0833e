"""Fixtures of the fast implementations' tests."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.implementations import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation that runs here."""
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN: what a kernel forgets to write shows."""
    fresh, like = Tensor.new_empty, torch.empty_like

    def poison(made: Tensor) -> Tensor:
        return made.fill_(float("nan")) if made.is_floating_point() else made

    def new_empty(self: Tensor, *size: object, **options: object) -> Tensor:
        return poison(fresh(self, *size, **options))

    def empty_like(*args: object, **options: object) -> Tensor:
        return poison(like(*args, **options))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


@pytest.fixture
def instruction_sets() -> Iterator[Iterator[str]]:
    """The instruction sets of this CPU; the native module uses each while it is the current one."""
    native = importlib.import_module("mics_kernels._native")
    best = native.build_info()["instruction set"]
    names = ("avx512", "avx2", "sse2", "neon", "generic")
    there = [name for name in names if native.use_instruction_set(name)]
    native.use_instruction_set(best)
    assert there
    yield filter(native.use_instruction_set, there)
    native.use_instruction_set(best)
