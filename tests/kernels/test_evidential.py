"""Evidential fusion and loss, against oracles that share no formula with the reference."""

import itertools

import mpmath
import numpy as np
import pytest
import scipy.special
import torch
from torch.distributions import Dirichlet, kl_divergence

from mics_kernels import (
    conflict,
    evidential_fusion_loss,
    evidential_loss,
    fuse_evidence,
    opinion,
)

NAN = float("nan")


def rand_evidence(*shape, scale=5.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


def rand_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3


def rand_probabilities(*shape, seed=1):
    return rand_logits(*shape, seed=seed).softmax(-1)


def dempster(evidence):
    """Dempster's rule over all pairs of classes: (V, C) -> fused evidence (C,), mass lost."""
    classes = evidence.shape[1]

    def masses(e):
        strength = e.sum() + classes
        return [float(x) / float(strength) for x in e], classes / float(strength)

    belief, uncertainty = masses(evidence[0])
    kept = 1.0
    for view in evidence[1:]:
        other_belief, other_uncertainty = masses(view)
        lost = sum(
            belief[i] * other_belief[j] for i in range(classes) for j in range(classes) if i != j
        )
        kept *= 1 - lost
        belief = [
            (b * o + b * other_uncertainty + o * uncertainty) / (1 - lost)
            for b, o in zip(belief, other_belief, strict=True)
        ]
        uncertainty = uncertainty * other_uncertainty / (1 - lost)
    return np.array(belief) * classes / uncertainty, 1 - kept


def torch_kl(evidence, probability):
    alpha = 1 + (1 - probability) * evidence
    return kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha)))


def scipy_cross_entropy(evidence, probability):
    alpha = evidence.numpy() + 1
    psi = scipy.special.digamma
    strength = alpha.sum(-1, keepdims=True)
    return (probability.numpy() * (psi(strength) - psi(alpha))).sum(-1)


def mpmath_loss(evidence, label, kl_weight):
    """Textbook A + kl_weight * KL and its gradient, 40 digits, of one opinion and a hard label."""
    with mpmath.workdps(40):
        e = [mpmath.mpf(float(x)) for x in evidence]
        psi, trigamma, lgamma = mpmath.digamma, lambda x: mpmath.psi(1, x), mpmath.loggamma
        alpha = [x + 1 for x in e]
        strength = mpmath.fsum(alpha)
        rest = [mpmath.mpf(1) if k == label else a for k, a in enumerate(alpha)]
        total = mpmath.fsum(rest)
        kl = lgamma(total) - mpmath.fsum(map(lgamma, rest)) - lgamma(len(e))
        kl += mpmath.fsum((a - 1) * (psi(a) - psi(total)) for a in rest)
        loss = psi(strength) - psi(alpha[label]) + kl_weight * kl
        gradient = []
        for k, a in enumerate(rest):
            slope = trigamma(strength)
            if k == label:
                slope -= trigamma(alpha[k])
            else:
                slope += kl_weight * ((a - 1) * trigamma(a) - (total - len(e)) * trigamma(total))
            gradient.append(float(slope))
        return float(loss), np.array(gradient)


# Fusion


@pytest.mark.parametrize("classes", [2, 5, 23])
def test_fusion_agrees_with_dempsters_rule_over_all_pairs_of_classes(classes):
    evidence = rand_evidence(4, 3, classes)
    wanted = np.stack([dempster(row)[0] for row in evidence])
    np.testing.assert_allclose(fuse_evidence(evidence).numpy(), wanted, rtol=1e-9)


def test_the_order_of_views_does_not_matter():
    evidence = rand_evidence(6, 4, 5)
    wanted = fuse_evidence(evidence)
    for order in itertools.permutations(range(4)):
        torch.testing.assert_close(fuse_evidence(evidence[:, list(order)]), wanted)


def test_fusing_in_two_steps_is_fusing_at_once():
    evidence = rand_evidence(6, 3, 5)
    first = fuse_evidence(evidence[:, :2])
    torch.testing.assert_close(
        fuse_evidence(torch.stack([first, evidence[:, 2]], dim=1)), fuse_evidence(evidence)
    )


