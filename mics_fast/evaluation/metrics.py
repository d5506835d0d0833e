"""Metrics of predictions: classification, calibration, and selective prediction."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_calibration_error,
    multiclass_cohen_kappa,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
    multiclass_recall,
    multiclass_specificity,
)

from mics_fast.evaluation.opinions import Predictions

BINS = 15
RISK = 0.05


def prediction_metrics(predictions: Predictions) -> dict[str, float]:
    """Compute one number per metric for at least one row; every label is known.

    Balanced accuracy is the mean sensitivity over the classes that occur in the truth. Macro AUROC
    and AUPRC are mean one-against-rest areas over the classes that occur, unless only one does.
    """
    return {
        **classification_metrics(predictions, class_metrics(predictions)),
        **calibration_metrics(predictions),
        **selection_metrics(predictions),
    }


def scalar_metrics(predictions: Predictions) -> dict[str, Tensor]:
    """Compute the scalar metrics that get intervals.

    The binned calibration errors get none: noise within a bin adds to them, so resamples, which
    are noisier, lie above the estimate, and their middle 95 % may miss the true value.
    """
    values = prediction_metrics(predictions)
    return {name: torch.tensor(x) for name, x in values.items() if "ece" not in name}


def sampled_metrics(predictions: Predictions) -> dict[str, Tensor]:
    """Compute the metrics that get intervals: scalars, and those of each class as (C,)."""
    return {**scalar_metrics(predictions), **class_metrics(predictions)}


def class_metrics(predictions: Predictions) -> dict[str, Tensor]:
    """Compute sensitivity, specificity, AUROC and AUPRC of each class against the rest, all (C,).

    NaN where undefined: no row of the class, or no row of another.
    """
    probability, label = predictions.probability, predictions.label
    classes = probability.shape[1]
    count = torch.bincount(label, minlength=classes)
    occurs, has_rest = count > 0, count < len(label)
    # Rounding may yield a probability above 1, which these functions would take for a logit.
    arguments = (probability.clamp(0, 1), label, classes)
    options: dict[str, Any] = {"average": "none", "validate_args": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that do not occur: NaN below
        values = {
            "sensitivity": multiclass_recall(*arguments, **options),
            "specificity": multiclass_specificity(*arguments, **options),
            "auroc": multiclass_auroc(*arguments, **options),
            "auprc": multiclass_average_precision(*arguments, **options),
        }
    defined = {"sensitivity": occurs, "specificity": has_rest}
    return {
        name: value.masked_fill(~defined.get(name, occurs & has_rest), torch.nan)
        for name, value in values.items()
    }


def classification_metrics(predictions: Predictions, each: dict[str, Tensor]) -> dict[str, float]:
    """Score the most probable class, and average ``class_metrics`` over classes.

    Accuracies, F1 and areas lie in [0, 1], kappa and Matthews' coefficient in [-1, 1].
    """
    arguments = (
        predictions.probability.clamp(0, 1),
        predictions.label,
        predictions.probability.shape[1],
    )
    accuracy = multiclass_accuracy(*arguments, average="micro", validate_args=False)
    f1 = multiclass_f1_score(*arguments, average="macro", validate_args=False)
    return {
        "accuracy": accuracy.item(),
        "balanced_accuracy": each["sensitivity"].nanmean().item(),
        "macro_f1": f1.item(),
        "macro_auroc": each["auroc"].nanmean().item(),
        "macro_auprc": each["auprc"].nanmean().item(),
        "kappa": multiclass_cohen_kappa(*arguments, validate_args=False).item(),
        "mcc": multiclass_matthews_corrcoef(*arguments, validate_args=False).item(),
    }


def calibration_metrics(predictions: Predictions) -> dict[str, float]:
    """Compute calibration errors of the top class, Brier score in [0, 2] and NLL in nats."""
    probability, label = predictions.probability, predictions.label
    classes = probability.shape[1]
    truth = torch.nn.functional.one_hot(label, classes)
    likelihood = probability.gather(1, label.unsqueeze(1)).clamp(min=1e-12)
    return {
        "ece": multiclass_calibration_error(
            probability, label, classes, n_bins=BINS, validate_args=False
        ).item(),
        "adaptive_ece": adaptive_ece(predictions),
        "brier": (probability - truth).square().sum(1).mean().item(),
        "nll": -likelihood.log().mean().item(),
    }


def adaptive_ece(predictions: Predictions) -> float:
    """Compute the calibration error over bins of equally many rows (sizes differ by at most 1).

    Source: Nguyen and O'Connor, Posterior calibration and exploratory analysis, EMNLP 2015.
    """
    confidence, order = predictions.probability.amax(1).sort(stable=True)
    gap = (1 - predictions.wrong()[order]) - confidence
    bins = gap.tensor_split(min(BINS, len(gap)))
    return sum(abs(part.sum().item()) for part in bins) / len(gap)


def selection_metrics(predictions: Predictions) -> dict[str, float]:
    """Measure selective prediction: answering only where the vacuity is low.

    "aurc" is the mean risk over all coverages (Geifman and El-Yaniv, NeurIPS 2017),
    "coverage_at_5_risk" the largest share of rows, by certainty, with an error rate of at most 5 %.
    """
    coverage, risk = risk_coverage(predictions)
    good = coverage[risk <= RISK + 1e-9]
    return {
        "aurc": risk.mean().item(),
        **risks_at(predictions, (80,)),
        "coverage_at_5_risk": good.max().item() if len(good) else 0.0,
        "uncertainty": predictions.uncertainty.mean().item(),
    }


def risks_at(predictions: Predictions, percents: Sequence[int]) -> dict[str, float]:
    """Return error rates of the most certain rows; "risk_at_80_coverage" covers 80 % of them."""
    coverage, risk = risk_coverage(predictions)
    return {
        f"risk_at_{percent}_coverage": risk[int((coverage < percent / 100 - 1e-9).sum())].item()
        for percent in percents
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
