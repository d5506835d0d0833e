"""One backward pass through the discriminator yields the gradients of two."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import interpolate, softplus

from mics_fast.data.batch import PairBatch
from mics_fast.stages.adversarial import (
    LOWEST_LOGIT,
    Sequences,
    fool,
    judge,
    reversed_gradient,
    with_gradient,
)
from mics_fast.stages.pretrain import NOISE_AT_START

ALONE = {"reconstruction_weight": 0.0, "consistency_weight": 0.0, "adversarial_weight": 1.0}


@pytest.fixture
def stages(make_pretraining):
    """Both forms of the update with the same weights, in float64."""

    def make(**options):
        pair = [
            make_pretraining(adversarial=form, **{**ALONE, **options}).double()
            for form in ("simultaneous", "alternating")
        ]
        pair[1].load_state_dict(pair[0].state_dict())
        return pair

    return make


@pytest.fixture
def batch(make_batch):
    batch = make_batch(4)
    batch.views = {name: images.double() for name, images in batch.views.items()}
    batch.present[2, 1] = False
    return batch


def backward(stage, batch, parts=1, scale=1.0):
    """Gradients of a step with the discriminator's weights held; losses by optimiser."""
    seen = {}
    for losses in stage.losses((batch,), torch.tensor(3), 1 / parts):
        total = losses.total() / parts * (scale if losses.optimiser == "model" else 1.0)
        total.backward()
        seen[losses.optimiser] = losses
    return seen


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


BALANCED = {"adversarial_balance": "adaptive", "reconstruction_weight": 10.0}
FIXED = {"adversarial_balance": "fixed"}


@pytest.mark.parametrize("balance", [BALANCED, FIXED], ids=["balanced", "fixed"])
@pytest.mark.parametrize("preset", ["paper", "turbo"])
def test_one_backward_pass_gives_the_model_the_gradient_of_two(stages, batch, preset, balance):
    one, two = stages(preset=preset, **balance)
    losses = [backward(stage, batch) for stage in (one, two)]
    ours, theirs = gradients(one.model), gradients(two.model)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() < 1e-12 * largest, name  # measured: 2e-15
    for optimiser in ("discriminator", "model"):
        torch.testing.assert_close(
            losses[0][optimiser].total(), losses[1][optimiser].total(), rtol=1e-14, atol=0
        )


def test_the_discriminator_gets_the_same_gradient_either_way(stages, batch):
    one, two = stages()
    for stage in (one, two):
        backward(stage, batch)
    ours, theirs = gradients(one.discriminator), gradients(two.discriminator)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loop_that_divides_its_losses_divides_the_model_s_gradient_once(stages, batch):
    whole, parts = stages()[0], stages()[0]
    backward(whole, batch)
    backward(parts, batch, parts=4)
    for name, gradient in gradients(whole.model).items():
        torch.testing.assert_close(gradient / 4, dict(parts.model.named_parameters())[name].grad)


def test_the_adversarial_term_is_the_loss_that_it_lowers(stages, batch):
    """So the logged loss stays the weighted sum of the logged terms."""
    stage = stages()[0]
    _, sequences = stage._forward(batch, torch.tensor(3))
    seen = sequences.seen(sequences.fake)
    wanted = softplus(-stage.discriminator(seen))[sequences.present].mean()
    losses = backward(stage, batch)["model"]
    torch.testing.assert_close(losses.terms["adversarial"], wanted, rtol=1e-14, atol=0)
    assert torch.equal(losses.total(), losses.terms["adversarial"])


def tilted(stage, bias):
    """The discriminator with its logits moved."""
    discriminator = copy.deepcopy(stage.discriminator)
    with torch.no_grad():
        discriminator.head.bias += bias
    return discriminator


def by_gradient(discriminator, sequences):
    leaf = sequences.fake.detach().requires_grad_()
    loss, logits, _ = judge(discriminator, sequences, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    loss, gradient, clamped = reversed_gradient(sequences, gradient, logits)
    return with_gradient(sequences, loss, gradient), clamped


def sequences_of(stage, batch, dtype):
    with torch.no_grad():
        _, sequences = stage._forward(batch, torch.tensor(0))
    return Sequences(
        sequences.real.to(dtype), sequences.fake.to(dtype).requires_grad_(), None, sequences.present
    )


def test_a_discriminator_that_is_sure_of_itself_overflows_nothing(stages, batch):
    """At a logit of -200 the factor exp(200) does not exist in float32."""
    stage = stages()[0].float()
    sequences = sequences_of(stage, _as_float(batch), torch.float32)
    loss, clamped = by_gradient(tilted(stage, -200.0), sequences)
    loss.backward()
    assert clamped == 1 and sequences.fake.grad.isfinite().all()


@pytest.mark.parametrize("bias", [0.0, -8.0, 30.0])
def test_up_to_the_limit_the_gradient_is_exact(stages, batch, bias):
    stage = stages()[0]
    discriminator = tilted(stage, bias)
    sequences = sequences_of(stage, batch, torch.float64)
    ours, clamped = by_gradient(discriminator, sequences)
    (left,) = torch.autograd.grad(ours, sequences.fake)
    (right,) = torch.autograd.grad(fool(discriminator, sequences, sequences.fake), sequences.fake)
    assert clamped == 0
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12 * right.abs().max().item())


