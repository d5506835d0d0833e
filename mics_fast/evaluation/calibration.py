"""One factor that makes a view's probabilities honest, fitted on the val rows.

- "temperature" divides the logarithms of the expected probabilities (Guo et al., ICML 2017) and
  leaves the vacuity as it is;
- "evidence" multiplies the evidence, so that probabilities and vacuity change together [ours].

Neither changes which class is the most probable.
"""

from __future__ import annotations

from typing import Literal

import torch

from mics_fast.evaluation.opinions import View

Kind = Literal["temperature", "evidence"]

# The likelihood of an evidence factor may have more than one peak: a grid finds the highest.
_FACTORS = torch.logspace(-2, 2, 801, dtype=torch.float64)


def fit_factor(view: View, kind: Kind) -> float:
    """The factor in [0.01, 100] with the lowest negative log likelihood, to 0.6 %.

    Args:
        view: of at least one row; every label is known.
        kind: "temperature" or "evidence".
    """
    losses = []
    for factor in _FACTORS.tolist():
        probability = calibrate(view, kind, factor).probability.double()
        losses.append(-probability.gather(1, view.label.unsqueeze(1)).clamp(min=1e-12).log().mean())
    return _FACTORS[torch.stack(losses).argmin()].item()


def calibrate(view: View, kind: Kind, factor: float) -> View:
    """The same view with its factor applied."""
    if kind == "temperature":
        probability = (view.probability.log() / factor).softmax(1)
        return View(probability, view.uncertainty, view.label, view.group)
    # An opinion in terms of its strength S = C / u: probability = (evidence + 1) / S.
    classes = view.probability.shape[1]
    strength = classes / view.uncertainty.double().unsqueeze(1)
    evidence = (view.probability * strength - 1).clamp(min=0) * factor
    total = evidence.sum(1, keepdim=True) + classes
    return View(
        ((evidence + 1) / total).float(),
        (classes / total.squeeze(1)).float(),
        view.label,
        view.group,
    )
