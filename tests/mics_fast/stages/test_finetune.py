"""Stage 2: the rows that enter each term, and the state that advances."""

from __future__ import annotations

import pytest
import torch

from mics_fast.engine.update import computed
from mics_fast.options import FinetuneConfig, wants_unlabelled
from mics_fast.stages.finetune import NO_LABEL, Scalars, join_rows
from mics_fast.stages.ramp import ramp


@pytest.fixture
def make_stage(make_finetuning):
    return make_finetuning


ACCEPT_ALL = {"max_uncertainty": 1.0, "min_probability": 0.0}


def run_step(stage, batch, step=50, lr=0.0):
    (losses,) = stage.losses(batch, torch.tensor(step))
    stage.zero_grad()
    losses.total().backward()
    torch.optim.SGD(stage.model.parameters(), lr=lr).step()
    stage.after_step()
    return losses


def test_an_untrained_model_accepts_no_pseudo_label(make_stage, make_batch):
    stage = make_stage()
    losses = run_step(stage, (make_batch(4), make_batch(8, strong=True)))
    metrics = computed(dict(losses.on_log))
    assert metrics["pseudo_accepted"] == 0
    assert metrics["uncertainty"] > 0.9
    assert losses.terms["pseudo"] == 0


@pytest.mark.parametrize(("shift", "gathered"), [("diagonal", False), ("low-rank", True)])
def test_rows_travel_between_ranks_only_for_directions(
    make_finetuning, make_batch, monkeypatch, shift, gathered
):
    widths = []

    def noticed(rows):
        widths.append(rows.shape[1:])
        return rows.detach()

    monkeypatch.setattr("mics_fast.stages.finetune.gather_rows", noticed)
    stage = make_finetuning(shift=shift, max_uncertainty=1.0, min_probability=0.0)
    run_step(stage, (make_batch(4), make_batch(8, strong=True)))
    assert (stage.statistics.mean.shape[1:] in widths) == gathered
    assert stage.statistics.count.sum() >= 4


def test_pseudo_labels_are_the_average_s_and_weigh_one_minus_uncertainty(make_stage, make_batch):
    stage = make_stage(**ACCEPT_ALL)
    with torch.no_grad():
        for head in stage.average.heads.values():
            head.bias.copy_(torch.tensor([-4.0, 3.0, -4.0]))
    batch = make_batch(9, strong=True)
    proposed = stage._pseudo_labels(batch)
    metrics = proposed.metrics(batch.label)
    assert (proposed.label == 1).all()
    torch.testing.assert_close(1 - proposed.weight.mean(), metrics["uncertainty"])
    assert metrics["pseudo_accepted"] == 1
    assert metrics["pseudo_accuracy"] == pytest.approx(1 / 3)


def test_a_pseudo_label_needs_certainty_and_probability(make_stage, make_batch):
    batch = make_batch(6, strong=True)
    for limits in ({"max_uncertainty": 0.0}, {"min_probability": 1.0}):
        proposed = make_stage(**{**ACCEPT_ALL, **limits})._pseudo_labels(batch)
        assert (proposed.label == NO_LABEL).all()


def test_rejected_rows_count_in_the_divisor(make_batch):
    rows = join_rows((make_batch(4), make_batch(8, strong=True)), None)
    assert rows.sizes == (4, 8)
    labelled, unlabelled = rows.means(torch.ones(12))
    assert labelled == 1 and unlabelled == 1
    only_one = torch.zeros(12)
    only_one[5] = 1
    assert rows.means(only_one)[1] == pytest.approx(1 / 8)


def test_the_student_sees_weak_labelled_and_strong_unlabelled_views(make_batch):
    labelled, unlabelled = make_batch(2, seed=1), make_batch(3, strong=True, seed=2)
    rows = join_rows((labelled, unlabelled), None)
    for name in ("wli", "nbi"):
        assert torch.equal(rows.views[name][:2], labelled.views[name])
        assert torch.equal(rows.views[name][2:], unlabelled.strong[name])


def test_labels_alone_need_no_unlabelled_rows(make_stage, make_batch):
    options = {"unlabelled_weight": 0.0, "modality_consistency_weight": 0.0, "shift_weight": 0.0}
    assert not wants_unlabelled(FinetuneConfig(**options))
    losses = run_step(make_stage(**options), (make_batch(4),))
    assert set(losses.terms) == {"supervised"}


def test_every_term_reaches_the_encoders(make_stage, make_batch):
    for kept in ("modality_consistency", "shift", "pseudo"):
        stage = make_stage(**ACCEPT_ALL)
        (losses,) = stage.losses((make_batch(4), make_batch(8, strong=True)), torch.tensor(50))
        losses.terms[kept].backward()
        gradient = stage.model.encoders["wli"].blocks[0].attn.qkv.weight.grad
        assert gradient is not None and gradient.abs().max() > 0, kept


