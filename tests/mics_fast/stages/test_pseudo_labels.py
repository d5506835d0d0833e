"""The rules that turn opinions into pseudo-labels."""

from __future__ import annotations

import pytest
import torch

from mics_fast.models.classifier import ClassifierOutput
from mics_fast.options import FinetuneConfig
from mics_fast.stages.pseudo_labels import (
    NO_LABEL,
    Alignment,
    CurriculumLimits,
    FreeMatchLimits,
    accepted_in_the_end,
    pooled_softmax,
    propose,
)  # fmt: skip

CLASSES = 3


def output_of(*rows, present=None):
    """One opinion per row, or several: (B, V, C) logits."""
    logits = torch.tensor(rows, dtype=torch.float32)
    logits = logits.unsqueeze(1) if logits.ndim == 2 else logits
    if present is None:
        present = torch.ones(logits.shape[:2], dtype=torch.bool)
    return ClassifierOutput(logits, present, None)


def limits_of(confidence, probability):
    limits = FreeMatchLimits(CLASSES, momentum=0.9)
    limits.confidence.fill_(confidence)
    limits.probability.copy_(torch.tensor(probability))
    return limits


def rule(name, **options):
    return FinetuneConfig(pseudo_labels=name, **options)


def test_fixmatch_asks_for_softmax_confidence_and_ignores_vacuity():
    log = torch.log(torch.tensor([0.96, 0.03, 0.01])).tolist()
    low = [value - 20 for value in log]  # hardly any evidence, the same softmax
    other = torch.log(torch.tensor([0.04, 0.94, 0.02])).tolist()
    proposed = propose(rule("fixmatch"), output_of(low, other))
    assert proposed.uncertainty.min() > 0.5
    assert proposed.label.tolist() == [0, NO_LABEL]
    assert proposed.weight.tolist() == [1.0, 1.0]


def test_the_softmax_is_that_of_the_present_opinions():
    rows = [[[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [[2.0, 0.0, 0.0], [float("nan")] * 3]]
    present = torch.tensor([[True, True], [True, False]])
    found = pooled_softmax(output_of(*rows, present=present))
    expected = torch.tensor([[1.0, 2.0, 0.0], [2.0, 0.0, 0.0]]).softmax(-1)
    torch.testing.assert_close(found, expected)


def test_freematch_s_limits_follow_the_equations_of_the_paper():
    limits = FreeMatchLimits(2, momentum=0.9)
    assert limits().tolist() == pytest.approx([0.5, 0.5])
    limits.update(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor(0.5))
    tau = 0.9 * 0.5 + 0.1 * 0.7  # equation 5: mean of the largest probabilities
    mean = [0.9 * 0.5 + 0.1 * 0.6, 0.9 * 0.5 + 0.1 * 0.4]  # equation 6
    expected = [tau, tau * mean[1] / mean[0]]  # equations 7 and 8
    assert limits().tolist() == pytest.approx(expected)


def test_a_class_that_is_seldom_named_has_a_lower_limit():
    limits = limits_of(0.8, [0.6, 0.3, 0.1])
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.45, 0.4, 0.15]]))
    proposed = propose(rule("freematch"), output_of(*logits.tolist()), limits)
    assert proposed.label.tolist() == [NO_LABEL, 1, NO_LABEL]


def test_the_curriculum_reads_expected_probabilities_and_weighs_by_certainty():
    limits = CurriculumLimits(CLASSES)
    limits.limit.fill_(0.6)
    rows = output_of([20.0, -9.0, -9.0], [0.5, -9.0, -9.0])
    proposed = propose(rule("curriculum"), rows, limits)
    # Evidence 20 and 0.97: expected probabilities 21 / 23 and 1.97 / 3.97.
    assert proposed.label.tolist() == [0, NO_LABEL]
    torch.testing.assert_close(proposed.weight, 1 - proposed.uncertainty)
    assert proposed.weight[0] == pytest.approx(20 / 23, abs=1e-3)


