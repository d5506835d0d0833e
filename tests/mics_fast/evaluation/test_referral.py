"""Referral keeps its promise: by hand, and over a thousand simulated draws of the val rows."""

from __future__ import annotations

import math

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.evaluation.opinions import Predictions
from mics_fast.evaluation.referral import Rule, Target, apply_rule, choose_rule


def predictions_of(uncertainty, wrong, group=None):
    """Two classes; the answer is class 0 with probability 1 - uncertainty / 2."""
    uncertainty = torch.as_tensor(uncertainty, dtype=torch.float32)
    top = 1 - uncertainty / 2
    label = torch.as_tensor(wrong).long()
    group = torch.arange(len(label)) if group is None else torch.as_tensor(group)
    return Predictions(torch.stack([top, 1 - top], 1), uncertainty, label, group)


# Nineteen rows, ever less certain; the 8th, 12th and 15th are wrong.
BY_HAND = predictions_of([k / 20 for k in range(1, 20)], [k in (8, 12, 15) for k in range(1, 20)])


@pytest.mark.parametrize(
    # (wrong + 1) / 20 <= risk: none wrong at 0.05, one at 0.10, two at 0.15, all three at 0.20.
    ("risk", "limit"), [(0.05, 7 / 20), (0.10, 11 / 20), (0.15, 14 / 20), (0.20, 19 / 20)],
)  # fmt: skip
def test_the_threshold_is_that_of_conformal_risk_control_by_hand(risk, limit):
    assert choose_rule(BY_HAND, "uncertainty", Target(risk)).limit == pytest.approx(limit)
    # The probability of the answer is 1 - u / 2: the same rows are answered.
    by_probability = choose_rule(BY_HAND, "probability", Target(risk))
    assert by_probability.limit == pytest.approx(1 - limit / 2)
    assert torch.equal(
        by_probability.refers(BY_HAND), Rule("uncertainty", limit + 1e-6).refers(BY_HAND)
    )


def test_a_confidence_asks_for_the_exact_binomial_bound():
    # Of 19 groups 0 wrong: 1 - 0.1 ** (1 / 19) = 0.114; 1 wrong: 0.19 (Clopper and Pearson).
    assert choose_rule(BY_HAND, "uncertainty", Target(0.12, 0.9)).limit == pytest.approx(7 / 20)
    assert choose_rule(BY_HAND, "uncertainty", Target(0.20, 0.9)).limit == pytest.approx(11 / 20)


def test_too_few_groups_are_refused_with_the_number_it_takes():
    with pytest.raises(InputError, match="19 groups of val rows, wanted at least 24 for a risk"):
        choose_rule(BY_HAND, "uncertainty", Target(0.04))
    with pytest.raises(InputError, match="wanted at least 45"):
        choose_rule(BY_HAND, "uncertainty", Target(0.05, 0.9))


def test_where_the_surest_rows_are_wrong_every_sample_is_referred():
    wrong = predictions_of([k / 20 for k in range(1, 20)], [True] * 19)
    for by in ("uncertainty", "probability"):
        assert choose_rule(wrong, by, Target(0.05)).refers(wrong).all()


def test_frames_of_one_lesion_count_once():
    twice = predictions_of(
        [k / 20 for k in range(1, 20) for _ in range(2)],
        [k in (8, 12, 15) for k in range(1, 20) for _ in range(2)],
        [k for k in range(1, 20) for _ in range(2)],
    )
    assert choose_rule(twice, "uncertainty", Target(0.10)).limit == pytest.approx(11 / 20)


def drawn(count, generator):
    """Rows that are wrong with the probability that they are uncertain, halved."""
    uncertainty = torch.rand(count, generator=generator)
    return predictions_of(uncertainty, torch.rand(count, generator=generator) < uncertainty / 2)


def true_risk(limit):
    """Share answered and wrong: the integral of u / 2 from 0 to the limit."""
    return limit**2 / 4


def test_a_thousand_draws_keep_the_risk_on_average():
    generator = torch.Generator().manual_seed(0)
    limits = [
        choose_rule(drawn(60, generator), "uncertainty", Target(0.1)).limit for _ in range(1000)
    ]
    risks = torch.tensor([true_risk(limit) for limit in limits])
    error = risks.std() / math.sqrt(1000)
    assert 0.08 < risks.mean() <= 0.1 + 2 * error


def test_a_thousand_draws_keep_the_risk_as_often_as_stated():
    generator = torch.Generator().manual_seed(0)
    target = Target(0.1, confidence=0.9)
    limits = [choose_rule(drawn(60, generator), "uncertainty", target).limit for _ in range(1000)]
    above = sum(true_risk(limit) > 0.1 for limit in limits)
    assert 10 < above <= 100 + 2 * 9.5  # one standard deviation of 1000 draws at 0.1 is 9.5


def test_a_rule_is_measured_on_other_rows_by_hand():
    # Answered are rows 1 to 10 of 19; the 8th is wrong.
    measured = apply_rule(BY_HAND, Rule("uncertainty", 0.5), 50)
    assert measured.values["coverage"] == pytest.approx(10 / 19)
    assert measured.values["risk"] == pytest.approx(1 / 19)
    assert measured.values["error"] == pytest.approx(1 / 10)
    low, high = measured.intervals["coverage"]
    assert low < 10 / 19 < high
    assert measured.ppv[0] == pytest.approx(9 / 10) and math.isnan(measured.ppv[1])
    assert math.isnan(measured.npv[0]) and measured.npv[1] == pytest.approx(9 / 10)


def test_a_reason_states_the_value_and_the_limit():
    assert Rule("uncertainty", 0.3).reason(0.41, 0.9) == "uncertainty 0.410 is above 0.300"
    assert Rule("probability", 0.8).reason(0.41, 0.75) == "probability 0.750 is below 0.800"
    assert Rule("uncertainty", 0.5).reason(0.41, 0.9) == ""
