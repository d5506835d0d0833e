"""Prediction sets hold the truth as often as stated: by hand, and over a thousand draws."""

from __future__ import annotations

import math

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.evaluation.opinions import Predictions
from mics_fast.evaluation.prediction_sets import SetRule, choose_sets, measure_sets


def predictions_of(truth, group=None):
    """Three classes; the truth, class 0, has this probability, the answer, class 1, 0.5."""
    truth = torch.as_tensor(truth, dtype=torch.float32)
    probability = torch.stack([truth, torch.full_like(truth, 0.5), 0.5 - truth], 1)
    label = torch.zeros(len(truth), dtype=torch.int64)
    group = torch.arange(len(truth)) if group is None else torch.as_tensor(group)
    return Predictions(probability, torch.zeros(len(truth)), label, group)


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_the_limit_is_the_quantile_of_split_conformal_prediction(coverage):
    truth = torch.rand(99, generator=torch.Generator().manual_seed(0)) * 0.49
    # Score 1 - p(truth); its ceil((n + 1) * coverage)-th smallest value bounds the sets.
    scores = (1 - truth.double()).sort().values
    bound = scores[math.ceil(100 * coverage - 1e-9) - 1].item()
    assert choose_sets(predictions_of(truth), coverage).limit == pytest.approx(1 - bound, abs=1e-6)


def test_a_thousand_draws_keep_the_coverage_on_average():
    generator, covered = torch.Generator().manual_seed(1), []
    for _ in range(1000):
        rule = choose_sets(predictions_of(torch.rand(50, generator=generator) * 0.49), 0.9)
        # p(truth) is uniform on [0, 0.49): the share of new sets that hold it is known.
        covered.append(1 - rule.limit / 0.49)
    mean = sum(covered) / len(covered)
    # 46 of 51 in expectation; the coverage of a draw has a deviation of about 0.04.
    assert mean == pytest.approx(46 / 51, abs=4 * 0.042 / math.sqrt(1000))
    assert mean >= 0.9 - 4 * 0.042 / math.sqrt(1000)


def test_frames_of_one_lesion_count_once():
    truth = [0.01, 0.02, 0.03, 0.04, *[0.3 + k / 100 for k in range(9)]]
    alone = choose_sets(predictions_of(truth), 0.8)
    # As one group of four, the low ones are one miss of ten groups: (1 + 1) / 11 <= 0.2.
    together = choose_sets(predictions_of(truth, [0] * 4 + list(range(1, 10))), 0.8)
    assert alone.limit < 0.05 and together.limit == pytest.approx(0.3)


def test_the_answer_is_always_in_its_set():
    rule = SetRule(0.9, 0.9)
    assert rule.members(torch.tensor([[0.2, 0.5, 0.3]])).tolist() == [[False, True, False]]


def test_too_few_groups_are_refused_with_the_number_it_takes():
    with pytest.raises(InputError, match="8 groups of val rows, wanted at least 9 for sets"):
        choose_sets(predictions_of([0.1] * 8), 0.9)
    assert choose_sets(predictions_of([0.1] * 9), 0.9).limit == pytest.approx(0.1)


def test_sets_are_measured_on_other_rows_by_hand():
    found = measure_sets(predictions_of([0.1, 0.2, 0.3, 0.4]), SetRule(0.9, 0.25), count=5)
    # Sets of the answer and: class 2 (0.4), class 2 (0.3), class 0 (0.3), class 0 (0.4).
    assert found.values == {"covered": 0.5, "size": 2.0, "single": 0.0}
