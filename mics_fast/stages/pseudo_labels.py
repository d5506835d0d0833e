"""Pseudo-labels: rules that accept opinions of the averaged model on unlabelled rows.

``finetune.pseudo_labels`` names the rule. Every rule takes the most probable class as the label;
they differ in the rows they accept and in the weights:

    vacuity     fused vacuity u at most ``max_uncertainty`` and expected probability at least
                ``min_probability``; weight 1 - u [ours, after the paper]
    curriculum  for each class, the share of the rows assigned to it with the highest expected
                probability; the share grows over training to ``accepted_share``; weight 1 - u
                [ours, after curriculum labelling: Cascante-Bonilla et al., AAAI 2021]
    fixmatch    softmax confidence at least ``confidence``; weight 1 (Sohn et al., NeurIPS 2020)
    freematch   softmax confidence at least FreeMatch's limit; weight 1 (Wang et al., ICLR 2023)

The softmax is over the mean logits of the present opinions: the same networks and views, without
the evidential reading.

With ``align_distribution``, "vacuity" and "curriculum" read aligned probabilities (``Alignment``),
so that no class takes over another one's rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from mics_fast.models.classifier import ClassifierOutput
from mics_fast.options import FinetuneConfig
from mics_fast.stages.means import masked_mean, part_of_mean
from mics_kernels import fuse_evidence, opinion

NO_LABEL = -1
EVIDENTIAL = ("vacuity", "curriculum")  # rules that read opinions


class PseudoLabels(NamedTuple):
    """Labels for B unlabelled rows.

    Args:
        label: (B,) int64; ``NO_LABEL``: rejected.
        weight: (B,) in [0, 1].
        probability: (B, C), not aligned.
        uncertainty: (B,) fused vacuity.
    """

    label: Tensor
    weight: Tensor
    probability: Tensor
    uncertainty: Tensor

    def metrics(self, truth: Tensor) -> dict[str, Tensor]:
        """Return the accepted share, its accuracy where known, and the share of each class."""
        accepted = self.label != NO_LABEL
        right = (self.label == truth).float()
        classes = torch.arange(self.probability.shape[1], device=self.label.device)
        assigned = self.label.unsqueeze(1) == classes
        shares = part_of_mean(assigned.sum(0), accepted.sum())
        return {
            "pseudo_accepted": accepted.float().mean(),
            "pseudo_accuracy": masked_mean(right, accepted & (truth >= 0)),
            "uncertainty": self.uncertainty.mean(),
            **{f"pseudo_share_{k}": share for k, share in enumerate(shares)},
        }


class FreeMatchLimits(nn.Module):
    """FreeMatch's self-adaptive limits of confidence, one per class (equations 5 to 8).

    The limit of the most probable class is the mean confidence over all unlabelled rows; other
    classes have proportionally lower limits. Both averages start at 1 / C.

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

    def forward(self) -> Tensor:
        """Return the confidence limit of each class, (C,)."""
        return self.confidence * self.probability / self.probability.amax()

    def update(self, probability: Tensor, share: Tensor) -> None:
        """Update by the probabilities, (B, C), of a step over all ranks."""
        self.confidence.lerp_(probability.amax(-1).mean(), 1 - self.momentum)
        self.probability.lerp_(probability.mean(0), 1 - self.momentum)


class CurriculumLimits(nn.Module):
    """Limits of confidence that accept a given share of the rows assigned to each class.

    Each is a running quantile: it rises if more than the share was accepted in a step, and falls
    if less was. All start at 1, where nothing is accepted.

    Args:
        num_classes: C.
    """

    limit: Tensor
    RATE = 0.1  # change of a limit per step, if all rows are accepted and none should be

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("limit", torch.ones(num_classes))

    def forward(self) -> Tensor:
        """Return the confidence limit of each class, (C,)."""
        return self.limit

    def update(self, probability: Tensor, share: Tensor) -> None:
        """Update by the probabilities, (B, C), of a step over all ranks.

        Args:
            probability: of the averaged model's opinions.
            share: 0-d, of the rows of each class to accept.
        """
        confidence, label = probability.max(-1)
        assigned = one_hot(label, len(self.limit)).to(self.limit.dtype)
        accepted = assigned * (confidence >= self.limit[label]).unsqueeze(-1)
        count = assigned.sum(0)
        excess = (accepted.sum(0) - share * count) / count.clamp(min=1)
        self.limit.add_((self.RATE * excess).to(self.limit.dtype)).clamp_(0, 1)


