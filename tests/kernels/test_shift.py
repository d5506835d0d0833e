"""The feature shift: its law, its gradient, and that its noise belongs to the row id."""

import math

import pytest
import torch

from mics_kernels import shift_features
from mics_kernels.philox import normals

SEED = torch.tensor([42, 3])


def shift(features, target, variance, **options):
    options = {"strength": 0.5, "seed": SEED, **options}
    return shift_features(features, target, variance, **options)


def test_the_shift_is_strength_times_deviation_times_the_row_s_normals():
    features = torch.randn(4, 6, dtype=torch.float64)
    variance = torch.rand(3, 6, dtype=torch.float64)
    target = torch.tensor([2, 0, 1, 2])
    row_ids = torch.tensor([9, 2**40, -3, 0])
    wanted = features + 0.5 * variance[target].sqrt() * normals(SEED, row_ids, 6)
    torch.testing.assert_close(
        shift(features, target, variance, row_ids=row_ids), wanted, rtol=1e-14, atol=0
    )


def test_shifted_features_have_the_class_variance_and_no_bias():
    rows, dim = 40_000, 4
    variance = torch.tensor([[0.5, 1.0, 2.0, 0.0], [4.0, 0.1, 1.0, 1.0]], dtype=torch.float64)
    target = torch.arange(rows) % 2
    moved = shift(torch.zeros(rows, dim, dtype=torch.float64), target, variance)
    for label in (0, 1):
        draws = moved[target == label]
        wanted = 0.25 * torch.diag(variance[label])
        error = 5 * math.sqrt(2 / len(draws)) * 0.25 * variance[label].max()
        assert (torch.cov(draws.T) - wanted).abs().max() < error
        assert draws.mean(0).abs().max() < 5 * 0.5 * variance[label].max().sqrt() / math.sqrt(
            len(draws)
        )


def test_posteriors_mix_the_variances():
    features = torch.zeros(2, 3, dtype=torch.float64)
    variance = torch.tensor([[1.0, 4.0, 0.0], [3.0, 0.0, 1.0]])
    posteriors = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    mixed = posteriors @ variance
    torch.testing.assert_close(
        shift(features, posteriors, variance), shift(features, torch.tensor([0, 1]), mixed),
        rtol=1e-7, atol=0,
    )  # fmt: skip


def test_a_row_without_a_class_is_left_alone():
    features = torch.randn(3, 5)
    moved = shift(features, torch.tensor([0, -1, 0]), torch.ones(1, 5))
    assert torch.equal(moved[1], features[1])
    assert (moved[[0, 2]] != features[[0, 2]]).all()


def test_a_class_without_a_variance_spoils_no_other():
    variance = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    moved = shift(torch.zeros(3, 2), torch.tensor([0, -1, 1]), variance)
    assert moved[:2].isfinite().all() and moved[2].isnan().tolist() == [True, False]


def test_the_same_row_id_gets_the_same_noise_in_any_batch():
    features, target = torch.randn(8, 5), torch.arange(8) % 2
    variance, row_ids = torch.rand(2, 5), torch.arange(100, 108)
    moved = shift(features, target, variance, row_ids=row_ids)
    order = torch.tensor([5, 0, 3])
    part = shift(features[order], target[order], variance, row_ids=row_ids[order])
    torch.testing.assert_close(part, moved[order], rtol=0, atol=0)


def test_row_ids_count_from_zero_unless_given():
    features, target = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    explicit = shift(features, target, torch.ones(1, 5), row_ids=torch.arange(4))
    assert torch.equal(shift(features, target, torch.ones(1, 5)), explicit)


def test_each_row_may_have_its_own_strength():
    features, target = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    moved = shift(features, target, torch.ones(1, 5), strength=torch.tensor([0.0, 1.0, 2.0]))
    unit = shift(features, target, torch.ones(1, 5), strength=1.0)
    assert torch.equal(moved, torch.tensor([[0.0], [1.0], [2.0]]) * unit)


def test_the_gradient_is_the_identity():
    features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target, variance = torch.tensor([0, -1, 1]), torch.rand(2, 4)
    grad_out = torch.randn(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(shift(features, target, variance), features, grad_out)
    assert torch.equal(gradient, grad_out)
    torch.autograd.gradcheck(lambda f: shift(f, target, variance), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_features_keep_their_dtype_and_are_rounded_once(dtype):
    features, target = torch.randn(16, 9).to(dtype), torch.zeros(16, dtype=torch.int64)
    variance = torch.rand(1, 9)
    moved = shift(features, target, variance)
    exact = shift(features.double(), target, variance)
    assert moved.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(moved.double(), exact, rtol=eps, atol=2e-7)


def test_autocast_does_not_touch_the_shift():
    features, posteriors = torch.randn(6, 5), torch.rand(6, 2).softmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = shift(features, posteriors, torch.ones(2, 5))
    assert torch.equal(inside, shift(features, posteriors, torch.ones(2, 5)))


def test_no_rows_are_shifted_to_no_rows():
    empty = shift(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), torch.ones(2, 5))
    assert empty.shape == (0, 5)
