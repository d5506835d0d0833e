"""The learning rate depends on the step only, without jumps; only matrices decay."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from mics_fast.engine.optimiser import cosine_with_warmup, decay_groups, set_learning_rate


@pytest.mark.parametrize(("steps", "warmup"), [(300, 15), (1000, 50), (40, 2), (10, 0)])
def test_the_learning_rate_never_jumps(steps, warmup):
    rates = [cosine_with_warmup(step, steps, warmup, 0.1) for step in range(steps)]
    largest = max(abs(b - a) for a, b in itertools.pairwise(rates))
    assert largest <= max(1 / (warmup + 1), 2 / (steps - warmup)) + 1e-12
    assert max(rates) == pytest.approx(1)
    assert min(rates) > 0


def test_the_learning_rate_ends_where_it_should():
    assert cosine_with_warmup(1000, 1000, 50, 0.1) == pytest.approx(0.1)


def test_the_learning_rate_is_warmed_up_and_then_a_cosine():
    rates = [cosine_with_warmup(step, 12, 2, 0.2) for step in range(13)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    wanted = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)]
    assert rates[2:] == pytest.approx(wanted, rel=1e-15)


def test_a_group_keeps_its_own_peak():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 10.0}])
    for factor in (0.5, 0.25):
        set_learning_rate(optimiser, factor)
        assert [group["lr"] for group in optimiser.param_groups] == [factor, 10 * factor]
    restored = torch.optim.SGD([{"params": [a], "lr": 7.0}, {"params": [b], "lr": 7.0}])
    restored.load_state_dict(optimiser.state_dict())
    set_learning_rate(restored, 1.0)
    assert [group["lr"] for group in restored.param_groups] == [1.0, 10.0]


def test_a_rate_stays_where_a_recorded_step_reads_it():
    weight = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=True)
    places = set()
    for factor in (1.0, 0.5):
        set_learning_rate(optimiser, factor)
        weight.grad = torch.ones(1)
        optimiser.step()
        places.add(optimiser.param_groups[0]["lr"].data_ptr())
    assert len(places) == 1
    assert weight.item() == pytest.approx(-0.75, rel=1e-6)  # Adam's first steps are the rates


def test_only_matrices_decay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3)
            self.norm = nn.LayerNorm(3)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
            self.theta = nn.Parameter(torch.zeros(()))

    model = Model()
    decayed, kept = decay_groups(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert len(kept["params"]) == 5
