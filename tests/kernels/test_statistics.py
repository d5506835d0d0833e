"""Class moments and the statistics that accumulate them."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from mics_kernels import ClassMoments, ClassStatistics, class_moments, merge_moments

C, D = 3, 4


def sample(rows, seed=0, dtype=torch.float64):
    """Features far from the origin, labels with skipped rows, weights."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, D, generator=generator, dtype=torch.float64) * 2 + 100
    target = torch.randint(-1, C, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    return features.to(dtype), target, weight


def numpy_moments(features, shares):
    """Moments by numpy.average and numpy.cov, class by class."""
    count, mean, m2 = [], [], []
    for share in shares.T:
        count.append(share.sum())
        mean.append(np.average(features, axis=0, weights=share))
        m2.append(np.diag(np.cov(features.T, aweights=share, bias=True)) * share.sum())
    return np.array(count), np.array(mean), np.array(m2)


def assert_moments(moments, wanted, rtol=1e-9):
    for given, value in zip(moments, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(given), np.asarray(value), rtol=rtol, atol=1e-9)


def test_moments_of_labelled_rows_are_numpy_s():
    features, target, _ = sample(200)
    shares = (target[:, None] == torch.arange(C)).double().numpy()
    assert_moments(class_moments(features, target, C), numpy_moments(features.numpy(), shares))


def test_moments_of_posteriors_and_weights_are_numpy_s():
    features, _, weight = sample(200)
    posteriors = torch.rand(200, C, dtype=torch.float64).softmax(1)
    shares = (posteriors * weight[:, None]).numpy()
    moments = class_moments(features, posteriors, C, weight=weight)
    assert_moments(moments, numpy_moments(features.numpy(), shares))


def test_skipped_rows_may_hold_nan():
    features, target, weight = sample(50)
    kept = target >= 0
    wanted = class_moments(features[kept], target[kept], C, weight=weight[kept])
    features[~kept] = float("nan")
    assert_moments(class_moments(features, target, C, weight=weight), wanted, rtol=1e-14)


def test_autocast_does_not_touch_the_moments():
    features, target, weight = sample(50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = class_moments(features, target, C, weight=weight)
    outside = class_moments(features, target, C, weight=weight)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_a_class_without_rows_has_zero_moments():
    moments = class_moments(torch.ones(2, D), torch.tensor([0, -1]), C)
    assert moments.count.tolist() == [1, 0, 0]
    assert torch.equal(moments.mean[1:], torch.zeros(2, D))
    assert torch.equal(moments.m2, torch.zeros(C, D))


def test_moments_are_constants_in_the_documented_dtypes():
    features = torch.randn(8, D, dtype=torch.bfloat16, requires_grad=True)
    moments = class_moments(features, torch.arange(8) % C, C)
    assert [part.dtype for part in moments] == [torch.float64, torch.float32, torch.float32]
    assert not any(part.requires_grad for part in moments)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_merged_shards_are_the_whole(dtype, rtol):
    features, target, weight = sample(100, dtype=dtype)
    whole = class_moments(features, target, C, weight=weight)
    merged = ClassMoments(torch.zeros(C).double(), torch.zeros(C, D), torch.zeros(C, D))
    for part in torch.arange(100).split([1, 0, 30, 2, 67]):
        shard = class_moments(features[part], target[part], C, weight=weight[part])
        merged = merge_moments(merged, shard)
    assert_moments(merged, whole, rtol)


def test_cumulative_statistics_are_the_variance_of_all_rows():
    statistics = ClassStatistics(C, D)
    features, target, weight = sample(90)
    for part in torch.arange(90).split(7):
        statistics.update(features[part], target[part], weight[part])
    whole = class_moments(features, target, C, weight=weight)
    np.testing.assert_allclose(
        statistics.variance(), whole.m2 / whole.count.unsqueeze(1), rtol=2e-7
    )


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_moments_of_rows_count_as_the_rows_do(momentum):
    by_rows, by_moments = (ClassStatistics(3, 5, momentum=momentum) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        features = torch.randn(8, 5, generator=generator)
        target = torch.randint(-1, 3, (8,), generator=generator)
        by_rows.update(features, target)
        by_moments.update_moments(class_moments(features, target, 3))
    wanted = by_rows.state_dict()
    assert all(torch.equal(own, wanted[name]) for name, own in by_moments.state_dict().items())


@pytest.mark.parametrize("momentum", [None, 0.02])
def test_native_merging_is_that_of_the_formulas(momentum, monkeypatch):
    native, formulas = (ClassStatistics(40, 37, momentum=momentum) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        features = torch.randn(64, 37, generator=generator) + 50
        target = torch.randint(-1, 30, (64,), generator=generator)  # the last classes stay empty
        weight = torch.rand(64, generator=generator)
        moments = class_moments(features, target, 40, weight=weight)
        native.update_moments(moments)
        monkeypatch.setenv("MICS_KERNELS_BACKEND", "reference")
        formulas.update_moments(moments)
        monkeypatch.delenv("MICS_KERNELS_BACKEND")
    for name, wanted in formulas.state_dict().items():
        own = native.state_dict()[name]
        np.testing.assert_allclose(own, wanted, rtol=1e-11, atol=1e-11, err_msg=name)


def test_moments_are_refused_where_directions_need_rows():
    moments = class_moments(torch.ones(2, 5), torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="rank is 2, wanted 0: directions need rows"):
        ClassStatistics(3, 5, rank=2).update_moments(moments)
    with pytest.raises(ValueError, match=r"moments\.mean"):
        ClassStatistics(3, 4).update_moments(moments)


@pytest.mark.parametrize("momentum", [None, 0.5, 0.01])
def test_a_class_has_no_variance_before_its_second_row(momentum):
    statistics = ClassStatistics(C, D, momentum=momentum)
    features = torch.randn(3, D)
    statistics.update(features, torch.tensor([0, 1, -1]))
    assert torch.equal(statistics.variance(), torch.zeros(C, D))
    statistics.update(features, torch.tensor([-1, -1, 0]))
    assert statistics.variance()[0].min() > 0
    assert torch.equal(statistics.variance()[1:], torch.zeros(2, D))


def test_rows_count_by_their_weight():
    statistics = ClassStatistics(1, D)
    features, target = torch.randn(3, D), torch.zeros(3, dtype=torch.int64)
    statistics.update(features, target, torch.full((3,), 0.5))
    assert torch.equal(statistics.variance(), torch.zeros(1, D))  # one row and a half
    statistics.update(features, target, torch.full((3,), 0.5))
    assert statistics.variance().min() > 0


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_with_momentum_old_rows_keep_one_minus_momentum_to_the_number_of_new_rows(rows):
    statistics = ClassStatistics(1, D, momentum=0.1)
    old, new = torch.randn(500, D).double(), torch.randn(rows, D).double() + 1
    for start in range(0, 500, 5):
        statistics.update(old[start : start + 5], torch.zeros(5, dtype=torch.int64))
    mean, variance = statistics.mean.clone(), statistics.variance().clone()
    statistics.update(new, torch.zeros(rows, dtype=torch.int64))
    share = 1 - 0.9**rows
    distance = new.mean(0) - mean[0]
    wanted_mean = mean[0] + share * distance
    wanted = (1 - share) * variance[0] + share * new.var(0, unbiased=False)
    wanted = wanted + share * (1 - share) * distance**2
    torch.testing.assert_close(statistics.mean[0], wanted_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.variance()[0].double(), wanted, rtol=1e-6, atol=0)


def test_with_momentum_the_first_rows_count_alike():
    statistics = ClassStatistics(1, D, momentum=0.001)
    features = torch.randn(20, D).double()
    for row in features:
        statistics.update(row.unsqueeze(0), torch.tensor([0]))
    torch.testing.assert_close(
        statistics.variance()[0].double(), features.var(0, unbiased=False), rtol=1e-6, atol=0
    )


def test_with_momentum_the_variance_is_true_for_classes_of_zero_to_two_rows_a_batch():
    generator = torch.Generator().manual_seed(0)
    dim, momentum = 256, 0.02
    deviation = torch.tensor([1.0, 2.0, 0.5]).double()
    statistics = ClassStatistics(C, dim, momentum=momentum)
    for _ in range(500):
        rows = torch.randint(0, 3, (C,), generator=generator)
        target = torch.arange(C).repeat_interleave(rows)
        noise = torch.randn(len(target), dim, generator=generator, dtype=torch.float64)
        statistics.update(noise * deviation[target, None] + 7.0 * target[:, None], target)
    ratio = statistics.variance().double().mean(1) / deviation**2
    # A fading average of variance comes out low by momentum / 2; one class scatters by 1 %.
    assert (ratio - (1 - momentum / 2)).abs().max() < 0.04
    assert statistics.count.sum() > 1000


def test_with_momentum_the_variance_follows_a_drift():
    generator = torch.Generator().manual_seed(0)
    fading, cumulative = ClassStatistics(1, 64, momentum=0.02), ClassStatistics(1, 64)
    for step in range(600):
        features = torch.randn(2, 64, generator=generator) + 0.01 * step
        for statistics in (fading, cumulative):
            statistics.update(features, torch.tensor([0, 0]))
    assert fading.variance().mean() < 1.4 < 3 < cumulative.variance().mean()


@pytest.mark.parametrize("rank", [0, 3])
def test_restored_statistics_go_on_where_they_were_to_the_bit(rank):
    first, second = (ClassStatistics(C, D, momentum=0.1, rank=rank) for _ in range(2))
    features, target, weight = sample(20)
    first.update(features, target, weight)
    second.load_state_dict(first.state_dict())
    for statistics in (first, second):
        statistics.update(features.flip(0), target, weight)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_half_precision_around_the_statistics_leaves_them_as_they_are():
    statistics = ClassStatistics(C, D, rank=3)
    statistics.update(*sample(20))
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    torch.nn.Sequential(statistics, torch.nn.Linear(2, 2)).to("cpu").to(torch.bfloat16).half()
    for name, value in statistics.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


def covariance(rows, weight=None):
    """(D, D) by numpy, divided by the sum of weights."""
    return np.cov(rows.double().numpy().T, aweights=weight, bias=True)


def outer_mean(directions):
    return (directions.double().transpose(1, 2) @ directions.double() / directions.shape[1]).numpy()


@pytest.mark.parametrize("split", [[60], [1] * 60, [7, 1, 30, 0, 22]])
def test_directions_have_the_covariance_of_the_latest_rows(split):
    statistics = ClassStatistics(C, D, rank=5)
    features, target, weight = sample(60)
    for part in torch.arange(60).split(split):
        statistics.update(features[part], target[part], weight[part])
    directions = statistics.directions()
    assert directions.shape == (C, 5, D) and directions.dtype == torch.float32
    for label in range(C):
        latest = torch.nonzero(target == label).flatten()[-5:]
        wanted = covariance(features[latest], weight[latest].numpy())
        np.testing.assert_allclose(outer_mean(directions)[label], wanted, rtol=1e-4, atol=1e-4)


def test_directions_of_fewer_rows_than_rank_have_their_covariance_too():
    statistics = ClassStatistics(C, D, rank=40)
    features, target, _ = sample(30)
    statistics.update(features, target)
    for label in range(C):
        wanted = covariance(features[target == label])
        np.testing.assert_allclose(
            outer_mean(statistics.directions())[label], wanted, rtol=1e-4, atol=1e-4
        )


def test_a_class_has_no_directions_before_its_second_row():
    statistics = ClassStatistics(C, D, rank=4)
    features = torch.randn(3, D)
    statistics.update(features, torch.tensor([0, 1, -1]))
    assert torch.equal(statistics.directions(), torch.zeros(C, 4, D))
    statistics.update(features, torch.tensor([-1, -1, 0]))
    assert statistics.directions()[0].abs().max() > 0
    assert torch.equal(statistics.directions()[1:], torch.zeros(2, 4, D))


def test_a_row_with_posteriors_gives_a_direction_to_its_most_probable_class():
    statistics = ClassStatistics(C, D, rank=2)
    rows = torch.arange(4.0 * D).reshape(4, D)
    posteriors = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.1, 0.4], [0.1, 0.9, 0.0], [0.2, 0.1, 0.7]])
    statistics.update(rows, posteriors)
    assert torch.equal(statistics.recent_rows[0], rows[:2])
    torch.testing.assert_close(
        statistics.recent_weight, torch.tensor([[0.6, 0.5], [0.0, 0.9], [0.0, 0.7]]).double()
    )


def test_skipped_rows_never_become_directions():
    statistics = ClassStatistics(1, D, rank=3)
    features = torch.randn(4, D)
    features[[1, 2]] = float("nan")
    statistics.update(features, torch.tensor([0, -1, 0, 0]), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(statistics.recent_rows[0, 1:], features[[0, 3]])
    assert statistics.directions().isfinite().all()


def test_sync_alone_changes_nothing():
    statistics = ClassStatistics(C, D)
    features, target, _ = sample(20)
    statistics.update(features, target)
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    statistics.sync()
    for name, value in statistics.state_dict().items():
        assert torch.equal(value, before[name])


def _sync_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for momentum in (None, 0.1):
        statistics = ClassStatistics(C, D, momentum=momentum, rank=4)
        for step in range(3):
            features, target, weight = sample(21, seed=step)
            for own in ([slice(0, 5)], [slice(5, 7), slice(7, 21)])[rank]:
                statistics.update(features[own], target[own], weight[own])
            statistics.sync()
            statistics.sync()  # nothing new: nothing changes
        torch.save(statistics.state_dict(), folder / f"{momentum}-{rank}")
    torch.distributed.destroy_process_group()


def test_synced_ranks_hold_the_statistics_of_one_rank_that_saw_all_rows(tmp_path):
    multiprocessing.spawn(_sync_on_a_rank, (tmp_path,), nprocs=2)
    for momentum in (None, 0.1):
        alone = ClassStatistics(C, D, momentum=momentum, rank=4)
        for step in range(3):
            alone.update(*sample(21, seed=step))
        ranks = [torch.load(tmp_path / f"{momentum}-{rank}", weights_only=True) for rank in (0, 1)]
        for name in ("count", "mean", "m2"):
            assert torch.equal(ranks[0][name], ranks[1][name])
            torch.testing.assert_close(
                ranks[0][name], alone.state_dict()[name], rtol=1e-9, atol=1e-9
            )
        for name in ("recent_rows", "recent_weight"):
            assert torch.equal(ranks[0][name], ranks[1][name])
            assert torch.equal(ranks[0][name], alone.state_dict()[name])