def test_the_curriculum_begins_with_nothing_and_finds_the_share_of_each_class():
    """Class 0 is named with probabilities from 0.4 to 1, class 1 from 0.4 to 0.6."""
    limits, generator = CurriculumLimits(CLASSES), torch.Generator().manual_seed(0)
    assert limits().tolist() == [1, 1, 1]
    for _ in range(2000):
        first = 0.4 + 0.6 * torch.rand(12, generator=generator)
        second = 0.4 + 0.2 * torch.rand(12, generator=generator)
        limits.update(named(first, 0, second, 1), torch.tensor(0.25))
    assert limits().tolist() == pytest.approx([0.85, 0.55, 1.0], abs=0.06)


def named(first, a, second, b):
    """(24, C) probabilities whose largest is given, of class a and b."""
    rows = torch.zeros(24, CLASSES)
    rows[:12, a], rows[12:, b] = first, second
    return rows


def test_the_share_grows_to_its_end_over_the_steps(make_finetuning):
    stage = make_finetuning(pseudo_labels="curriculum", accepted_share=0.8)  # of 100 steps
    shares = [stage._scalars(torch.tensor(step)).accepted_share for step in (0, 50, 100)]
    assert shares == pytest.approx([0.0, 0.4, 0.8])


def test_metrics_tell_accepted_share_accuracy_and_classes():
    sure = [[9.0, -9.0, -9.0], [-9.0, 9.0, -9.0], [9.0, -9.0, -9.0], [-9.0, -9.0, -9.0]]
    proposed = propose(rule("vacuity"), output_of(*sure))
    metrics = proposed.metrics(torch.tensor([0, 2, -1, 0]))
    assert metrics["pseudo_accepted"] == 0.75
    assert metrics["pseudo_accuracy"] == 0.5, "of those whose truth is known"
    shares = [metrics[f"pseudo_share_{k}"].item() for k in range(CLASSES)]
    assert shares == pytest.approx([2 / 3, 1 / 3, 0])


def test_alignment_is_a_factor_per_class():
    alignment = Alignment(torch.tensor([0.5, 0.5]))
    alignment.mean.copy_(torch.tensor([0.75, 0.25]))
    aligned = alignment(torch.tensor([[0.6, 0.4], [0.9, 0.1]]))
    # Factors 2 / 3 and 2: 0.4 against 0.8, and 0.6 against 0.2.
    torch.testing.assert_close(aligned, torch.tensor([[1 / 3, 2 / 3], [0.75, 0.25]]))


def test_a_class_that_took_over_another_one_gives_rows_back():
    """Class 2 has every row of class 1, at probabilities between 0.5 and 0.7."""
    generator = torch.Generator().manual_seed(0)
    alignment = Alignment(torch.tensor([1 / 3, 1 / 3, 1 / 3]))
    for _ in range(1000):
        probability = taken_over(torch.rand(12, generator=generator))
        assert set(probability.argmax(-1).tolist()) == {0, 2}
        alignment.update(probability)
    # Means 0.33, 0.23 and 0.43: class 1 gains a factor of 0.43 / 0.23 and wins below 0.585.
    label = alignment(taken_over(torch.linspace(0, 1, 12))).argmax(-1)
    assert label.tolist() == [0] * 6 + [1] * 5 + [2] * 7


def taken_over(certainty):
    """(18, 3) probabilities: six rows of class 0; twelve for class 2, of a given certainty."""
    own = torch.tensor([0.8, 0.1, 0.1]).expand(6, -1)
    largest = 0.5 + 0.2 * certainty
    other = torch.stack([torch.full_like(largest, 0.1), 0.9 - largest, largest], dim=1)
    return torch.cat([own, other])