def test_one_view_is_its_own_fusion():
    evidence = rand_evidence(6, 1, 5)
    assert torch.equal(fuse_evidence(evidence), evidence[:, 0])


def test_a_missing_view_changes_nothing():
    evidence = rand_evidence(2, 3, 5)
    present = torch.tensor([[True, False, True], [False, False, False]])
    evidence[~present] = NAN
    fused = fuse_evidence(evidence, present=present)
    torch.testing.assert_close(fused[0], fuse_evidence(evidence[:1, [0, 2]])[0])
    assert torch.equal(fused[1], torch.zeros(5, dtype=torch.float64))


def test_fusion_gradient_is_the_other_views_factor():
    evidence = rand_evidence(3, 3, 4).requires_grad_()
    fused = fuse_evidence(evidence)
    fused.sum().backward()
    wanted = (4 + fused.unsqueeze(1)) / (4 + evidence)
    torch.testing.assert_close(evidence.grad, wanted.detach(), rtol=1e-12, atol=0)


def test_fusion_is_accurate_in_float32_and_survives_float16():
    evidence = rand_evidence(64, 3, 8, scale=1e4, dtype=torch.float16)
    exact = fuse_evidence(evidence.double())
    fused = fuse_evidence(evidence)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), exact, rtol=5e-7, atol=0)


# Opinion and conflict


def test_belief_and_uncertainty_share_one_unit_of_mass():
    belief, uncertainty, probability = opinion(rand_evidence(3, 4, 5, dtype=torch.float16))
    assert belief.shape == (3, 4, 5) and uncertainty.shape == (3, 4)
    assert belief.dtype == torch.float32
    torch.testing.assert_close(belief.sum(-1) + uncertainty, torch.ones(3, 4))
    torch.testing.assert_close(probability, belief + uncertainty.unsqueeze(-1) / 5)


def test_no_evidence_is_the_vacuous_opinion():
    stated = opinion(torch.zeros(2, 4))
    assert stated.belief.tolist() == [[0.0] * 4] * 2
    assert stated.uncertainty.tolist() == [1.0, 1.0]
    assert stated.probability.tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize("views", [1, 2, 3])
def test_conflict_is_the_mass_dempsters_rule_loses(views):
    evidence = rand_evidence(5, views, 6, scale=20)
    wanted = [dempster(row)[1] for row in evidence]
    np.testing.assert_allclose(conflict(evidence).numpy(), wanted, rtol=0, atol=1e-13)


def test_a_missing_view_contradicts_nobody():
    evidence = rand_evidence(1, 3, 4)
    evidence[0, 1] = NAN
    present = torch.tensor([[True, False, True]])
    torch.testing.assert_close(
        conflict(evidence, present=present), conflict(evidence[:, [0, 2]]), rtol=0, atol=1e-15
    )


def test_opposed_certain_views_conflict_entirely():
    evidence = torch.tensor([[[1e7, 0.0], [0.0, 1e7]]])
    assert conflict(evidence).item() == pytest.approx(1.0, abs=1e-5)


# Loss of opinions


@pytest.mark.parametrize("classes", [2, 8, 100])
@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
def test_loss_is_expected_cross_entropy_plus_kl(classes, scale):
    evidence = rand_evidence(7, classes, scale=scale)
    labels = torch.arange(7) % classes
    for target in (labels, rand_probabilities(7, classes)):
        y = torch.nn.functional.one_hot(labels, classes) if target is labels else target
        for kl_weight in (0.0, 0.3):
            wanted = scipy_cross_entropy(evidence, y) + kl_weight * torch_kl(evidence, y).numpy()
            loss = evidential_loss(evidence, target, kl_weight=kl_weight, reduction="none")
            # The oracle's KL subtracts terms of size S ln S.
            strength = evidence.sum(-1).max().item() + classes
            slack = 1e-15 * strength * np.log(strength) * (kl_weight > 0)
            np.testing.assert_allclose(loss.numpy(), wanted, rtol=1e-9, atol=10 * slack)


