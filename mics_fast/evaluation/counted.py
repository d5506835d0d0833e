"""Metrics of many resamples at once, in float64.

A resample is one row of ``counts`` (R, N), which says how often it holds each of the N rows: whole
numbers from 0 on. The rows are sorted once, not once per resample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mics_fast.evaluation.opinions import Predictions

RISK = 0.05
_SLACK = 1e-9  # a share that equals a limit up to rounding reaches it


def each_once(predictions: Predictions) -> Tensor:
    """Return the counts of the rows themselves, (1, N)."""
    return torch.ones(1, len(predictions), dtype=torch.float64)


def class_scores(predictions: Predictions, counts: Tensor) -> dict[str, Tensor]:
    """Compute sensitivity, specificity, AUROC and AUPRC of each class against the rest, (R, C).

    NaN where undefined: no row of the class, or no row of another.
    """
    table = confusions(predictions, counts)
    right, said, true = table.diagonal(dim1=1, dim2=2), table.sum(1), table.sum(2)
    rest = table.sum((1, 2)).unsqueeze(1) - true
    areas = [
        ranking_areas(score, predictions.label == k, counts)
        for k, score in enumerate(predictions.probability.unbind(1))
    ]
    return {
        "sensitivity": right / true,
        "specificity": (rest - said + right) / rest,
        "auroc": torch.stack([roc for roc, _ in areas], 1),
        "auprc": torch.stack([precision for _, precision in areas], 1),
    }


def answer_scores(
    predictions: Predictions, counts: Tensor, each: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Score the most probable class, and average ``class_scores`` over classes, (R,) each.

    Accuracies, F1 and areas lie in [0, 1], kappa and Matthews' coefficient in [-1, 1].

    Sources: Cohen, Educational and Psychological Measurement 1960; Gorodkin, Computational Biology
    and Chemistry 2004 (Matthews' coefficient for C classes; 0 if truth or answer never varies).
    """
    table = confusions(predictions, counts)
    right, said, true = table.diagonal(dim1=1, dim2=2), table.sum(1), table.sum(2)
    total, hits, chance = true.sum(1), right.sum(1), (said * true).sum(1)
    spread = ((total**2 - (said**2).sum(1)) * (total**2 - (true**2).sum(1))).sqrt()
    return {
        "accuracy": hits / total,
        "balanced_accuracy": each["sensitivity"].nanmean(1),
        "macro_f1": (2 * right / (said + true)).nanmean(1),
        "macro_auroc": each["auroc"].nanmean(1),
        "macro_auprc": each["auprc"].nanmean(1),
        "kappa": (hits * total - chance) / (total**2 - chance),
        "mcc": torch.where(spread > 0, (hits * total - chance) / spread, 0.0),
    }


def probability_scores(predictions: Predictions, counts: Tensor) -> dict[str, Tensor]:
    """Compute Brier score in [0, 2] and NLL in nats, (R,) each."""
    probability, label = predictions.probability.double(), predictions.label
    truth = torch.nn.functional.one_hot(label, probability.shape[1])
    likelihood = probability.gather(1, label.unsqueeze(1)).squeeze(1).clamp(min=1e-12)
    return {
        "brier": mean_of((probability - truth).square().sum(1), counts),
        "nll": mean_of(-likelihood.log(), counts),
    }


def selection_scores(predictions: Predictions, counts: Tensor) -> dict[str, Tensor]:
    """Measure selective prediction, (R,) each: answering only where the vacuity is low.

    "aurc" is the mean risk over all coverages (Geifman and El-Yaniv, NeurIPS 2017),
    "coverage_at_5_risk" the largest share of rows, by certainty, with an error rate of at most 5 %.
    """
    steps = Steps(predictions, counts)
    return {
        "aurc": steps.mean_risk(),
        "risk_at_80_coverage": steps.risk_at(0.8),
        "coverage_at_5_risk": steps.coverage_at(RISK),
        "uncertainty": mean_of(predictions.uncertainty, counts),
    }


