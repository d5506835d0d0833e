"""Stage 1 does what the method says, and none of what the published code did by mistake."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mics_fast.models.masked_autoencoder import unpatchify
from mics_fast.models.vit import patchify
from mics_fast.stages.means import masked_mean


@pytest.fixture
def make_stage(make_pretraining):
    return make_pretraining


def run_step(stage, batch, step=0, lr=0.0):
    """One step as the loop makes it; returns the losses by optimiser."""
    optimisers = {
        "model": torch.optim.SGD([p for p in stage.model.parameters() if p.requires_grad], lr=lr),
        "discriminator": torch.optim.SGD(stage.discriminator.parameters(), lr=lr),
    }
    seen = {}
    for losses in stage.losses((batch,), torch.tensor(step)):
        optimisers[losses.optimiser].zero_grad()
        losses.total().backward()
        optimisers[losses.optimiser].step()
        seen[losses.optimiser] = losses
    stage.after_step()
    return seen


def test_the_adversarial_loss_alone_trains_the_encoder(make_stage, make_batch):
    """The published code detached it: it trained nothing."""
    stage = make_stage(reconstruction_weight=0.0, consistency_weight=0.0)
    run_step(stage, make_batch(4))
    gradient = stage.model.encoder.blocks[0].attn.qkv.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_the_model_s_step_leaves_no_gradient_on_the_discriminator(make_stage, make_batch):
    for form in ("simultaneous", "alternating"):
        stage = make_stage(adversarial=form)
        losses = stage.losses((make_batch(4),), torch.tensor(0))
        next(losses).total().backward()
        stage.discriminator.zero_grad()
        next(losses).total().backward()
        assert all(p.grad is None for p in stage.discriminator.parameters())
        assert all(p.requires_grad for p in stage.discriminator.parameters())


def test_the_discriminator_s_step_leaves_no_gradient_on_the_model(make_stage, make_batch):
    stage = make_stage()
    next(stage.losses((make_batch(4),), torch.tensor(0))).total().backward()
    assert all(p.grad is None for p in stage.model.parameters())
    assert all(p.grad is not None for p in stage.discriminator.parameters())


def test_real_and_fake_share_a_space_and_differ(make_stage, make_batch, monkeypatch):
    """The published code called one tensor real and fake, and compared pixels with embeddings."""
    stage = make_stage()
    judged = {}
    original = stage._judge

    def spy(sequences, leaf):
        judged.update(real=sequences.real, fake=leaf)
        return original(sequences, leaf)

    monkeypatch.setattr(stage, "_judge", spy)
    run_step(stage, make_batch(4))
    real, fake = judged["real"], judged["fake"]
    assert real.shape == fake.shape
    same = (real == fake).all(-1)
    assert same.sum(1).tolist() == [4] * 8  # 16 patches, 12 of them hidden and predicted


def test_the_teacher_moves_once_a_step_and_by_its_momentum(make_stage, make_batch):
    """The published code's second forward moved it twice."""
    stage = make_stage(teacher_momentum=0.9)
    before = copy.deepcopy(stage.model.teacher_encoder.state_dict())
    run_step(stage, make_batch(4), lr=0.1)
    student = stage.model.encoder.state_dict()
    for name, teacher in stage.model.teacher_encoder.state_dict().items():
        wanted = before[name].lerp(student[name], 0.1)
        torch.testing.assert_close(teacher, wanted, rtol=0, atol=1e-6)


def test_a_batch_enters_the_queue_once_and_after_its_own_loss(make_stage, make_batch):
    stage = make_stage()
    losses = stage.losses((make_batch(4),), torch.tensor(0))
    for each in losses:
        each.total().backward()
    assert all(queue.length == 0 for queue in stage.queues)
    stage.after_step()
    for queue in stage.queues:
        assert queue.length == 4
        assert queue.ids[:4].tolist() == [0, 1, 2, 3]


def test_parts_of_a_batch_advance_everything_once_and_enter_the_queue_in_order(
    make_stage, make_batch
):
    stage = make_stage(teacher_momentum=0.9)
    before = copy.deepcopy(stage.state_dict())
    for first in (0, 4):
        for losses in stage.losses((make_batch(4, first_id=first),), torch.tensor(0)):
            losses.total().backward()
    with torch.no_grad():
        for parameter in stage.discriminator.parameters():
            parameter += 0.1
        stage.model.encoder.cls_token += 1
    stage.after_step()
    assert [queue.ids[:9].tolist() for queue in stage.queues] == [[*range(8), -1]] * 2
    moved = stage.model.teacher_encoder.cls_token - before["model.teacher_encoder.cls_token"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1))
    layer, name = stage.discriminator.head, "discriminator.head"
    once = torch.nn.functional.normalize(layer.weight.T @ before[f"{name}.u"], dim=0)
    assert torch.equal(layer.v, once.detach())


def test_a_sample_s_own_older_feature_is_never_its_negative(make_stage, make_batch):
    """The published queue held every sample 10 to 27 times: a floor under the loss."""
    stage = make_stage(adversarial_weight=0.0, reconstruction_weight=0.0)
    batch = make_batch(1)
    for _ in range(3):
        loss = run_step(stage, batch)["model"].terms["consistency"]
        assert loss.abs() < 1e-6  # its positive is all there is, however often it was seen
    other = make_batch(1, first_id=100)
    assert run_step(stage, other)["model"].terms["consistency"] > 0.1