@pytest.mark.parametrize("classes", [2, 23])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0, 400.0, 8e3, 1.6e5, 1e8, 1e12])
def test_loss_and_gradient_match_forty_digits(classes, scale):
    evidence = rand_evidence(2, classes, scale=scale)
    labels = torch.tensor([1, 0])
    exact = [mpmath_loss(row, int(y), 0.7) for row, y in zip(evidence, labels, strict=True)]
    wanted, wanted_gradient = (np.array(part) for part in zip(*exact, strict=True))
    evidence.requires_grad_()
    losses = evidential_loss(evidence, labels, kl_weight=0.7, reduction="none")
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach().numpy(), wanted, rtol=1e-9, atol=1e-12 * classes)
    # torch's float64 trigamma is off by up to 8e-10.
    np.testing.assert_allclose(evidence.grad.numpy(), wanted_gradient, rtol=0, atol=2e-9)
    if scale > 1e3:  # where gradients are tiny, and a fused opinion's are multiplied up again
        np.testing.assert_allclose(evidence.grad.numpy(), wanted_gradient, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0, 400.0, 8e3, 1.6e5, 1e8, 1e12])
def test_float32_loss_and_gradient_are_good_to_float32(scale):
    evidence = rand_evidence(3, 23, scale=scale, dtype=torch.float32)
    labels = torch.tensor([0, 5, 22])
    exact = [mpmath_loss(row, int(y), 0.7) for row, y in zip(evidence, labels, strict=True)]
    wanted, wanted_gradient = (np.array(part) for part in zip(*exact, strict=True))
    evidence.requires_grad_()
    losses = evidential_loss(evidence, labels, kl_weight=0.7, reduction="none", backend="reference")
    losses.sum().backward()
    assert losses.dtype == evidence.grad.dtype == torch.float32
    np.testing.assert_allclose(losses.detach().numpy(), wanted, rtol=1.2e-7)
    np.testing.assert_allclose(evidence.grad.numpy(), wanted_gradient, rtol=1.2e-7, atol=2e-9)


def test_a_hard_label_is_a_probability_of_one():
    evidence = rand_evidence(5, 3, 4)
    labels = torch.tensor([0, 3, 1, 1, 2])
    soft = torch.nn.functional.one_hot(labels, 4).double()
    for reduction in ("none", "mean"):
        assert torch.equal(
            evidential_loss(evidence, labels, kl_weight=0.5, reduction=reduction),
            evidential_loss(evidence, soft, kl_weight=0.5, reduction=reduction),
        )


def test_many_opinions_are_each_view_on_its_own():
    evidence = rand_evidence(4, 3, 5)
    labels = torch.tensor([4, 0, 2, 1])
    losses = evidential_loss(evidence, labels, kl_weight=0.2, reduction="none")
    assert losses.shape == (4, 3)
    for view in range(3):
        alone = evidential_loss(evidence[:, view], labels, kl_weight=0.2, reduction="none")
        torch.testing.assert_close(losses[:, view], alone, rtol=1e-14, atol=0)


