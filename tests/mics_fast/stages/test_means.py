"""Moments of the rows of several ranks are those of all rows in one place."""

from __future__ import annotations

import torch
from torch import multiprocessing

from mics_fast.stages.means import moments_over_ranks
from mics_kernels import class_moments

RANKS, ROWS, CLASSES = 2, 20, 4


def rows_and_labels():
    """Rows far from 0; the first rank has no row of class 2, and none has one of class 3."""
    generator = torch.Generator().manual_seed(0)
    features = 100 + torch.randn(RANKS * ROWS, 5, generator=generator, dtype=torch.float64)
    label = torch.randint(-1, 3, (RANKS * ROWS,), generator=generator)
    label[:ROWS][label[:ROWS] == 2] = 0
    weight = torch.rand(RANKS * ROWS, generator=generator)
    return features, label, weight


def moments_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    features, label, weight = rows_and_labels()
    moments = class_moments(features[own], label[own], CLASSES, weight=weight[own])
    torch.save(list(moments_over_ranks(moments)), folder / f"moments-{rank}")
    torch.distributed.destroy_process_group()


def test_moments_over_ranks_are_those_of_all_rows(tmp_path):
    multiprocessing.spawn(moments_on_a_rank, (tmp_path,), nprocs=RANKS)
    features, label, weight = rows_and_labels()
    wanted = class_moments(features, label, CLASSES, weight=weight)
    first, second = (torch.load(tmp_path / f"moments-{rank}", weights_only=True) for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    for own, expected in zip(first, wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-9)
    assert first[0][3] == 0 and not first[1][3].any()


def test_one_rank_keeps_its_moments():
    features, label, weight = rows_and_labels()
    moments = class_moments(features, label, CLASSES, weight=weight)
    assert moments_over_ranks(moments) is moments
