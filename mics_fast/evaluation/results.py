"""Results of an evaluation: metrics per opinion, and the rows and settings behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mics_fast.evaluation.calibration import Calibration, by_source
from mics_fast.evaluation.intervals import LEVEL, Difference, Interval, bootstrap, extreme_interval
from mics_fast.evaluation.metrics import (
    PseudoLabels,
    class_metrics,
    confusion,
    prediction_metrics,
    sampled_metrics,
)
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import FUSED, Predictions, Source
from mics_fast.evaluation.prediction_sets import SetQuality
from mics_fast.evaluation.referral import Referral


@dataclass(frozen=True)
class ClassMetrics:
    """One class against the rest.

    Args:
        n: Rows of the class.
        values: "sensitivity", "specificity", "auroc", "auprc"; NaN where undefined.
        intervals: 95 % interval of each.
    """

    n: int
    values: dict[str, float]
    intervals: dict[str, Interval]


@dataclass
class OpinionMetrics:
    """Metrics of one opinion.

    Args:
        n: Number of rows.
        values: Metric -> value, see ``metrics.prediction_metrics``.
        intervals: 95 % interval of each metric that has one.
        per_class: Class -> its metrics.
        confusion: Counts by truth and answer.
        pseudo_labels: Measured on the unlabelled train rows; None without such rows.
    """

    n: int
    values: dict[str, float]
    intervals: dict[str, Interval]
    per_class: dict[str, ClassMetrics]
    confusion: list[list[int]]
    pseudo_labels: PseudoLabels | None = None

    def json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        judged = {} if self.pseudo_labels is None else {"pseudo_labels": self.pseudo_labels}
        classes = {
            label: {**own.values, "n": own.n, "intervals": own.intervals}
            for label, own in self.per_class.items()
        }
        return {
            **self.values,
            "n": self.n,
            "intervals": self.intervals,
            "per_class": classes,
            "confusion": self.confusion,
            **judged,
        }


@dataclass(frozen=True)
class Comparison:
    """Differences to another run on the same rows: opinion -> metric -> difference."""

    run: str
    differences: Mapping[Source, dict[str, Difference]]


@dataclass(frozen=True)
class OtherDistribution:
    """A manifest from another distribution, on which the model should be unsure."""

    manifest: str
    n: int


@dataclass
class Evaluation:
    """Evaluation of a run on the labelled rows of a split.

    Args:
        metrics: Of each opinion that has rows.
        n: Number of rows.
        groups: Number of groups of rows.
        classes: Names, in the order of the model's outputs.
        split: train, val or test.
        virtual: Modalities that were derived from another one.
        resamples: Number of bootstrap resamples.
        calibration: Factors fitted on the val rows; None without calibration.
        against: The comparison with another run; None without one.
        point: Calibration and referral rule in force.
        referrals: Rules measured on the rows: the one of ``point``, or one per criterion.
        sets: Prediction sets measured on the rows; None without them.
        out_of_distribution: Manifest behind the metric of that name; None without it.
    """

    metrics: dict[Source, OpinionMetrics]
    n: int
    groups: int
    classes: Sequence[str]
    split: str
    virtual: Sequence[str]
    resamples: int
    calibration: Calibration | None = None
    against: Comparison | None = None
    out_of_distribution: OtherDistribution | None = None
    point: OperatingPoint = field(default_factory=OperatingPoint)
    referrals: Sequence[Referral] = ()
    sets: SetQuality | None = None

    @property
    def fused(self) -> OpinionMetrics:
        """Metrics of the fused opinion."""
        return self.metrics[FUSED]

    def json(self) -> dict[str, Any]:
        """Return the object that ``evaluate --json`` writes."""
        result: dict[str, Any] = {
            **by_source({source: own.json() for source, own in self.metrics.items()}),
            "n": self.n,
            "groups": self.groups,
            "classes": list(self.classes),
            "split": self.split,
            "virtual": list(self.virtual),
            "intervals": {"level": LEVEL, "resamples": self.resamples, "unit": "group"},
        }
        if self.calibration:
            result["calibration"] = self.calibration.json()
        if self.out_of_distribution:
            result["out_of_distribution"] = vars(self.out_of_distribution)
        if self.referrals:
            target = self.point.target
            result["referral"] = {
                "by": self.point.rule and self.point.rule.by,
                "target_risk": target and target.risk,
                "confidence": target and target.confidence,
                "rules": [own.json(tuple(self.classes)) for own in self.referrals],
            }
        if self.sets:
            result["sets"] = self.sets.json()
        if self.against:
            result["against"] = {"run": self.against.run, **by_source(self.against.differences)}
        return result


def without_paths(evaluation: Evaluation) -> Evaluation:
    """Reduce the paths of other runs and manifests to their last part."""
    against, other = evaluation.against, evaluation.out_of_distribution
    return replace(
        evaluation,
        against=against and replace(against, run=Path(against.run).name),
        out_of_distribution=other and replace(other, manifest=Path(other.manifest).name),
    )


def describe(predictions: Predictions, classes: Sequence[str], count: int) -> OpinionMetrics:
    """Compute the metrics of one opinion, with intervals from ``count`` resamples."""
    drawn = {
        name: ends.tolist()
        for name, ends in bootstrap(predictions, sampled_metrics, count=count).items()
    }
    values = prediction_metrics(predictions)
    each = {name: own.tolist() for name, own in class_metrics(predictions).items()}
    intervals: dict[str, Interval] = {name: ends for name, ends in drawn.items() if name in values}
    if values["accuracy"] in (0, 1):
        intervals["accuracy"] = extreme_interval(values["accuracy"], predictions.group)
    per_class = {}
    for k, label in enumerate(classes):
        own = predictions.label == k
        ends = {name: [low[k], high[k]] for name, (low, high) in drawn.items() if name in each}
        for name, rows in (("sensitivity", own), ("specificity", ~own)):
            if each[name][k] in (0, 1):
                ends[name] = extreme_interval(each[name][k], predictions.group[rows])
        scores = {name: column[k] for name, column in each.items()}
        per_class[label] = ClassMetrics(int(own.sum()), scores, ends)
    return OpinionMetrics(len(predictions), values, intervals, per_class, confusion(predictions))