class Steps:
    """Numbers of rows and of errors when rows are answered from the most certain one on.

    Rows of equal vacuity count with their mean error, so their order is irrelevant: between two of
    the T values of the vacuity, the number of errors rises in equal parts.

    Args:
        predictions: For N rows.
        counts: (R, N).
    """

    def __init__(self, predictions: Predictions, counts: Tensor) -> None:
        vacuity, order = predictions.uncertainty.sort(stable=True)
        ends = last_of_each(vacuity)
        own = counts[:, order]
        zero = counts.new_zeros(len(counts), 1)
        rows = torch.cat([zero, own.cumsum(1)[:, ends]], 1)
        errors = (own * predictions.wrong()[order]).cumsum(1)[:, ends]
        errors = torch.cat([zero, errors], 1)
        self.rows, self.errors = rows[:, :-1], errors[:, :-1]  # before each value, (R, T)
        self.size = rows.diff(dim=1)  # rows of each value, (R, T)
        self.error = errors.diff(dim=1) / self.size.clamp(min=1)  # their mean error, (R, T)
        self.total = rows[:, -1]

    def mean_risk(self) -> Tensor:
        """Average the error rate of the 1, 2, ..., total most certain rows, (R,).

        After n rows, of which the last ones have equal vacuity, it is
        error + (errors - rows * error) / n, so harmonic numbers add it up over n.
        """
        numbers = torch.arange(1, int(self.total.max()) + 1, dtype=torch.float64)
        harmonic = torch.cat([numbers.new_zeros(1), (1 / numbers).cumsum(0)])
        reached = (self.rows + self.size).long()
        sums = harmonic[reached] - harmonic[self.rows.long()]
        risks = self.size * self.error + (self.errors - self.rows * self.error) * sums
        return risks.sum(1) / self.total

    def risk_at(self, coverage: float) -> Tensor:
        """Return the error rate of the fewest rows that reach a share of all rows, (R,)."""
        wanted = (self.total * (coverage - _SLACK)).ceil().unsqueeze(1)
        value = (self.rows < wanted).sum(1, keepdim=True) - 1
        rows, errors, error = (x.gather(1, value) for x in (self.rows, self.errors, self.error))
        return ((errors + (wanted - rows) * error) / wanted).squeeze(1)

    def coverage_at(self, risk: float) -> Tensor:
        """Return the largest share of rows with at most this error rate, 0 where none has, (R,)."""
        risk += _SLACK
        spare = risk * self.rows - self.errors  # errors that may still be added
        fitting = (spare / (self.error - risk)).floor()
        count = torch.where(self.error <= risk, self.size, torch.minimum(fitting, self.size))
        kept = (count >= 1) & (self.errors + count * self.error <= risk * (self.rows + count))
        return torch.where(kept, self.rows + count, 0.0).amax(1) / self.total


def confusions(predictions: Predictions, counts: Tensor) -> Tensor:
    """Count rows by truth and most probable class, (R, C, C)."""
    classes = predictions.probability.shape[1]
    cell = predictions.label * classes + predictions.probability.argmax(1)
    table = counts.new_zeros(len(counts), classes**2).index_add_(1, cell, counts)
    return table.view(-1, classes, classes)


def ranking_areas(score: Tensor, positive: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute AUROC and AUPRC (average precision) of a score, (R,) each.

    NaN without a positive row or without a negative one.

    Args:
        score: Higher for positive rows, (N,).
        positive: (N,) bool.
        counts: (R, N).
    """
    falling, order = score.sort(descending=True, stable=True)
    ends = last_of_each(falling)
    own = counts[:, order]
    found = (own * positive[order]).cumsum(1)[:, ends]
    false = own.cumsum(1)[:, ends] - found
    positives, negatives = found[:, -1], false[:, -1]
    zero = counts.new_zeros(len(counts), 1)
    more, more_false = found.diff(dim=1, prepend=zero), false.diff(dim=1, prepend=zero)
    roc = (more_false * (found - more / 2)).sum(1) / (positives * negatives)
    precision = (more * found / (found + false).clamp(min=1)).sum(1) / positives
    return roc, precision.masked_fill(negatives == 0, torch.nan)


def last_of_each(values: Tensor) -> Tensor:
    """Return the last position of each value of a sorted (N,) tensor."""
    return values.unique_consecutive(return_counts=True)[1].cumsum(0) - 1


def mean_of(values: Tensor, counts: Tensor) -> Tensor:
    """Average values (N,) over the rows of each resample, (R,)."""
    return counts @ values.double() / counts.sum(1)