def test_agreeing_modalities_cost_nothing(make_stage, make_batch):
    stage = make_stage()
    output = stage.model(make_batch(4).views, make_batch(4).present)
    logits = output.logits.detach().clone()
    logits[:, 1] = logits[:, 0]
    output.logits = logits
    torch.testing.assert_close(stage._agreement(output), torch.zeros(()), atol=1e-6, rtol=0)
    logits[:, 1] = torch.tensor([5.0, -5.0, -5.0])
    logits[:, 0] = torch.tensor([-5.0, 5.0, -5.0])
    assert stage._agreement(output) > 0.1


def test_the_average_and_the_statistics_advance_once_after_the_step(make_stage, make_batch):
    stage = make_stage(ema_momentum=0.9)
    before = {name: p.clone() for name, p in stage.average.named_parameters()}
    batch = (make_batch(4), make_batch(8, strong=True))
    (losses,) = stage.losses(batch, torch.tensor(50))
    losses.total().backward()
    torch.optim.SGD(stage.model.parameters(), lr=0.1).step()
    assert all(torch.equal(before[n], p) for n, p in stage.average.named_parameters())
    stage.after_step()
    student = dict(stage.model.named_parameters())
    for name, average in stage.average.named_parameters():
        torch.testing.assert_close(average, before[name].lerp(student[name], 0.1))


def test_the_statistics_take_in_all_parts_of_a_batch_at_once(make_stage, make_batch):
    whole, parts = (make_stage(**ACCEPT_ALL, modality_dropout=0.0) for _ in range(2))
    whole._seen = [tuple(torch.cat(pair) for pair in zip(*_two_parts(), strict=True))]
    parts._seen = _two_parts()
    for stage in (whole, parts):
        stage.after_step()
    for name, value in whole.statistics.state_dict().items():
        assert torch.equal(value, parts.statistics.state_dict()[name])
    for first in (0, 4):
        for _ in parts.losses(
            (make_batch(4, first_id=first), make_batch(8, strong=True)), torch.tensor(50)
        ):
            pass
    assert len(parts._seen) == 2


def _two_parts():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 16, generator=generator), torch.arange(6) % 3, torch.ones(6))
        for _ in range(2)
    ]


def test_the_student_alone_does_without_modalities(make_stage, make_batch, monkeypatch):
    stage = make_stage(modality_dropout=0.9)
    batch = (make_batch(4), make_batch(8, strong=True))
    given = {}
    original = stage._forward

    def spy(model, views, present):
        given["student" if model is stage.model else "average"] = present
        return original(model, views, present)

    monkeypatch.setattr(stage, "_forward", spy)
    list(stage.losses(batch, torch.tensor(50)))
    assert given["average"].all()
    assert given["student"].any(1).all() and not given["student"].all()
    assert batch[0].present.all() and batch[1].present.all()


def test_the_shift_grows_from_nothing(make_stage, make_batch, monkeypatch):
    strengths = []
    from mics_kernels import shift_features

    def spy(*args, strength, **kwargs):
        strengths.append(strength)
        return shift_features(*args, strength=strength, **kwargs)

    monkeypatch.setattr("mics_fast.stages.finetune.shift_features", spy)
    stage = make_stage(**ACCEPT_ALL, shift_strength=0.7)
    batch = (make_batch(4), make_batch(8, strong=True))
    for step in (0, 50, 100):
        run_step(stage, batch, step)
    assert (strengths[0] == 0).all()
    assert torch.allclose(strengths[1][:4], torch.tensor(0.35))
    assert torch.allclose(strengths[2][:4], torch.tensor(0.7))
    assert (strengths[2][4:] < 0.7).all()


def test_without_a_shift_there_is_no_such_term(make_stage, make_batch):
    for options in ({"shift": "none"}, {"shift_weight": 0.0}):
        stage = make_stage(**ACCEPT_ALL, **options)
        assert "shift" not in run_step(stage, (make_batch(4), make_batch(8, strong=True))).terms
        assert not stage.statistics.count.any()


@pytest.mark.parametrize("form", ["diagonal", "low-rank", "closed-form"])
def test_every_form_of_the_shift_changes_the_loss_and_trains_the_head(make_stage, make_batch, form):
    batch = (make_batch(12), make_batch(8, strong=True))
    losses = []
    for strength in (0.0, 40.0):
        stage = make_stage(**ACCEPT_ALL, shift=form, shift_strength=strength)
        for step in (48, 49):  # statistics, before there is something to vary by
            run_step(stage, batch, step)
        losses.append(run_step(stage, batch, 50).terms["shift"])
        gradient = stage.model.heads["fusion"].weight.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
    assert losses[1] != losses[0]


def test_the_low_rank_shift_moves_along_the_latest_rows(make_stage, make_batch, monkeypatch):
    given = []
    from mics_kernels import shift_features

    def spy(*args, directions, **kwargs):
        given.append(directions)
        return shift_features(*args, directions=directions, **kwargs)

    monkeypatch.setattr("mics_fast.stages.finetune.shift_features", spy)
    stage = make_stage(**ACCEPT_ALL, shift="low-rank", shift_rank=5)
    batch = (make_batch(12), make_batch(8, strong=True))
    for step in (49, 50):
        run_step(stage, batch, step)
    assert not given[0].any()
    assert given[1].shape[1] == 5 and given[1].any()


