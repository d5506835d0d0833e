"""Tests run on one thread: small tensors are faster so, and every process rounds alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; inherited by commands under test
os.environ["PYTHONFAULTHANDLER"] = "1"  # a rank or command that dies of a signal says where it was


@pytest.fixture(autouse=True, scope="session")
def _no_width_from_outside() -> None:
    """Tables are as wide as in a pipe: pytest-xdist sets the width of a terminal."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