def test_an_absent_modality_changes_no_loss_and_enters_no_queue(make_stage, make_batch):
    batch = make_batch(4)
    batch.present[2, 1] = False
    batch.views["nbi"][2] = 0
    other = make_batch(4)
    other.present[2, 1] = False
    other.views["nbi"][2] = 1e3
    losses = []
    for each in (batch, other):
        stage = make_stage()
        seen = run_step(stage, each)
        losses.append([seen["discriminator"].total(), seen["model"].total()])
        assert [queue.length for queue in stage.queues] == [4, 3]
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


def test_in_the_turbo_preset_the_student_sees_the_visible_patches_alone(make_stage, make_batch):
    stage = make_stage(preset="turbo")
    output, _ = stage._forward(make_batch(4), torch.tensor(0))
    changed = make_batch(4)
    for name, images in changed.views.items():
        patches = patchify(images, 4)
        rows = torch.arange(4).unsqueeze(1)
        patches[rows, output.hidden[name]] = 9.0
        changed.views[name] = unpatchify(patches, 4)
    other, _ = stage._forward(changed, torch.tensor(0))
    for name in ("wli", "nbi"):
        assert torch.equal(output.features[name], other.features[name])
        # Else the places of the visible patches would tell an image from all others.
        assert not torch.equal(output.teachers[name], other.teachers[name])
        assert not torch.equal(output.targets[name], other.targets[name])


def test_terms_that_are_off_are_not_computed(make_stage, make_batch):
    stage = make_stage(adversarial_weight=0.0, consistency_weight=0.0)
    seen = run_step(stage, make_batch(4))
    assert set(seen) == {"model"} and set(seen["model"].terms) == {"reconstruction"}


def test_the_teacher_sees_its_own_views_where_there_are_any(make_stage, make_batch):
    shared, other = make_batch(4), make_batch(4, seed=1)
    independent = replace(shared, teacher=other.views)
    outputs = [make_stage()._forward(b, torch.tensor(0))[0] for b in (shared, independent, other)]
    for name in ("wli", "nbi"):
        assert torch.equal(outputs[1].teachers[name], outputs[2].teachers[name])
        for field in ("features", "predictions", "targets"):
            student, alone = getattr(outputs[1], field)[name], getattr(outputs[0], field)[name]
            assert torch.equal(student, alone)


def test_without_consistency_only_masked_views_are_encoded(make_stage, make_batch):
    stage = make_stage(consistency_weight=0.0, adversarial_weight=0.0)
    lengths = []
    stage.model.encoder.blocks[0].register_forward_hook(lambda m, x, y: lengths.append(x[0].shape))
    stage.model.teacher_encoder.register_forward_hook(lambda *_: lengths.append("teacher"))
    run_step(stage, make_batch(4))
    assert lengths == [(8, 5, 16)]  # class token and 4 of 16 patches
    assert all(queue.length == 0 for queue in stage.queues)


@pytest.mark.parametrize(
    ("positives", "wanted"),
    [
        ("modalities", [(0, 1), (1, 0)]),
        ("images", [(0, 0), (1, 1)]),
        ("both", [(0, 0), (0, 1), (1, 0), (1, 1)]),
    ],
)
def test_the_loss_is_the_mean_over_the_chosen_positives(make_stage, make_batch, positives, wanted):
    stage = make_stage(positives=positives, alpha=0.0)
    batch = make_batch(4)
    batch.teacher = make_batch(4, seed=7).views
    batch.present[3, 0] = False
    found = run_step(stage, batch)["model"].terms["consistency"]
    output, _ = stage._forward(batch, torch.tensor(0))
    rows = []
    for a, b in wanted:
        there = batch.present[:, a] & batch.present[:, b]
        keys = output.teachers[stage.modalities[b]][batch.present[:, b]]
        logits = output.features[stage.modalities[a]] @ keys.T / stage.model.temperature()
        column = (batch.present[:, b].cumsum(0) - 1)[there]
        rows.append(F.cross_entropy(logits[there], column, reduction="none"))
    torch.testing.assert_close(found, torch.cat(rows).mean())


def test_alpha_grows_over_the_first_epoch(make_stage, make_batch):
    alphas = []

    def spy(*_, alpha, **__):
        alphas.append(alpha)
        return torch.zeros((), requires_grad=True)

    stage = make_stage()
    stage.contrastive_loss = spy
    for step in (0, 2, 4, 9):
        run_step(stage, make_batch(4), step)
    assert alphas == [0.0, 0.2, 0.4, 0.4]


def test_the_state_holds_everything_a_step_needs(make_stage, make_batch):
    """The published code forgot discriminator, queue and their optimiser on resume."""
    one, two = make_stage(), make_stage()
    for step in range(3):
        run_step(one, make_batch(4, seed=step), step, lr=0.05)
    two.load_state_dict(one.state_dict())
    batch = make_batch(4, seed=9)
    for name in ("model", "discriminator"):
        a, b = run_step(one, batch, 3)[name], run_step(two, batch, 3)[name]
        assert torch.equal(a.total(), b.total())


def test_masked_mean_ignores_what_it_masks():
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean == 2 and values.grad.tolist() == [0.5, 0.0, 0.5]
    assert masked_mean(torch.ones(2), torch.zeros(2, dtype=torch.bool)) == 0
