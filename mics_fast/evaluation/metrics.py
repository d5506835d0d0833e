"""Metrics of predictions: classification, calibration, and selective prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from mics_fast.evaluation.counted import (
    Steps,
    answer_scores,
    class_scores,
    each_once,
    probability_scores,
    selection_scores,
)
from mics_fast.evaluation.opinions import Predictions

BINS = 15


def prediction_metrics(predictions: Predictions) -> dict[str, float]:
    """Compute one number per metric for at least one row; every label is known.

    Balanced accuracy is the mean sensitivity over the classes that occur in the truth. Macro AUROC
    and AUPRC are mean one-against-rest areas over the classes that occur, unless only one does.
    """
    once = scalar_metrics(predictions, each_once(predictions))
    return {name: x.item() for name, x in once.items()} | calibration_errors(predictions)


def sampled_metrics(predictions: Predictions, counts: Tensor) -> dict[str, Tensor]:
    """Compute the metrics that get intervals: scalars (R,), and those of each class (R, C).

    The binned calibration errors get none: noise within a bin adds to them, so resamples, which
    are noisier, lie above the estimate, and their middle 95 % may miss the true value.

    Args:
        predictions: For N rows; every label is known.
        counts: Resamples, (R, N); see ``counted``.
    """
    each = class_scores(predictions, counts)
    return {
        **answer_scores(predictions, counts, each),
        **probability_scores(predictions, counts),
        **selection_scores(predictions, counts),
        **each,
    }


def scalar_metrics(predictions: Predictions, counts: Tensor) -> dict[str, Tensor]:
    """Compute the metrics of ``sampled_metrics`` that are one number per resample, (R,) each."""
    return {name: x for name, x in sampled_metrics(predictions, counts).items() if x.ndim == 1}


def class_metrics(predictions: Predictions) -> dict[str, Tensor]:
    """Compute sensitivity, specificity, AUROC and AUPRC of each class against the rest, all (C,).

    NaN where undefined: no row of the class, or no row of another.
    """
    once = class_scores(predictions, each_once(predictions))
    return {name: x.squeeze(0) for name, x in once.items()}


def calibration_errors(predictions: Predictions) -> dict[str, float]:
    """Compute the binned calibration errors of the top class."""
    probability, label = predictions.probability, predictions.label
    even = multiclass_calibration_error(
        probability, label, probability.shape[1], n_bins=BINS, validate_args=False
    )
    return {"ece": even.item(), "adaptive_ece": adaptive_ece(predictions)}


def adaptive_ece(predictions: Predictions) -> float:
    """Compute the calibration error over bins of equally many rows (sizes differ by at most 1).

    Source: Nguyen and O'Connor, Posterior calibration and exploratory analysis, EMNLP 2015.
    """
    confidence, order = predictions.probability.amax(1).sort(stable=True)
    gap = (1 - predictions.wrong()[order]) - confidence
    bins = gap.tensor_split(min(BINS, len(gap)))
    return sum(abs(part.sum().item()) for part in bins) / len(gap)


def risks_at(predictions: Predictions, percents: Sequence[int]) -> dict[str, float]:
    """Return error rates of the most certain rows; "risk_at_80_coverage" covers 80 % of them."""
    steps = Steps(predictions, each_once(predictions))
    return {
        f"risk_at_{percent}_coverage": steps.risk_at(percent / 100).item() for percent in percents
    }


def risk_coverage(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Compute coverage and error rate of the 1, 2, ..., N most certain rows, (N,) float64 each.

    Rows of equal vacuity count with their mean error, so their order is irrelevant.
    """
    uncertainty, order = predictions.uncertainty.sort(stable=True)
    _, tie, size = uncertainty.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(size), dtype=torch.float64)
    errors.index_add_(0, tie, predictions.wrong()[order].double())
    number = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return number / len(order), (errors / size)[tie].cumsum(0) / number


def confusion(predictions: Predictions) -> list[list[int]]:
    """Count rows by truth (rows of the matrix) and most probable class (columns)."""
    classes = predictions.probability.shape[1]
    return multiclass_confusion_matrix(predictions.probability, predictions.label, classes).tolist()


def out_of_distribution_auroc(inside: Predictions, outside: Predictions) -> float:
    """Compute the AUROC of vacuity as a detector of other data: 1 = always higher outside."""
    uncertainty = torch.cat([inside.uncertainty, outside.uncertainty])
    sizes = torch.tensor([len(inside.uncertainty), len(outside.uncertainty)])
    return binary_auroc(uncertainty, torch.tensor([0, 1]).repeat_interleave(sizes)).item()


class PseudoLabels(TypedDict):
    """Share of rows accepted as pseudo-labels, share of these that are right, number of rows."""

    coverage: float
    precision: float
    n: int


def pseudo_label_quality(predictions: Predictions, accepted: Tensor) -> PseudoLabels:
    """Measure the pseudo-labels that training would accept.

    Args:
        predictions: For unlabelled rows; rows of unknown truth count for the coverage only.
        accepted: (N,) bool.
    """
    known = accepted & (predictions.label >= 0)
    return {
        "coverage": accepted.float().mean().item(),
        "precision": 1 - predictions.wrong()[known].mean().item(),
        "n": len(accepted),
    }
