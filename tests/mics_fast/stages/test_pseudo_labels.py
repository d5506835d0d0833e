"""The rules by which opinions become pseudo-labels."""

from __future__ import annotations

import pytest
import torch

from mics_fast.models.classifier import ClassifierOutput
from mics_fast.options import FinetuneConfig
from mics_fast.stages.pseudo_labels import NO_LABEL, AdaptiveLimits, pooled_softmax, propose

CLASSES = 3


def output_of(*rows, present=None):
    """One opinion per row, or several: (B, V, C) logits."""
    logits = torch.tensor(rows, dtype=torch.float32)
    logits = logits.unsqueeze(1) if logits.ndim == 2 else logits
    if present is None:
        present = torch.ones(logits.shape[:2], dtype=torch.bool)
    return ClassifierOutput(logits, present, None)


def limits_of(confidence, probability):
    limits = AdaptiveLimits(CLASSES, momentum=0.9)
    limits.confidence.fill_(confidence)
    limits.probability.copy_(torch.tensor(probability))
    return limits


def rule(name, **options):
    return FinetuneConfig(pseudo_labels=name, **options)


def test_fixmatch_asks_for_softmax_confidence_and_ignores_vacuity():
    log = torch.log(torch.tensor([0.96, 0.03, 0.01])).tolist()
    low = [value - 20 for value in log]  # hardly any evidence, the same softmax
    other = torch.log(torch.tensor([0.04, 0.94, 0.02])).tolist()
    proposed = propose(rule("fixmatch"), output_of(low, other), AdaptiveLimits(CLASSES, 0.9))
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
    limits = AdaptiveLimits(2, momentum=0.9)
    assert limits.limits().tolist() == pytest.approx([0.5, 0.5])
    limits.update(torch.tensor([[0.8, 0.2], [0.4, 0.6]]))
    tau = 0.9 * 0.5 + 0.1 * 0.7  # equation 5: mean of the largest probabilities
    mean = [0.9 * 0.5 + 0.1 * 0.6, 0.9 * 0.5 + 0.1 * 0.4]  # equation 6
    expected = [tau, tau * mean[1] / mean[0]]  # equations 7 and 8
    assert limits.limits().tolist() == pytest.approx(expected)


def test_a_class_that_is_seldom_named_has_a_lower_limit():
    limits = limits_of(0.8, [0.6, 0.3, 0.1])
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.45, 0.4, 0.15]]))
    proposed = propose(rule("freematch"), output_of(*logits.tolist()), limits)
    assert proposed.label.tolist() == [NO_LABEL, 1, NO_LABEL]


def test_the_adaptive_rule_reads_expected_probabilities_and_weighs_by_certainty():
    limits = limits_of(0.6, [1 / 3] * 3)
    proposed = propose(rule("adaptive"), output_of([20.0, -9.0, -9.0], [0.5, -9.0, -9.0]), limits)
    # Evidence 20 and 0.97: expected probabilities 21 / 23 and 1.97 / 3.97.
    assert proposed.label.tolist() == [0, NO_LABEL]
    torch.testing.assert_close(proposed.weight, 1 - proposed.uncertainty)
    assert proposed.weight[0] == pytest.approx(20 / 23, abs=1e-3)


def test_metrics_tell_accepted_share_accuracy_and_classes():
    sure = [[9.0, -9.0, -9.0], [-9.0, 9.0, -9.0], [9.0, -9.0, -9.0], [-9.0, -9.0, -9.0]]
    proposed = propose(rule("vacuity"), output_of(*sure), AdaptiveLimits(CLASSES, 0.9))
    metrics = proposed.metrics(torch.tensor([0, 2, -1, 0]))
    assert metrics["pseudo_accepted"] == 0.75
    assert metrics["pseudo_accuracy"] == 0.5, "of those whose truth is known"
    shares = [metrics[f"pseudo_share_{k}"].item() for k in range(CLASSES)]
    assert shares == pytest.approx([2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(("name", "moves"), [("adaptive", True), ("freematch", True),
                                             ("vacuity", False), ("fixmatch", False)])  # fmt: skip
def test_limits_advance_once_a_step_where_the_rule_has_them(
    make_finetuning, make_batch, name, moves
):
    stage = make_finetuning(pseudo_labels=name)
    before = stage.limits.probability.clone()
    for _ in stage.losses((make_batch(4), make_batch(8, strong=True)), torch.tensor(5)):
        pass
    assert torch.equal(stage.limits.probability, before), "not before the step is done"
    stage.after_step()
    assert torch.equal(stage.limits.probability, before) != moves
    moved = stage.limits.probability.clone()
    stage.after_step()
    assert torch.equal(stage.limits.probability, moved)


def test_parts_of_a_batch_move_the_limits_as_the_whole(make_finetuning, make_batch):
    whole, parts = (make_finetuning(pseudo_labels="freematch") for _ in range(2))
    labelled, unlabelled = make_batch(4), make_batch(8, strong=True)
    for stage, count in ((whole, 1), (parts, 2)):
        for batch in zip(labelled.split(count), unlabelled.split(count), strict=True):
            for _ in stage.losses(batch, torch.tensor(5)):
                pass
        stage.after_step()
    torch.testing.assert_close(whole.limits.state_dict(), parts.limits.state_dict())
