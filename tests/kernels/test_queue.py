"""The ring of older keys."""

import pytest
import torch
from torch import multiprocessing

from mics_kernels import FeatureQueue, consistency_loss


def rows(start, stop):
    return torch.arange(start, stop, dtype=torch.float32).unsqueeze(1).expand(-1, 2)


def contents(queue):
    return queue.features[:, 0].tolist(), queue.ids.tolist(), int(queue.length)


def test_an_empty_queue_is_never_read():
    queue = FeatureQueue(4, 2)
    assert contents(queue)[1:] == ([-1] * 4, 0)


def test_batches_fill_the_queue_and_wrap_around_its_end():
    queue = FeatureQueue(5, 2)
    queue.enqueue(rows(1, 4), torch.arange(1, 4))
    assert contents(queue) == ([1, 2, 3, 0, 0], [1, 2, 3, -1, -1], 3)
    queue.enqueue(rows(4, 8), torch.arange(4, 8))
    assert contents(queue) == ([6, 7, 3, 4, 5], [6, 7, 3, 4, 5], 5)


@pytest.mark.parametrize("before", [0, 2, 5])
def test_of_a_batch_larger_than_the_queue_the_last_rows_stay(before):
    queue = FeatureQueue(5, 2)
    queue.enqueue(rows(100, 100 + before))
    queue.enqueue(rows(0, 13))
    assert sorted(contents(queue)[0]) == [8, 9, 10, 11, 12]
    queue.enqueue(rows(13, 14))
    assert sorted(contents(queue)[0]) == [9, 10, 11, 12, 13]


def test_any_sequence_of_batches_is_the_sequence_of_its_rows():
    generator = torch.Generator().manual_seed(0)
    queue, one_by_one = FeatureQueue(7, 2), FeatureQueue(7, 2)
    start = 0
    for size in torch.randint(0, 17, (40,), generator=generator).tolist():
        batch, ids = rows(start, start + size).clone(), torch.arange(start, start + size)
        present = torch.rand(size, generator=generator) > 0.4
        batch[~present] = float("nan")
        queue.enqueue(batch, ids, present)
        for row in present.nonzero().flatten().tolist():
            one_by_one.enqueue(batch[row : row + 1], ids[row : row + 1])
        start += size
        for name, value in one_by_one.state_dict().items():
            assert torch.equal(queue.state_dict()[name], value)


def test_rows_without_an_id_are_read_and_are_nobody_s_repeats():
    queue = FeatureQueue(3, 2)
    queue.enqueue(torch.eye(2))
    keys = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    arguments = {"temperature": 0.1, "queue_length": queue.length, "key_ids": torch.arange(2)}
    with_ids = consistency_loss(keys, keys, keys, queue.features, queue_ids=queue.ids, **arguments)
    without = consistency_loss(keys, keys, keys, queue.features, **arguments)
    assert torch.equal(with_ids, without)


def test_a_restored_queue_goes_on_where_it_was():
    queue, restored = FeatureQueue(5, 2), FeatureQueue(5, 2)
    queue.enqueue(rows(0, 8))
    restored.load_state_dict(queue.state_dict())
    for each in (queue, restored):
        each.enqueue(rows(8, 11))
    assert contents(queue) == contents(restored)


def test_features_are_stored_in_the_dtype_asked_for_without_their_graph():
    queue = FeatureQueue(3, 2, dtype=torch.bfloat16)
    queue.enqueue(rows(0, 2).clone().requires_grad_())
    assert queue.features.dtype == torch.bfloat16 and not queue.features.requires_grad


@pytest.mark.parametrize("size", [0, -1])
def test_a_queue_needs_room(size):
    with pytest.raises(ValueError, match=f"size must be >= 1, got {size}"):
        FeatureQueue(size, 2)


def test_a_batch_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"features must have shape \(B, 2\), got \(4, 3\)"):
        FeatureQueue(5, 2).enqueue(torch.zeros(4, 3))


def _enqueue_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    queue = FeatureQueue(5, 2)
    for step in range(4):
        batch, ids, present = ranks_of_batches(step)[rank]
        gathered = []
        for own in (batch, ids, present):
            parts = [torch.empty_like(own) for _ in range(2)]
            torch.distributed.all_gather(parts, own)
            gathered.append(torch.cat(parts))
        queue.enqueue(*gathered)
    torch.save(queue.state_dict(), folder / f"queue-{rank}")
    torch.distributed.destroy_process_group()


def ranks_of_batches(step):
    batch = rows(6 * step, 6 * step + 6)
    ids, present = torch.arange(6 * step, 6 * step + 6), torch.arange(6) % 4 != step
    return [(batch[own], ids[own], present[own]) for own in (slice(0, 3), slice(3, 6))]


def test_ranks_that_enqueue_what_all_have_hold_the_same_queue(tmp_path):
    multiprocessing.spawn(_enqueue_on_a_rank, (tmp_path,), nprocs=2)
    alone = FeatureQueue(5, 2)
    for step in range(4):
        for part in ranks_of_batches(step):
            alone.enqueue(*part)
    for rank in (0, 1):
        state = torch.load(tmp_path / f"queue-{rank}", weights_only=True)
        assert all(torch.equal(state[name], value) for name, value in alone.state_dict().items())
