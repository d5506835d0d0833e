"""Conformal prediction sets: the classes that a sample may have, with a stated coverage.

A set holds the answer and every class whose probability reaches a limit, chosen on val rows as the
largest for which the sets of new groups from the same source miss the truth at most as often as
asked for. For n groups with a mean share R of missed rows that is

    n / (n + 1) * R + 1 / (n + 1) <= 1 - coverage

(conformal risk control, Angelopoulos et al., ICLR 2024, theorem 1). With one row per group it is
split conformal prediction with the score 1 - p(truth) (Sadinle et al., JASA 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mics_fast.common.errors import InputError
from mics_fast.evaluation.counted import mean_of
from mics_fast.evaluation.intervals import Interval, bootstrap
from mics_fast.evaluation.opinions import Predictions


@dataclass(frozen=True)
class SetRule:
    """Which classes belong to the set of a sample.

    Args:
        coverage: Share of the sets that should hold the truth, in (0, 1).
        limit: Least probability of a class in the set, in [0, 1].
    """

    coverage: float
    limit: float

    def members(self, probability: Tensor) -> Tensor:
        """Mark the classes in the set of each row, (N, C) bool; the most probable one always is."""
        answer = one_hot(probability.argmax(-1), probability.shape[-1]).bool()
        return (probability >= self.limit) | answer


@dataclass(frozen=True)
class SetQuality:
    """Sets measured on rows on which they were not chosen.

    Args:
        rule: The rule of the sets.
        values: "covered" (share of the sets that hold the truth), "size" (mean number of classes)
            and "single" (share of the sets with one class).
        intervals: 95 % interval of each.
    """

    rule: SetRule
    values: dict[str, float]
    intervals: dict[str, Interval]

    def json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        return {**vars(self.rule), **self.values, "intervals": self.intervals}


def choose_sets(predictions: Predictions, coverage: float) -> SetRule:
    """Choose the limit that gives the smallest sets and keeps the coverage.

    Args:
        predictions: For val rows; every label is known.
        coverage: See ``SetRule``.

    Raises:
        InputError: there are too few groups for this coverage.
    """
    _, group = predictions.group.unique(return_inverse=True)
    count, size = int(group.max()) + 1, torch.bincount(group)
    fewest = math.ceil(1 / (1 - coverage) - 1 - 1e-9)
    if count < fewest:
        raise InputError(
            f"there are {count} groups of val rows, wanted at least {fewest} for sets that hold "
            f"the truth in {coverage:.0%} of the cases"
        )
    truth = predictions.probability.gather(1, predictions.label.unsqueeze(1))[:, 0]
    share = 1 / size[group].double()
    limits = truth.unique()  # ascending; none of the rows is missed at the first
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high + 1) // 2
        missed = share[truth < limits[middle]].sum().item()
        kept = (missed + 1) / (count + 1) <= 1 - coverage + 1e-12
        low, high = (middle, high) if kept else (low, middle - 1)
    return SetRule(coverage, limits[low].item())


def measure_sets(predictions: Predictions, rule: SetRule, count: int) -> SetQuality:
    """Measure a rule, with intervals from ``count`` resamples."""

    members = rule.members(predictions.probability)
    sizes = members.sum(1)
    covered = members.gather(1, predictions.label.unsqueeze(1)).squeeze(1)
    rows = {"covered": covered, "size": sizes, "single": sizes == 1}

    def statistics(own: Predictions, counts: Tensor) -> dict[str, Tensor]:
        return {name: mean_of(each, counts) for name, each in rows.items()}

    values = {name: each.double().mean().item() for name, each in rows.items()}
    drawn = bootstrap(predictions, statistics, count=count)
    return SetQuality(rule, values, {name: ends.tolist() for name, ends in drawn.items()})
