"""Stage 1 does what the method says, and none of what the published code did by mistake."""

from __future__ import annotations

import copy

import pytest
import torch

from mics_fast.config import PretrainConfig
from mics_fast.stages.means import masked_mean
from mics_fast.stages.pretrain import PretrainStage


@pytest.fixture
def make_stage(tiny):
    def make(queue_size=32, **options):
        torch.manual_seed(0)
        return PretrainStage(
            PretrainConfig(**options),
            tiny,
            ("wli", "nbi"),
            pool="mean",
            projection=8,
            queue_size=queue_size,
            steps_per_epoch=4,
            seed=0,
        )

    return make


def run_step(stage, batch, step=0, lr=0.0):
    """One step as the loop makes it; returns the losses by optimiser."""
    optimisers = {
        "model": torch.optim.SGD([p for p in stage.model.parameters() if p.requires_grad], lr=lr),
        "discriminator": torch.optim.SGD(stage.discriminator.parameters(), lr=lr),
    }
    seen = {}
    for losses in stage.losses((batch,), step):
        optimisers[losses.optimiser].zero_grad()
        losses.total().backward()
        optimisers[losses.optimiser].step()
        seen[losses.optimiser] = losses
    stage.after_step()
    return seen


def test_the_adversarial_loss_alone_trains_the_encoder(make_stage, make_batch):
    """The published code detached it: it trained nothing (audit E-1)."""
    stage = make_stage(reconstruction_weight=0.0, consistency_weight=0.0)
    run_step(stage, make_batch(4))
    gradient = stage.model.encoder.blocks[0].attn.qkv.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_the_model_s_step_leaves_no_gradient_on_the_discriminator(make_stage, make_batch):
    stage = make_stage()
    losses = stage.losses((make_batch(4),), 0)
    next(losses)
    next(losses).total().backward()
    assert all(p.grad is None for p in stage.discriminator.parameters())
    assert all(p.requires_grad for p in stage.discriminator.parameters())


def test_the_discriminator_s_step_leaves_no_gradient_on_the_model(make_stage, make_batch):
    stage = make_stage()
    next(stage.losses((make_batch(4),), 0)).total().backward()
    assert all(p.grad is None for p in stage.model.parameters())
    assert all(p.grad is not None for p in stage.discriminator.parameters())


def test_real_and_fake_share_a_space_and_differ(make_stage, make_batch, monkeypatch):
    """The published code called one tensor real and fake, and compared pixels with embeddings
    (audit E-2)."""
    stage = make_stage()
    judged = {}
    original = stage._judge

    def spy(real, fake, present):
        judged.update(real=real, fake=fake)
        return original(real, fake, present)

    monkeypatch.setattr(stage, "_judge", spy)
    run_step(stage, make_batch(4))
    real, fake = judged["real"], judged["fake"]
    assert real.shape == fake.shape
    same = (real == fake).all(-1)
    assert same.sum(1).tolist() == [4] * 8  # 16 patches, 12 of them hidden and predicted


def test_the_teacher_moves_once_a_step_and_by_its_momentum(make_stage, make_batch):
    """The published code's second forward moved it twice (audit E-3)."""
    stage = make_stage(teacher_momentum=0.9)
    before = copy.deepcopy(stage.model.teacher_encoder.state_dict())
    run_step(stage, make_batch(4), lr=0.1)
    student = stage.model.encoder.state_dict()
    for name, teacher in stage.model.teacher_encoder.state_dict().items():
        wanted = before[name].lerp(student[name], 0.1)
        torch.testing.assert_close(teacher, wanted, rtol=0, atol=1e-6)


def test_a_batch_enters_the_queue_once_and_after_its_own_loss(make_stage, make_batch):
    stage = make_stage()
    losses = stage.losses((make_batch(4),), 0)
    for each in losses:
        each.total().backward()
    assert all(queue.length == 0 for queue in stage.queues)
    stage.after_step()
    for queue in stage.queues:
        assert queue.length == 4
        assert queue.ids[:4].tolist() == [0, 1, 2, 3]


def test_a_sample_s_own_older_feature_is_never_its_negative(make_stage, make_batch):
    """The published queue held every sample 10 to 27 times (audit E-3): a floor under the loss."""
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


def test_terms_that_are_off_are_not_computed(make_stage, make_batch):
    stage = make_stage(adversarial_weight=0.0, consistency_weight=0.0)
    seen = run_step(stage, make_batch(4))
    assert set(seen) == {"model"} and set(seen["model"].terms) == {"reconstruction"}


def test_alpha_grows_over_the_first_epoch(make_stage, make_batch, monkeypatch):
    alphas = []

    def spy(*_, alpha, **__):
        alphas.append(alpha)
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr("mics_fast.stages.pretrain.multimodal_consistency_loss", spy)
    stage = make_stage()
    for step in (0, 2, 4, 9):
        run_step(stage, make_batch(4), step)
    assert alphas == [0.0, 0.2, 0.4, 0.4]


def test_the_state_holds_everything_a_step_needs(make_stage, make_batch):
    """The published code forgot discriminator, queue and their optimiser on resume (audit E-22)."""
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
