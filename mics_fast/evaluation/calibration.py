"""Calibration: one factor per opinion, fitted on val rows, that makes probabilities match reality.

- "temperature" divides the logarithms of the expected probabilities (Guo et al., ICML 2017) and
  keeps the vacuity;
- "evidence" multiplies the evidence, which changes probabilities and vacuity together [ours].

Neither changes the most probable class, nor the order of rows by vacuity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mics_fast.evaluation.opinions import Predictions, Source

Kind = Literal["temperature", "evidence"]

# The likelihood of an evidence factor may have more than one peak: a grid finds the highest.
_FACTORS = torch.logspace(-2, 2, 801, dtype=torch.float64)


@dataclass(frozen=True)
class Calibration:
    """The fitted factors of a run.

    Args:
        kind: "temperature" or "evidence".
        factors: One per opinion that had val rows.
    """

    kind: Kind
    factors: Mapping[Source, float]

    def apply(self, predictions: Mapping[Source, Predictions]) -> dict[Source, Predictions]:
        """Calibrate every opinion that has a factor; drop the others."""
        return {
            source: calibrate(own, self.kind, self.factors[source])
            for source, own in predictions.items()
            if source in self.factors
        }

    def json(self) -> dict[str, Any]:
        """Return kind and factors as JSON."""
        return {"kind": self.kind, "factors": by_source(self.factors)}


def fit_calibration(kind: Kind, predictions: Mapping[Source, Predictions]) -> Calibration:
    """Fit one factor per opinion; every label is known."""
    return Calibration(kind, {source: fit_factor(own, kind) for source, own in predictions.items()})


def fit_factor(predictions: Predictions, kind: Kind) -> float:
    """Find the factor in [0.01, 100] with the lowest negative log likelihood, to 0.6 %.

    Args:
        predictions: Of at least one row; every label is known.
        kind: "temperature" or "evidence".
    """
    losses = []
    for factor in _FACTORS.tolist():
        probability = calibrate(predictions, kind, factor).probability.double()
        likelihood = probability.gather(1, predictions.label.unsqueeze(1))
        losses.append(-likelihood.clamp(min=1e-12).log().mean())
    return _FACTORS[torch.stack(losses).argmin()].item()


def calibrate(predictions: Predictions, kind: Kind, factor: float) -> Predictions:
    """Apply a factor to predictions."""
    label, group = predictions.label, predictions.group
    if kind == "temperature":
        probability = (predictions.probability.log() / factor).softmax(1)
        return Predictions(probability, predictions.uncertainty, label, group)
    # The strength of an opinion is S = C / u, so that probability = (evidence + 1) / S.
    classes = predictions.probability.shape[1]
    strength = classes / predictions.uncertainty.double().unsqueeze(1)
    evidence = (predictions.probability * strength - 1).clamp(min=0) * factor
    total = evidence.sum(1, keepdim=True) + classes
    return Predictions(
        ((evidence + 1) / total).float(), (classes / total.squeeze(1)).float(), label, group
    )


def by_source(values: Mapping[Source, Any]) -> dict[str, dict[str, Any]]:
    """Arrange values per opinion as JSON: "views", and "missing" for those without a modality."""
    return {
        key: {source.name: own for source, own in values.items() if source.missing == missing}
        for key, missing in (("views", False), ("missing", True))
    }
