"""The benchmark of the step on kept features."""

from __future__ import annotations

import math
import time

import pytest
import torch

from bench import features
from bench.rows import Options

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_rung_gives_the_losses_of_the_reference_and_is_timed(monkeypatch):
    """A difference of a loss would raise."""
    monkeypatch.setattr(features, "CLASSES", (8,))
    monkeypatch.setattr(features, "BATCHES", (16,))
    monkeypatch.setattr(features, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(features, "TURN", 0.0)
    options = Options(
        device=torch.device("cpu"), full=True, threads=1, budget=0.0,
        end=time.monotonic() + math.inf, manifest=None,
    )  # fmt: skip
    rows = list(features.rows(options))
    assert [row.get("implementation") for row in rows] == [
        "reference losses", "reference losses, compiled",
        "fused operators", "fused operators, compiled",
    ]  # fmt: skip
    assert all(row["median_ms"] > 0 and row["shape"] == "8 classes, batch 16" for row in rows)
