"""How good the opinions of a view are: classes, calibration, and knowing when it is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

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

from mics_fast.evaluation.opinions import View

BINS = 15
RISK = 0.05


def view_metrics(view: View) -> dict[str, float]:
    """One number for each metric, of at least one row; every label is known.

    Balanced accuracy is the mean sensitivity over the classes that occur in the truth, macro
    AUROC and AUPRC the mean one-against-rest areas over those of them that have a rest.
    """
    return {
        **classification_metrics(view, class_metrics(view)),
        **calibration_metrics(view),
        **selection_metrics(view),
    }


def sampled_metrics(view: View) -> dict[str, float]:
    """The metrics that get intervals; "sensitivity/2" is that of class 2.

    Not the binned calibration errors: noise within a bin adds to them, so resamples, which are
    noisier, lie above the estimate, and their middle 95 % need not hold the true value.
    """
    each = class_metrics(view)
    return {
        **classification_metrics(view, each),
        **{name: x for name, x in calibration_metrics(view).items() if "ece" not in name},
        **selection_metrics(view),
        **{
            f"{name}/{k}": value
            for name, values in each.items()
            for k, value in enumerate(values.tolist())
        },
    }


def class_metrics(view: View) -> dict[str, Tensor]:
    """For each class against the rest: sensitivity, specificity, AUROC, AUPRC, all (C,).

    NaN where the rows do not tell: no row of the class, or no row of another.
    """
    probability, label = view.probability, view.label
    classes = probability.shape[1]
    count = torch.bincount(label, minlength=classes)
    occurs, has_rest = count > 0, count < len(label)
    # Rounding may leave a probability above 1, which these functions would take for a logit.
    arguments = (probability.clamp(0, 1), label, classes)
    options: dict[str, Any] = {"average": "none", "validate_args": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that do not occur: NaN below
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


def classification_metrics(view: View, each: dict[str, Tensor]) -> dict[str, float]:
    """Of the most probable class, and macro means of ``class_metrics``.

    Accuracies, F1 and areas lie in [0, 1], kappa and Matthews' coefficient in [-1, 1].
    """
    arguments = (view.probability.clamp(0, 1), view.label, view.probability.shape[1])
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


def calibration_metrics(view: View) -> dict[str, float]:
    """Expected calibration errors of the top class, Brier score in [0, 2], NLL in nats."""
    probability, label = view.probability, view.label
    classes = probability.shape[1]
    truth = torch.nn.functional.one_hot(label, classes)
    likelihood = probability.gather(1, label.unsqueeze(1)).clamp(min=1e-12)
    return {
        "ece": multiclass_calibration_error(
            probability, label, classes, n_bins=BINS, validate_args=False
        ).item(),
        "adaptive_ece": adaptive_ece(view),
        "brier": (probability - truth).square().sum(1).mean().item(),
        "nll": -likelihood.log().mean().item(),
    }


def adaptive_ece(view: View) -> float:
    """Calibration error over bins that hold equally many rows (sizes differ by one at most).

    Source: Nguyen and O'Connor, Posterior calibration and exploratory analysis, EMNLP 2015.
    """
    confidence, order = view.probability.amax(1).sort(stable=True)
    gap = (1 - view.wrong()[order]) - confidence
    bins = gap.tensor_split(min(BINS, len(gap)))
    return sum(abs(part.sum().item()) for part in bins) / len(gap)


def selection_metrics(view: View) -> dict[str, float]:
    """What is gained by answering only where the vacuity is low.

    "aurc" is the mean risk over all coverages (Geifman and El-Yaniv, NeurIPS 2017);
    "risk_at_80_coverage" the error rate of the most certain 80 % of the rows, rounded up;
    "coverage_at_5_risk" the largest share of rows, by certainty, with an error rate of at most 5 %.
    """
    coverage, risk = risk_coverage(view)
    good = coverage[risk <= RISK + 1e-9]
    return {
        "aurc": risk.mean().item(),
        **risks_at(view, (80,)),
        "coverage_at_5_risk": good.max().item() if len(good) else 0.0,
        "uncertainty": view.uncertainty.mean().item(),
    }


def risks_at(view: View, percents: Sequence[int]) -> dict[str, float]:
    """ "risk_at_80_coverage": the error rate of the most certain 80 % of the rows, rounded up."""
    coverage, risk = risk_coverage(view)
    return {
        f"risk_at_{percent}_coverage": risk[int((coverage < percent / 100 - 1e-9).sum())].item()
        for percent in percents
    }


def risk_coverage(view: View) -> tuple[Tensor, Tensor]:
    """Coverage (N,) and error rate (N,) of the 1, 2, ..., N most certain rows, float64.

    Rows of equal vacuity count with their mean error, so their order does not matter.
    """
    uncertainty, order = view.uncertainty.sort(stable=True)
    _, tie, size = uncertainty.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(size), dtype=torch.float64)
    errors.index_add_(0, tie, view.wrong()[order].double())
    number = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return number / len(order), (errors / size)[tie].cumsum(0) / number


def confusion(view: View) -> list[list[int]]:
    """Rows: the truth; columns: the most probable class."""
    classes = view.probability.shape[1]
    return multiclass_confusion_matrix(view.probability, view.label, classes).tolist()


def out_of_distribution_auroc(inside: View, outside: View) -> float:
    """How well vacuity tells rows of another distribution: 1 = always higher there, 0.5 = not."""
    uncertainty = torch.cat([inside.uncertainty, outside.uncertainty])
    sizes = torch.tensor([len(inside.uncertainty), len(outside.uncertainty)])
    return binary_auroc(uncertainty, torch.tensor([0, 1]).repeat_interleave(sizes)).item()


def pseudo_label_quality(view: View, accepted: Tensor) -> dict[str, float]:
    """Share of rows that training would accept, and how many of those labels are right.

    Args:
        view: of unlabelled rows; a truth of -1 counts for the coverage alone.
        accepted: (N,) bool.
    """
    known = accepted & (view.label >= 0)
    return {
        "coverage": accepted.float().mean().item(),
        "precision": 1 - view.wrong()[known].mean().item(),
        "n": len(accepted),
    }
