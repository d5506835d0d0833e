"""The feature shift: its law, its gradient, and noise that depends on the row id."""

import math

import pytest
import torch

from mics_kernels import shift_features, shifted_cross_entropy
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


def test_something_to_vary_by_is_asked_for_in_words():
    target = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="variance or directions must be given"):
        shift(torch.zeros(2, 3), target, None)
    with pytest.raises(ValueError, match=r"directions must have shape \(2, r, 3\)"):
        shift(torch.zeros(2, 3), target, torch.ones(2, 3), directions=torch.ones(4, 1, 3))
    with pytest.raises(ValueError, match="at least one direction"):
        shift(torch.zeros(2, 3), target, None, directions=torch.ones(2, 0, 3))


def test_directions_take_the_place_of_the_variance():
    features, target = torch.randn(3, 4), torch.tensor([0, 1, -1])
    directions = torch.randn(2, 5, 4)
    moved = shift(features, target, None, directions=directions)
    assert torch.equal(shift(features, target, torch.ones(2, 4), directions=directions), moved)
    wanted = normals(SEED, torch.arange(3), 5)[:, None] @ directions[[0, 1, 0]].double() / 5**0.5
    wanted = features + 0.5 * wanted.squeeze(1).float()
    torch.testing.assert_close(moved[:2], wanted[:2])
    assert torch.equal(moved[2], features[2])


# --- The closed form: an upper bound of what the sampled shift costs in the mean ---

HEAD = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
ROWS = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()
LABELS = torch.arange(6) % 3


def spread(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "diagonal":
        return torch.rand(3, 4, generator=generator).double(), None
    return None, torch.randn(3, 5, 4, generator=generator).double()


def bound(strength, kind, reduction="none", head=HEAD, rows=ROWS, margin=0.0):
    variance, directions = spread(kind)
    return shifted_cross_entropy(
        rows @ head.T + margin * torch.eye(3)[LABELS], LABELS, head, variance,
        strength=strength, directions=directions, reduction=reduction,
    )  # fmt: skip


def sampled(strength, kind, draws, margin=0.0):
    """(draws, 6) cross-entropy of shifted rows; margin: added to the logit of the label."""
    variance, directions = spread(kind)
    moved = shift(
        ROWS.repeat(draws, 1), LABELS.repeat(draws), variance, strength=strength,
        directions=directions,
    )  # fmt: skip
    logits = moved @ HEAD.T + margin * torch.eye(3)[LABELS].repeat(draws, 1)
    losses = torch.nn.functional.cross_entropy(logits, LABELS.repeat(draws), reduction="none")
    return losses.reshape(draws, 6)


@pytest.mark.parametrize("kind", ["diagonal", "directions"])
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0, 2.0])
def test_the_closed_form_bounds_the_expected_loss_of_shifted_features(kind, strength):
    losses = sampled(strength, kind, 20_000)
    error = losses.std(0) / math.sqrt(len(losses))
    assert (bound(strength, kind) > losses.mean(0) - 4 * error).all()


@pytest.mark.parametrize("kind", ["diagonal", "directions"])
def test_the_bound_is_tight_for_rows_that_are_right_beyond_doubt(kind):
    """There log(1 + x) is x, and the bound an equation: a term of another size would be off."""
    losses = sampled(0.4, kind, 100_000, margin=16.0)
    error = losses.std(0) / math.sqrt(len(losses))
    assert (bound(0.4, kind, margin=16.0) - losses.mean(0) < 5 * error).all()
    assert (bound(0.4 / 2**0.5, kind, margin=16.0) - losses.mean(0) < -5 * error).all()


@pytest.mark.parametrize("kind", ["diagonal", "directions"])
def test_bound_and_expectation_meet_where_the_shift_vanishes(kind):
    plain = torch.nn.functional.cross_entropy(ROWS @ HEAD.T, LABELS, reduction="none")
    torch.testing.assert_close(bound(0.0, kind), plain, rtol=1e-12, atol=1e-12)
    gaps = [bound(s, kind) - sampled(s, kind, 20_000).mean(0) for s in (0.02, 0.01)]
    assert gaps[0].abs().max() < 2e-3 and gaps[1].abs().max() < 1e-3
    ratio = (bound(0.02, kind) - plain) / (bound(0.01, kind) - plain)
    torch.testing.assert_close(ratio, torch.full((6,), 4.0).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["diagonal", "directions"])
def test_the_bound_is_the_cross_entropy_of_the_logits_isda_writes_down(kind):
    """Entry by entry: y_ij + lambda / 2 (w_j - w_y)^T Sigma_y (w_j - w_y) with lambda = s^2."""
    variance, directions = spread(kind)
    logits = ROWS @ HEAD.T
    for i, y in enumerate(LABELS.tolist()):
        sigma = (
            torch.diag(variance[y]) if directions is None else directions[y].T @ directions[y] / 5
        )
        for j in range(3):
            difference = HEAD[j] - HEAD[y]
            logits[i, j] += 0.7**2 / 2 * difference @ sigma @ difference
    wanted = torch.nn.functional.cross_entropy(logits, LABELS, reduction="none")
    torch.testing.assert_close(bound(0.7, kind), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "directions"])
def test_the_bound_s_gradients_are_its_derivatives(kind):
    head, rows = HEAD.clone().requires_grad_(), ROWS.clone().requires_grad_()
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda h, r, reduction=reduction: bound(0.7, kind, reduction, h, r), (head, rows)
        )


def test_the_bound_refuses_posteriors():
    with pytest.raises(ValueError, match="target must have shape"):
        shifted_cross_entropy(
            torch.zeros(2, 3), torch.ones(2, 3) / 3, torch.ones(3, 4), torch.ones(3, 4),
            strength=0.5,
        )  # fmt: skip