def test_mean_divides_by_rows_that_are_not_ignored_and_not_by_weights():
    evidence = rand_evidence(4, 2, 5)
    labels = torch.tensor([4, -100, 2, 1])
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0])
    rows = evidential_loss(evidence, labels.clamp(min=0), kl_weight=0.2, reduction="none")
    weighted = rows * weight.unsqueeze(1)
    wanted = (weighted[0] + weighted[2] + weighted[3]).sum()
    arguments = {"kl_weight": 0.2, "weight": weight}
    torch.testing.assert_close(
        evidential_loss(evidence, labels, reduction="sum", **arguments), wanted
    )
    torch.testing.assert_close(evidential_loss(evidence, labels, **arguments), wanted / 3)
    none = evidential_loss(evidence, labels, reduction="none", **arguments)
    assert none[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(none[3], weighted[3])


def test_ignored_rows_and_absent_views_may_hold_nan():
    present = torch.tensor([[True, True], [True, False], [False, False]])
    labels = torch.tensor([7, 1, 0])
    evidence = rand_evidence(3, 2, 4)
    evidence[~present] = NAN
    evidence[0] = NAN
    evidence.requires_grad_()
    loss = evidential_loss(evidence, labels, kl_weight=0.1, present=present, ignore_index=7)
    loss.backward()
    alone = evidential_loss(evidence[1, :1], labels[1:2], kl_weight=0.1)
    torch.testing.assert_close(loss, alone / 2)
    assert evidence.grad[1, 0].abs().min() > 0
    evidence.grad[1, 0] = 0
    assert torch.equal(evidence.grad, torch.zeros_like(evidence))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_at_all_gives_zero_and_zero_gradient(rows):
    evidence = rand_evidence(rows, 2, 4).requires_grad_()
    labels = torch.full((rows,), -100)
    loss = evidential_loss(evidence, labels, kl_weight=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(evidence.grad, torch.zeros_like(evidence))


def test_the_vacuous_opinion_has_no_kl():
    evidence = torch.zeros(1, 1000, dtype=torch.float64)
    label = torch.tensor([3])
    plain = evidential_loss(evidence, label, kl_weight=0.0)
    assert evidential_loss(evidence, label, kl_weight=1.0).item() == pytest.approx(
        plain.item(), abs=1e-9
    )


def test_loss_gradient_passes_gradcheck():
    evidence = (rand_evidence(3, 2, 4) + 0.1).requires_grad_()
    for target in (torch.tensor([0, -100, 3]), rand_probabilities(3, 4)):
        torch.autograd.gradcheck(
            lambda e, y=target: evidential_loss(e, y, kl_weight=0.3, reduction="none"), evidence
        )


# Loss of fused logits


def spelled_out(logits, labels, kl_weight, activation):
    """Sum of the losses of views and of their fusion, with numpy and scipy, one row at a time."""
    evidence = {
        "softplus": lambda z: np.logaddexp(z, 0),
        "exp": lambda z: np.exp(np.clip(z, -10, 10)),
        "relu": lambda z: np.maximum(z, 0),
    }[activation](logits.numpy())
    losses = []
    for row, label in zip(evidence, labels.tolist(), strict=True):
        opinions = np.concatenate([row, dempster(torch.from_numpy(row))[0][None]])
        y = torch.zeros(row.shape[1]).double()
        y[label] = 1
        opinions = torch.from_numpy(opinions)
        cross_entropy = scipy_cross_entropy(opinions, y.expand_as(opinions))
        losses.append((cross_entropy + kl_weight * torch_kl(opinions, y).numpy()).sum())
    return np.array(losses)


@pytest.mark.parametrize("activation", ["softplus", "exp", "relu"])
def test_fusion_loss_is_the_sum_over_views_and_their_fusion(activation):
    logits = rand_logits(5, 3, 4)
    logits[0, 0, :3] = torch.tensor([25.0, -25.0, 11.0])
    labels = torch.tensor([0, 3, 1, 1, 2])
    output = evidential_fusion_loss(
        logits, labels, kl_weight=0.4, activation=activation, reduction="none"
    )
    wanted = spelled_out(logits, labels, 0.4, activation)
    rtol = 1e-9 if activation != "exp" else 1e-8  # the oracle's KL cancels at evidence 1e13
    np.testing.assert_allclose(output.loss.numpy(), wanted, rtol=rtol)


def test_fused_evidence_is_that_of_the_views_and_a_constant():
    logits = rand_logits(5, 3, 4).requires_grad_()
    output = evidential_fusion_loss(logits, torch.full((5,), -100), kl_weight=0.4)
    wanted = fuse_evidence(torch.logaddexp(logits, torch.zeros(())))
    torch.testing.assert_close(output.fused_evidence, wanted.detach())
    assert not output.fused_evidence.requires_grad
    assert output.loss.item() == 0


def test_absent_views_may_hold_nan_and_an_empty_row_costs_nothing():
    logits = rand_logits(4, 2, 4)
    present = torch.tensor([[True, True], [True, False], [False, False], [False, True]])
    labels = torch.tensor([0, 1, 2, -100])
    logits[~present] = NAN
    logits.requires_grad_()
    output = evidential_fusion_loss(
        logits, labels, kl_weight=0.4, present=present, reduction="none"
    )
    mean = evidential_fusion_loss(logits, labels, kl_weight=0.4, present=present).loss
    mean.backward()
    complete = evidential_fusion_loss(logits[:1], labels[:1], kl_weight=0.4).loss
    single = evidential_fusion_loss(logits[1:2, :1], labels[1:2], kl_weight=0.4).loss
    torch.testing.assert_close(output.loss[0], complete)
    torch.testing.assert_close(output.loss[1], single)
    assert output.loss[2:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(mean, (complete + single) / 3)  # the empty row has a target
    assert output.fused_evidence[2].tolist() == [0.0] * 4
    assert output.fused_evidence[3].min() > 0
    assert logits.grad[present][:3].abs().min() > 0
    assert torch.equal(logits.grad[~present], torch.zeros(4, 4, dtype=torch.float64))
    assert torch.equal(logits.grad[3], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["softplus", "exp", "relu"])
def test_fusion_loss_passes_gradcheck(activation):
    logits = rand_logits(4, 2, 3, seed=4).requires_grad_()
    present = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    weight = torch.tensor([1.0, 0.5, 1.0, 2.0])
    for target in (torch.tensor([0, 1, 2, -100]), rand_probabilities(4, 3)):

        def loss(values, target=target):
            return evidential_fusion_loss(
                values, target, kl_weight=0.3, activation=activation, present=present, weight=weight
            ).loss

        torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_give_a_float32_loss_and_their_own_gradient(dtype):
    logits = rand_logits(16, 3, 8).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = torch.arange(16) % 8
    output = evidential_fusion_loss(logits, labels, kl_weight=0.4)
    wanted = evidential_fusion_loss(exact, labels, kl_weight=0.4)
    output.loss.backward()
    wanted.loss.backward()
    assert output.loss.dtype == output.fused_evidence.dtype == torch.float32
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(output.loss.double(), wanted.loss, rtol=2e-7, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=eps, atol=2e-7)


def test_autocast_does_not_touch_the_loss():
    logits, labels = rand_logits(8, 3, 4).float(), torch.arange(8) % 4
    with torch.autocast("cpu", torch.bfloat16):
        inside = evidential_fusion_loss(logits, labels, kl_weight=0.4)
    outside = evidential_fusion_loss(logits, labels, kl_weight=0.4)
    assert torch.equal(inside.loss, outside.loss)
    assert torch.equal(inside.fused_evidence, outside.fused_evidence)


def test_softplus_is_exact_where_torch_s_default_turns_linear():
    logits = torch.tensor([-40.0, 0.0, 19.0, 20.5, 30.0, 50.0], dtype=torch.float64)
    output = evidential_fusion_loss(
        logits.view(1, 1, -1), torch.tensor([0]), kl_weight=0.0, activation="softplus"
    )
    wanted = torch.logaddexp(logits, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(output.fused_evidence[0], wanted, rtol=1e-15, atol=0)


def test_exp_evidence_has_no_gradient_beyond_its_clamp():
    logits = torch.tensor([[[10.5, 0.0, -10.5]]], requires_grad=True)
    evidential_fusion_loss(
        logits, torch.tensor([1]), kl_weight=0.1, activation="exp"
    ).loss.backward()
    assert logits.grad[0, 0, 0] == logits.grad[0, 0, 2] == 0 != logits.grad[0, 0, 1]


def test_no_rows_make_no_loss():
    logits = torch.zeros(0, 2, 3, requires_grad=True)
    output = evidential_fusion_loss(logits, torch.zeros(0, dtype=torch.int64), kl_weight=0.1)
    output.loss.backward()
    assert output.loss.item() == 0 and output.fused_evidence.shape == (0, 3)
