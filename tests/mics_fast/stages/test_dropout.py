"""Modality dropout: at its rate, never a row's last modality, and a function of its arguments."""

from __future__ import annotations

import torch

from mics_fast.stages.dropout import drop_modalities


def drop(present, ids=None, seed=0, step=0, rate=0.1):
    ids = torch.arange(len(present)) if ids is None else ids
    return drop_modalities(present, ids, seed=seed, step=torch.tensor(step), rate=rate)


def test_two_modalities_are_dropped_at_the_rate_less_the_rows_that_would_lose_both():
    left = drop(torch.ones(20000, 2, dtype=torch.bool))
    # Each with 0.1, in 0.01 of the rows both: then one of them stays. 4 sigma: 0.0083.
    assert abs((~left).float().mean(0) - (0.1 - 0.005)).max() < 0.0083
    assert left.any(1).all()


def test_a_row_never_loses_its_last_modality():
    present = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    left = drop(present.repeat(50, 1), rate=1.0)
    assert left.sum(1).tolist() == [1, 1, 1, 0] * 50
    assert not (left & ~present.repeat(50, 1)).any()


def test_nothing_is_dropped_at_rate_zero():
    present = torch.rand(100, 3) < 0.7
    assert torch.equal(drop(present, rate=0.0), present)


def test_what_is_dropped_depends_on_seed_step_and_sample_alone():
    present, ids = torch.ones(64, 2, dtype=torch.bool), torch.arange(64)
    left = drop(present, ids, rate=0.5)
    order = torch.randperm(64)
    assert torch.equal(drop(present, ids[order], rate=0.5), left[order])
    assert not torch.equal(drop(present, ids, rate=0.5, step=1), left)
    assert not torch.equal(drop(present, ids, rate=0.5, seed=1), left)