def test_the_closed_form_weighs_rows_like_the_others(make_stage, make_batch):
    """At strength 0 it is the cross-entropy of the fusion head, times the weight of the row."""
    stage = make_stage(**ACCEPT_ALL, shift="closed-form", shift_strength=0.0)
    unlabelled = make_batch(8, strong=True)
    rows = join_rows((make_batch(4), unlabelled), stage._pseudo_labels(unlabelled))
    output = stage.model(rows.views, rows.present)
    plain = torch.nn.functional.cross_entropy(output.logits[:, -1], rows.label, reduction="none")
    scalars = Scalars(torch.tensor(50), *map(torch.tensor, (0.5, 1.0, 0.0, 0.8)))
    torch.testing.assert_close(stage._shift(output, rows, scalars)[0], rows.weight * plain)


@pytest.mark.parametrize("form", ["diagonal", "low-rank", "closed-form"])
def test_a_row_with_one_modality_has_no_fusion_feature_to_shift(make_stage, make_batch, form):
    options = {"unlabelled_weight": 0.0, "modality_consistency_weight": 0.0}
    stage = make_stage(**options, modality_dropout=0.0, shift=form)
    batch = make_batch(4)
    batch.present[1, 0] = False
    (losses,) = stage.losses((batch,), torch.tensor(50))
    assert torch.isfinite(losses.total())
    ((feature, label, _),) = stage._seen
    assert label.tolist() == [0, NO_LABEL, 2, 0]
    assert torch.isfinite(feature).all()


def test_the_kl_weight_is_annealed(make_stage, make_batch):
    stage = make_stage(kl_weight=1.0, kl_anneal=1.0)
    batch = (make_batch(4), make_batch(8, strong=True))
    weights = [run_step(stage, batch, step).metrics["kl_weight"] for step in (0, 50, 100, 150)]
    assert weights == [0.0, 0.5, 1.0, 1.0]


def test_a_ramp_grows_to_1_and_stays_there():
    steps = torch.tensor([0, 1, 4, 100])
    assert ramp(steps, 4).tolist() == [0.0, 0.25, 1.0, 1.0]
    assert ramp(steps, 0).tolist() == [1.0, 1.0, 1.0, 1.0]


def test_the_state_holds_everything_a_step_needs(make_stage, make_batch):
    one, two = (make_stage(**ACCEPT_ALL, shift="low-rank") for _ in range(2))
    for step in range(3):
        batch = (make_batch(4, seed=step), make_batch(8, strong=True, seed=step + 10))
        run_step(one, batch, step + 60, lr=0.05)
    two.load_state_dict(one.state_dict())
    batch = (make_batch(4, seed=20), make_batch(8, strong=True, seed=21))
    assert torch.equal(run_step(one, batch, 63).total(), run_step(two, batch, 63).total())


def test_class_weights_multiply_the_losses_of_their_rows(make_stage, make_batch):
    stage = make_stage(modality_dropout=0.0, unlabelled_weight=0.0, modality_consistency_weight=0.0)
    batch = make_batch(9)  # three rows of each class

    def terms(weights):
        stage.class_weights = None if weights is None else torch.tensor(weights)
        (losses,) = stage.losses((batch,), torch.tensor(50))
        return losses.terms

    plain, one = terms(None), terms([1.0, 1.0, 1.0])
    only = [terms([float(k == own) for own in range(3)]) for k in range(3)]
    costly = terms([1.0, 5.0, 2.0])
    for name in ("supervised", "shift"):
        assert torch.equal(plain[name], one[name])
        parts = [own[name] for own in only]
        assert all(part > 0 for part in parts)
        torch.testing.assert_close(sum(parts), plain[name])
        torch.testing.assert_close(parts[0] + 5 * parts[1] + 2 * parts[2], costly[name])


def test_class_weights_apply_to_pseudo_labels_too(make_stage, make_batch):
    stage = make_stage(modality_dropout=0.0, **ACCEPT_ALL)
    with torch.no_grad():
        for head in stage.average.heads.values():
            head.bias.copy_(torch.tensor([-4.0, 3.0, -4.0]))  # every pseudo-label is class 1
    batch = (make_batch(6), make_batch(6, strong=True))
    (plain,) = stage.losses(batch, torch.tensor(50))
    stage.class_weights = torch.tensor([1.0, 3.0, 1.0])
    (costly,) = stage.losses(batch, torch.tensor(50))
    assert plain.terms["pseudo"] > 0
    torch.testing.assert_close(costly.terms["pseudo"], 3 * plain.terms["pseudo"])


def test_class_weights_are_no_part_of_the_state(make_stage):
    stage = make_stage()
    before = set(stage.state_dict())
    stage.class_weights = torch.ones(3)
    assert set(stage.state_dict()) == before