Limits = FreeMatchLimits | CurriculumLimits


class Alignment(nn.Module):
    """Distribution alignment: the mean over unlabelled rows becomes that over labelled ones.

    Probabilities are multiplied by ``target / mean`` and normalised (Berthelot et al., ReMixMatch,
    ICLR 2020, section 3.1).

    Args:
        target: shares of the classes in the labelled rows, (C,), sum 1.
    """

    mean: Tensor
    target: Tensor
    MOMENTUM = 0.99  # of the running mean, per step: about the last hundred steps

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", target.clone())
        self.register_buffer("target", target, persistent=False)

    def forward(self, probability: Tensor) -> Tensor:
        """Align (B, C) probabilities."""
        aligned = probability * (self.target / self.mean.clamp(min=1e-6))
        return aligned / aligned.sum(-1, keepdim=True).clamp(min=1e-6)

    def update(self, probability: Tensor) -> None:
        """Update by the probabilities, (B, C), of a step over all ranks, not aligned."""
        self.mean.lerp_(probability.mean(0).to(self.mean.dtype), 1 - self.MOMENTUM)


def make_limits(config: FinetuneConfig, num_classes: int) -> Limits | None:
    """Make the adaptive limits of the rule; None if its limits are fixed."""
    if config.pseudo_labels == "freematch":
        return FreeMatchLimits(num_classes, config.ema_momentum)
    return CurriculumLimits(num_classes) if config.pseudo_labels == "curriculum" else None


def make_alignment(
    config: FinetuneConfig, num_classes: int, shares: Tensor | None
) -> Alignment | None:
    """Make the alignment that the rule uses; None if it uses none.

    Args:
        config: of the stage.
        num_classes: C.
        shares: of the classes in the labelled rows, (C,); None: all equal.
    """
    if not config.align_distribution or config.pseudo_labels not in EVIDENTIAL:
        return None
    return Alignment(torch.full((num_classes,), 1 / num_classes) if shares is None else shares)


def propose(
    config: FinetuneConfig,
    output: ClassifierOutput,
    limits: Limits | None = None,
    alignment: Alignment | None = None,
) -> PseudoLabels:
    """Propose pseudo-labels from the averaged model's output on weak views."""
    fused = opinion(fuse_evidence(softplus(output.logits), present=output.present))
    evidential = config.pseudo_labels in EVIDENTIAL
    raw = fused.probability if evidential else pooled_softmax(output)
    probability = raw if alignment is None else alignment(raw)
    confidence, label = probability.max(-1)
    if limits is not None:
        accepted = confidence >= limits()[label]
    elif config.pseudo_labels == "fixmatch":
        accepted = confidence >= config.confidence
    else:
        accepted = is_pseudo_label(config, probability, fused.uncertainty)
    weight = 1 - fused.uncertainty if evidential else torch.ones_like(fused.uncertainty)
    return PseudoLabels(torch.where(accepted, label, NO_LABEL), weight, raw, fused.uncertainty)


def is_pseudo_label(config: FinetuneConfig, probability: Tensor, uncertainty: Tensor) -> Tensor:
    """Apply the rule "vacuity" to probabilities (R, C) and vacuities (R,): (R,) bool."""
    sure = uncertainty <= config.max_uncertainty
    return sure & (probability.amax(-1) >= config.min_probability)


def accepted_in_the_end(config: FinetuneConfig, probability: Tensor, uncertainty: Tensor) -> Tensor:
    """Mark the opinions that a rule of ``EVIDENTIAL`` accepts at the end of training, (R,) bool."""
    if config.pseudo_labels == "vacuity":
        return is_pseudo_label(config, probability, uncertainty)
    confidence, label = probability.max(-1)
    order = confidence.argsort(descending=True, stable=True)
    assigned = one_hot(label[order], probability.shape[1])
    rank = (assigned.cumsum(0) * assigned).sum(-1)
    accepted = torch.empty_like(label, dtype=torch.bool)
    accepted[order] = rank <= config.accepted_share * assigned.sum(0)[label[order]]
    return accepted


def pooled_softmax(output: ClassifierOutput) -> Tensor:
    """Compute the softmax of the mean logits of the present opinions, (B, C)."""
    present = output.present.unsqueeze(-1)
    total = output.logits.masked_fill(~present, 0.0).sum(1)
    return (total / present.sum(1).clamp(min=1)).softmax(-1)