def test_aligned_pseudo_labels_report_what_was_not_aligned():
    alignment = Alignment(torch.tensor([0.2, 0.4, 0.4]))
    alignment.mean.copy_(torch.tensor([0.8, 0.1, 0.1]))
    config = rule("vacuity", max_uncertainty=1.0, min_probability=0.0)
    outputs = output_of([2.0, 1.5, -9.0])
    plain = propose(config, outputs)
    aligned = propose(config, outputs, alignment=alignment)
    assert (plain.label.item(), aligned.label.item()) == (0, 1)
    assert torch.equal(plain.probability, aligned.probability)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixmatch", {"align_distribution": True}),
        ("freematch", {"align_distribution": True}),
        ("vacuity", {}),
        ("curriculum", {}),
    ],
)
def test_without_alignment_there_is_no_state_of_it(make_finetuning, name, options):
    assert make_finetuning(pseudo_labels=name, **options).alignment is None


@pytest.mark.parametrize("name", ["curriculum", "freematch"])
def test_limits_advance_once_a_step_after_it(make_finetuning, make_batch, name):
    stage = make_finetuning(pseudo_labels=name)
    before = stage.limits().clone()
    for _ in stage.losses((make_batch(4), make_batch(8, strong=True)), torch.tensor(5)):
        pass
    assert torch.equal(stage.limits(), before), "not before the step is done"
    stage.after_step()
    moved = stage.limits().clone()
    assert not torch.equal(moved, before)
    stage.after_step()
    assert torch.equal(stage.limits(), moved)


def test_the_alignment_advances_once_a_step_after_it(make_finetuning, make_batch):
    stage = make_finetuning(pseudo_labels="vacuity", align_distribution=True)
    before = stage.alignment.mean.clone()
    assert torch.equal(before, stage.alignment.target), "it begins as if all were aligned"
    for _ in stage.losses((make_batch(4), make_batch(8, strong=True)), torch.tensor(5)):
        pass
    assert torch.equal(stage.alignment.mean, before), "not before the step is done"
    stage.after_step()
    moved = stage.alignment.mean.clone()
    assert not torch.equal(moved, before)
    assert moved.sum() == pytest.approx(1)
    stage.after_step()
    assert torch.equal(stage.alignment.mean, moved)


@pytest.mark.parametrize("name", ["vacuity", "fixmatch"])
def test_rules_with_fixed_limits_remember_nothing(make_finetuning, name):
    stage = make_finetuning(pseudo_labels=name)
    assert not any(key.startswith("limits") for key in stage.state_dict())


@pytest.mark.parametrize("name", ["curriculum", "freematch", "vacuity"])
def test_parts_of_a_batch_move_limits_and_alignment_as_the_whole(make_finetuning, make_batch, name):
    options = {"pseudo_labels": name, "align_distribution": True}
    whole, parts = (make_finetuning(**options) for _ in range(2))
    labelled, unlabelled = make_batch(4), make_batch(8, strong=True)
    for stage, count in ((whole, 1), (parts, 2)):
        for batch in zip(labelled.split(count), unlabelled.split(count), strict=True):
            for _ in stage.losses(batch, torch.tensor(5)):
                pass
        stage.after_step()
    moved = [
        {name: own for name, own in stage.state_dict().items() if name[:5] in ("limit", "align")}
        for stage in (whole, parts)
    ]
    assert moved[0]
    torch.testing.assert_close(moved[0], moved[1])


def test_a_finished_model_accepts_the_most_probable_share_of_each_class():
    probability = named(torch.linspace(0.4, 0.95, 12), 2, torch.linspace(0.95, 0.4, 12), 0)
    config, none = rule("curriculum", accepted_share=0.25), torch.zeros(24)
    accepted = accepted_in_the_end(config, probability, none)
    assert accepted.nonzero().flatten().tolist() == [9, 10, 11, 12, 13, 14]
    assert accepted_in_the_end(rule("vacuity"), probability, none).sum() == 8, "0.8 or more"
