"""The training stream depends only on (seed, step), not on its reader or starting point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mics_fast.common.errors import InputError
from tests.mics_fast.data.loading import GREY_LEVELS, NAMES, same, take, tensors, train


def test_every_row_comes_once_an_epoch_and_batches_run_over_its_end(rows):
    ids = torch.cat([batch.sample_id for batch in take(train(rows), 7)]).reshape(4, 7)
    assert ids.sort(1).values.tolist() == [list(range(100, 107))] * 4
    assert len({tuple(epoch) for epoch in ids.tolist()}) > 1


def test_a_batch_may_be_larger_than_the_number_of_rows(rows):
    batch = next(train(rows[:2], batch_size=9))
    assert torch.bincount(batch.sample_id - 100).tolist() in ([4, 5], [5, 4])


def test_a_row_is_changed_anew_each_time_it_comes(rows):
    views = next(train(rows[:1], batch_size=8)).views["wli"]
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_the_stream_is_decided_by_the_seed(rows):
    a, b, c = (take(train(rows, seed=seed), 2) for seed in (5, 5, 6))
    assert all(map(same, a, b))
    assert not any(map(same, a, c))


def test_the_seed_decides_the_changes_too_not_only_the_order(rows):
    a, b = (next(train(rows[:1], seed=seed)) for seed in (5, 6))
    assert torch.equal(a.sample_id, b.sample_id)
    assert not any(
        torch.equal(a.views[name][i], b.views[name][i]) for name in NAMES for i in range(4)
    )


def test_ranks_share_the_batches_of_one_process(rows):
    whole = take(train(rows, strong=True), 3)
    ranks = [take(train(rows, strong=True, rank=r, world_size=2), 3) for r in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for name, value in tensors(batch).items():
            assert torch.equal(value, torch.cat([tensors(part)[name] for part in parts]))


def test_ranks_share_each_part_of_a_batch_that_is_worked_on_in_parts(rows):
    options = {"strong": True, "batch_size": 8, "parts": 2}
    whole = take(train(rows, **options), 2)
    ranks = [take(train(rows, rank=r, world_size=2, **options), 2) for r in range(2)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        for part, *own in zip(batch.split(2), *(share.split(2) for share in shares), strict=True):
            for name, value in tensors(part).items():
                assert torch.equal(value, torch.cat([tensors(each)[name] for each in own]))


def test_a_batch_that_ranks_cannot_share_is_refused(rows):
    with pytest.raises(InputError, match=r"batch of 4 .* 3 processes"):
        train(rows, world_size=3)
    with pytest.raises(InputError, match=r"batch of 4 .* 2 processes in 4 parts"):
        train(rows, world_size=2, parts=4)


def test_the_number_of_threads_changes_nothing(rows):
    one, three = (
        take(train(rows, strong=True, data=replace(GREY_LEVELS, threads=n)), 3) for n in (1, 3)
    )
    assert all(map(same, one, three))


def test_a_stream_goes_on_where_it_was_left(rows):
    whole = take(train(rows, strong=True), 6)
    assert all(map(same, whole[3:], take(train(rows, strong=True, step=3), 3)))


def test_the_strong_view_changes_nothing_else(rows):
    a, b = next(train(rows, strong=False)), next(train(rows, strong=True))
    b.strong = None
    assert same(a, b)
