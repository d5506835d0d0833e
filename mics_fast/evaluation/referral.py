"""Referral: choose the samples to refer to a person, with a guarantee from the val rows.

The risk of a threshold is the share of all samples that are answered and wrong. It grows with the
threshold, so conformal risk control (Angelopoulos et al., ICLR 2024, theorem 1) applies: with n val
groups and mean loss R, the largest threshold with

    n / (n + 1) * R + 1 / (n + 1) <= target

has an expected risk of at most the target on new groups from the same source. With a confidence,
the risk is at most the target for that share of draws of the val rows (Bates et al., JACM 2021; an
exact binomial bound, a group counting as wrong if any of its rows is).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor

from mics_fast.common.errors import InputError
from mics_fast.evaluation import By
from mics_fast.evaluation.counted import each_once
from mics_fast.evaluation.intervals import Interval, bootstrap
from mics_fast.evaluation.opinions import Predictions


@dataclass(frozen=True)
class Rule:
    """A rule that refers samples to a person.

    Args:
        by: "uncertainty" refers if the vacuity is above the limit; "probability" refers if the
            probability of the answer is below it.
        limit: In [0, 1].
    """

    by: By
    limit: float

    def refers(self, predictions: Predictions) -> Tensor:
        """Mark the referred rows, (N,) bool."""
        return self.compare(predictions.uncertainty, predictions.probability.amax(1))

    def reason(self, uncertainty: float, probability: float) -> str:
        """Explain why one sample is referred; "" if it is not."""
        if not self.compare(torch.tensor(uncertainty), torch.tensor(probability)):
            return ""
        value, side = (uncertainty, "above") if self.by == "uncertainty" else (probability, "below")
        return f"{self.by} {value:.3f} is {side} {self.limit:.3f}"

    def compare(self, uncertainty: Tensor, probability: Tensor) -> Tensor:
        """Compare vacuities, or probabilities of the answers, with the limit, (N,) bool."""
        if self.by == "uncertainty":
            return uncertainty > self.limit
        return probability < self.limit


@dataclass(frozen=True)
class Target:
    """The requested guarantee.

    Args:
        risk: Largest share of all samples that may be answered and wrong, in (0, 1).
        confidence: Share of draws of the val rows for which the risk must hold, in (0, 1); None:
            the risk holds on average over draws.
    """

    risk: float
    confidence: float | None = None

    def kept(self, losses: Tensor) -> bool:
        """Return True if the losses of n groups, (n,) in [0, 1], satisfy the guarantee."""
        count = len(losses)
        if self.confidence is None:
            return (losses.sum().item() + 1) / (count + 1) <= self.risk + 1e-12
        wrong = int((losses > 0).sum())
        return wrong < count and beta.ppf(self.confidence, wrong + 1, count - wrong) <= self.risk

    def fewest_groups(self) -> int:
        """Smallest number of groups with which any threshold can satisfy the guarantee."""
        if self.confidence is None:
            return math.ceil(1 / self.risk - 1 - 1e-9)
        return math.ceil(math.log(1 - self.confidence) / math.log(1 - self.risk))


def choose_rule(predictions: Predictions, by: By, target: Target) -> Rule:
    """Choose the limit that answers most samples while satisfying the target.

    Args:
        predictions: For val rows; every label is known.
        by: Quantity that the limit applies to.
        target: The guarantee.

    Returns:
        A rule; if not even the surest rows may be answered, it refers every sample.

    Raises:
        InputError: there are too few groups for any threshold.
    """
    _, group = predictions.group.unique(return_inverse=True)
    count, size = int(group.max()) + 1, torch.bincount(group)
    if not target.kept(torch.zeros(count)):
        raise InputError(
            f"there are {count} groups of val rows, wanted at least {target.fewest_groups()} for a "
            f"risk of {target.risk:g}"
        )
    # Order of answering: low vacuity, or high probability, first.
    doubt = predictions.uncertainty
    if by == "probability":
        doubt = -predictions.probability.amax(1)
    wrong = predictions.wrong().double() / size[group]
    limit = 0.0 if by == "uncertainty" else math.inf  # refers every sample
    values = doubt.unique()
    low, high = 0, len(values)  # the first ``low`` values may be answered
    while low < high:
        middle = (low + high + 1) // 2
        answered = doubt <= values[middle - 1]
        losses = torch.zeros(count, dtype=torch.float64)
        losses.index_add_(0, group[answered], wrong[answered])
        low, high = (middle, high) if target.kept(losses) else (low, middle - 1)
    if low:
        limit = abs(values[low - 1].item())
    return Rule(by, limit)


@dataclass(frozen=True)
class Referral:
    """A rule measured on rows other than those it was chosen on.

    Args:
        rule: The chosen rule.
        values: "coverage" (share answered), "risk" (share answered and wrong), "error" (share of
            the answered that are wrong).
        intervals: 95 % interval of each.
        ppv, npv: Positive and negative predictive value of each class among the answered rows;
            NaN where undefined.
        ppv_intervals, npv_intervals: Their 95 % intervals.
    """

    rule: Rule
    values: dict[str, float]
    intervals: dict[str, Interval]
    ppv: list[float]
    npv: list[float]
    ppv_intervals: list[Interval]
    npv_intervals: list[Interval]

    def json(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """Return everything as one JSON object."""
        return {
            "by": self.rule.by,
            "limit": self.rule.limit if math.isfinite(self.rule.limit) else None,
            **self.values,
            "intervals": self.intervals,
            "per_class": {
                name: {
                    "ppv": self.ppv[k],
                    "npv": self.npv[k],
                    "intervals": {"ppv": self.ppv_intervals[k], "npv": self.npv_intervals[k]},
                }
                for k, name in enumerate(classes)
            },
        }


def apply_rule(predictions: Predictions, rule: Rule, count: int) -> Referral:
    """Measure a rule, with intervals from ``count`` resamples."""

    def statistics(own: Predictions, counts: Tensor) -> dict[str, Tensor]:
        return referral_statistics(own, rule, counts)

    values = referral_values(predictions, rule)
    drawn = bootstrap(predictions, statistics, count=count)
    scalars = ("coverage", "risk", "error")
    return Referral(
        rule,
        {name: values[name].item() for name in scalars},
        {name: drawn[name].tolist() for name in scalars},
        values["ppv"].tolist(),
        values["npv"].tolist(),
        drawn["ppv"].T.tolist(),
        drawn["npv"].T.tolist(),
    )


def referral_values(predictions: Predictions, rule: Rule) -> dict[str, Tensor]:
    """Compute ``referral_statistics`` of the rows themselves: () or (C,) each."""
    once = referral_statistics(predictions, rule, each_once(predictions))
    return {name: each.squeeze(0) for name, each in once.items()}


def referral_statistics(predictions: Predictions, rule: Rule, counts: Tensor) -> dict[str, Tensor]:
    """Compute coverage, risk and error (R,), and PPV and NPV per class (R, C), among the answered.

    Args:
        predictions: For N rows; every label is known.
        rule: Decides which rows are answered.
        counts: Resamples, (R, N); see ``counted``.
    """
    answered = counts * ~rule.refers(predictions)
    wrong = answered * predictions.wrong()
    classes = torch.arange(predictions.probability.shape[1])
    said = predictions.probability.argmax(1, keepdim=True) == classes
    true = predictions.label[:, None] == classes

    def sums(rows: Tensor) -> Tensor:
        return answered @ rows.double()

    return {
        "coverage": answered.sum(1) / counts.sum(1),
        "risk": wrong.sum(1) / counts.sum(1),
        "error": wrong.sum(1) / answered.sum(1),
        "ppv": sums(said & true) / sums(said),
        "npv": sums(~said & ~true) / sums(~said),
    }
