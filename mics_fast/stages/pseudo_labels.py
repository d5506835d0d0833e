"""Pseudo-labels: which opinions of the averaged model on unlabelled rows are trained on.

``finetune.pseudo_labels`` names the rule. Each takes the most probable class as the label and
differs in what it accepts, and with which weight:

    vacuity     fused vacuity u at most ``max_uncertainty`` and expected probability at least
                ``min_probability``; weight 1 - u [ours, after the paper]
    adaptive    expected probability at least a limit that follows the model, class by class, as
                FreeMatch's; weight 1 - u [ours]
    fixmatch    softmax confidence at least ``confidence``; weight 1 (Sohn et al., NeurIPS 2020)
    freematch   softmax confidence at least FreeMatch's limit; weight 1 (Wang et al., ICLR 2023)

The softmax is that of the mean of the present opinions' logits: the same networks and views, read
without evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mics_fast.models.classifier import ClassifierOutput
from mics_fast.options import FinetuneConfig
from mics_fast.stages.means import masked_mean
from mics_kernels import fuse_evidence, opinion

NO_LABEL = -1


@dataclass
class PseudoLabels:
    """Labels for B unlabelled rows.

    Args:
        label: (B,) int64; ``NO_LABEL``: rejected.
        weight: (B,) in [0, 1].
        probability: (B, C), what the rule looked at.
        uncertainty: (B,) fused vacuity.
    """

    label: Tensor
    weight: Tensor
    probability: Tensor
    uncertainty: Tensor

    def metrics(self, truth: Tensor) -> dict[str, Tensor]:
        """Accepted share, its accuracy where the truth is known, and the share of each class."""
        accepted = self.label != NO_LABEL
        metrics = {
            "pseudo_accepted": accepted.float().mean(),
            "pseudo_accuracy": masked_mean((self.label == truth).float(), accepted & (truth >= 0)),
            "uncertainty": self.uncertainty.mean(),
        }
        for k in range(self.probability.shape[1]):
            metrics[f"pseudo_share_{k}"] = masked_mean((self.label == k).float(), accepted)
        return metrics


class AdaptiveLimits(nn.Module):
    """FreeMatch's self-adaptive limits of confidence, one per class (equations 5 to 8).

    The mean confidence of all unlabelled rows is the limit of the class that the model names with
    most probability; others have one lower in proportion. Both start at 1 / C.

    Args:
        num_classes: C.
        momentum: of the running means, per step.
    """

    confidence: Tensor
    probability: Tensor

    def __init__(self, num_classes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("confidence", torch.tensor(1 / num_classes))
        self.register_buffer("probability", torch.full((num_classes,), 1 / num_classes))

    def limits(self) -> Tensor:
        """(C,) least confidence of each class."""
        return self.confidence * self.probability / self.probability.amax()

    def update(self, probability: Tensor) -> None:
        """Advance by the (B, C) probabilities of a step, those of all ranks."""
        share = 1 - self.momentum
        self.confidence.lerp_(probability.amax(-1).mean(), share)
        self.probability.lerp_(probability.mean(0), share)


def propose(
    config: FinetuneConfig, output: ClassifierOutput, limits: AdaptiveLimits
) -> PseudoLabels:
    """Pseudo-labels from what the averaged model states of weak views."""
    fused = opinion(fuse_evidence(softplus(output.logits), present=output.present))
    evidential = config.pseudo_labels in ("vacuity", "adaptive")
    probability = fused.probability if evidential else pooled_softmax(output)
    confidence, label = probability.max(-1)
    if config.pseudo_labels == "vacuity":
        accepted = is_pseudo_label(config, probability, fused.uncertainty)
    elif config.pseudo_labels == "fixmatch":
        accepted = confidence >= config.confidence
    else:
        accepted = confidence >= limits.limits()[label]
    weight = 1 - fused.uncertainty if evidential else torch.ones_like(fused.uncertainty)
    return PseudoLabels(
        torch.where(accepted, label, NO_LABEL), weight, probability, fused.uncertainty
    )


def is_pseudo_label(config: FinetuneConfig, probability: Tensor, uncertainty: Tensor) -> Tensor:
    """The rule "vacuity" on (R, C) probabilities and (R,) vacuities: (R,) bool."""
    sure = uncertainty <= config.max_uncertainty
    return sure & (probability.amax(-1) >= config.min_probability)


def pooled_softmax(output: ClassifierOutput) -> Tensor:
    """(B, C) softmax of the mean of the present opinions' logits."""
    present = output.present.unsqueeze(-1)
    total = output.logits.masked_fill(~present, 0.0).sum(1)
    return (total / present.sum(1).clamp(min=1)).softmax(-1)