def test_beyond_the_limit_a_sample_s_gradient_keeps_its_direction_and_is_logged(stages, batch):
    stage = stages()[0]
    discriminator = tilted(stage, -14.0)
    sequences = sequences_of(stage, batch, torch.float64)
    ours, clamped = by_gradient(discriminator, sequences)
    (left,) = torch.autograd.grad(ours, sequences.fake)
    (right,) = torch.autograd.grad(fool(discriminator, sequences, sequences.fake), sequences.fake)
    shrunk = torch.exp(discriminator(sequences.fake) - LOWEST_LOGIT).detach()
    assert clamped == 1 and (shrunk < 0.1).all()
    torch.testing.assert_close(left, right * shrunk[:, None, None], rtol=1e-9, atol=1e-14)


def test_in_the_turbo_preset_the_discriminator_sees_a_random_quarter(make_pretraining, make_batch):
    stage = make_pretraining(preset="turbo")
    drawn = []
    for step in (0, 1):
        _, sequences = stage._forward(make_batch(4), torch.tensor(step))
        assert sequences.real.shape == sequences.fake.shape == (8, 4, 48)
        assert all(len(set(row)) == 4 for row in sequences.places.tolist())
        drawn.append(sequences.places)
    assert len(drawn[0].unique(dim=0)) > 4 and not torch.equal(*drawn)


def test_the_balanced_weight_is_the_adversary_s_share_of_the_reconstruction_s_gradient(
    stages, batch
):
    """Both gradients by autograd, in the decoder's predictions."""
    stage = stages(adversarial_weight=0.25, **BALANCED)[0]
    outputs = []
    forward = stage._forward
    stage._forward = lambda *a: outputs.append(forward(*a)) or outputs[-1]
    terms = backward_free(stage, batch)
    predictions = list(outputs[0][0].predictions.values())
    norms = {
        name: torch.stack(
            [g.norm() for g in torch.autograd.grad(term, predictions, retain_graph=True)]
        ).norm()
        for name, term in (
            ("adversarial", terms.weights["adversarial"] * terms.terms["adversarial"]),
            ("reconstruction", 10.0 * terms.terms["reconstruction"]),
        )
    }
    torch.testing.assert_close(norms["adversarial"], 0.25 * norms["reconstruction"])


def backward_free(stage, batch):
    """The model's losses of a step, before their backward pass."""
    losses = stage.losses((batch,), torch.tensor(3))
    next(losses).total().backward()
    return next(losses)


def test_noise_belongs_to_a_sample_a_modality_and_a_step(make_pretraining, make_batch):
    stage = make_pretraining()
    _, first = stage._forward(make_batch(4), torch.tensor(7))
    _, later = stage._forward(make_batch(2, first_id=2), torch.tensor(7))
    _, other = stage._forward(make_batch(4), torch.tensor(8))
    of_two = first.noise.unflatten(0, (2, 4))[:, 2:]
    assert torch.equal(of_two, later.noise.unflatten(0, (2, 2)))
    assert not (first.noise == other.noise).any()
    assert not (of_two[0] == of_two[1]).any()
    assert first.noise.std().item() == pytest.approx(stage.noise.item(), rel=0.05)


def toy_accuracies(stage, steps):
    """The discriminator's accuracy in some steps on smooth images with grain."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    optimisers = {
        "model": torch.optim.AdamW((p for p in stage.model.parameters() if p.requires_grad), 2e-3),
        "discriminator": torch.optim.Adam(stage.discriminator.parameters(), 2e-3, (0.5, 0.999)),
    }
    ids, present = torch.arange(16), torch.ones(16, 2, dtype=torch.bool)
    for step in range(steps):
        scene = interpolate(draw(16, 3, 4, 4), (16, 16), mode="bilinear")
        views = {name: scene + 0.3 * draw(16, 3, 16, 16) for name in ("wli", "nbi")}
        rows = ids + 16 * step
        batch = PairBatch(views, None, present, ids % 3, ids >= 0, rows, rows)
        for losses in stage.losses((batch,), torch.tensor(step)):
            optimisers[losses.optimiser].zero_grad()
            losses.total().backward()
            optimisers[losses.optimiser].step()
        stage.after_step()
        yield losses.metrics["discriminator_accuracy"].item()


def test_noise_keeps_the_discriminator_from_winning(make_pretraining):
    """Without noise it is right in more than 95 % of cases from the 20th step on."""
    stage = make_pretraining(consistency_weight=0.0)
    accuracy = torch.tensor(list(toy_accuracies(stage, 120))).unflatten(0, (12, 10)).mean(1)
    assert accuracy.min() > 0.5 and accuracy[3:].min() > 0.55 and accuracy.max() < 0.9
    assert stage.noise != NOISE_AT_START


def _as_float(batch):
    batch.views = {name: images.float() for name, images in batch.views.items()}
    return batch
