"""The evidential operators as formulas: the specification of every other file in this folder.

Shapes: B rows, V views, C classes. Inputs of any float dtype; results are float32, or float64 for
float64 inputs. Derivations and sources: README.md beside this file.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mics_kernels.evidential.records import EvidentialInputs
from mics_kernels.reductions import reduce

_FAR = 1000.0  # from here on the series of h


def fuse_evidence(evidence: Tensor, present: Tensor | None) -> Tensor:
    """Fuse by Dempster's rule, ``1 + fused / C = prod_v (1 + evidence_v / C)``, to (B, C)."""
    evidence = _keep(_wide(evidence), present)
    classes = evidence.shape[-1]
    fused = torch.zeros_like(evidence[:, 0])
    for view in evidence.unbind(1):
        fused = fused + view + fused * view / classes  # every term >= 0: nothing cancels
    return fused


def evidential_loss(inputs: EvidentialInputs) -> Tensor:
    """Reduced loss of every opinion, of evidence (B, C) or (B, V, C)."""
    losses = _losses(inputs, inputs.values, inputs.present)
    return reduce(losses, _counted(inputs).sum(), inputs.reduction)


def evidential_fusion_loss(inputs: EvidentialInputs) -> tuple[Tensor, Tensor]:
    """Reduced loss of the rows over their views and their fusion, and fused evidence (B, C)."""
    present, counted = inputs.present, _counted(inputs)
    if present is None:
        present = torch.ones(inputs.values.shape[:2], dtype=torch.bool, device=counted.device)
    with torch.no_grad():
        fused = fuse_evidence(_evidence(inputs, present), None)
    # Ignored rows have fused evidence, but no part in loss and gradient.
    present = present & counted.unsqueeze(1)
    evidence = _evidence(inputs, present)
    opinions = torch.cat([evidence, fuse_evidence(evidence, None).unsqueeze(1)], dim=1)
    held = torch.cat([present, present.any(dim=1, keepdim=True)], dim=1)
    losses = _losses(inputs, opinions, held).sum(dim=1)
    return reduce(losses, counted.sum(), inputs.reduction), fused


def opinion(evidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute belief (..., C), vacuity (...,) and expected probability (..., C)."""
    evidence = _wide(evidence)
    classes = evidence.shape[-1]
    strength = evidence.sum(-1, keepdim=True) + classes
    return evidence / strength, (classes / strength).squeeze(-1), (evidence + 1.0) / strength


def conflict(evidence: Tensor, present: Tensor | None) -> Tensor:
    """Sum the mass of combinations of views that contradict each other: (B, V, C) -> (B,)."""
    belief, uncertainty, _ = opinion(_keep(evidence, present))
    silent = uncertainty.prod(dim=1)
    agreed = (belief + uncertainty.unsqueeze(-1)).prod(dim=1) - silent.unsqueeze(-1)
    return (1.0 - agreed.sum(-1) - silent).clamp(0.0, 1.0)


def _evidence(inputs: EvidentialInputs, present: Tensor) -> Tensor:
    """Return the evidence of present views, 0 for the others: (B, V, C)."""
    # Masked twice: the activation of 0 is not 0, and its derivative at NaN is NaN.
    return _keep(_activate(_keep(_wide(inputs.values), present), inputs.activation), present)


def _losses(inputs: EvidentialInputs, evidence: Tensor, present: Tensor | None) -> Tensor:
    """Weigh the loss of each opinion, 0 if ignored: (B, C) -> (B,), (B, V, C) -> (B, V)."""
    counted, probability = _counted(inputs), _probabilities(inputs.target, evidence.shape[-1])
    weight = inputs.weight
    if evidence.dim() == 3:
        counted = counted.unsqueeze(1).expand(evidence.shape[:2])
        counted = counted if present is None else counted & present
        probability = probability.unsqueeze(1)
        weight = None if weight is None else weight.unsqueeze(1)
    # Before the formulas: a NaN in a row that does not count must reach neither loss nor gradient.
    evidence = _keep(_wide(evidence), counted)
    losses = _opinion_loss(evidence, probability, inputs.kl_weight)
    if weight is not None:
        losses = losses * weight
    return torch.where(counted, losses, 0.0).to(evidence.dtype)


def _counted(inputs: EvidentialInputs) -> Tensor:
    """Mark the rows with a target, (B,) bool; all rows of probabilities have one."""
    if inputs.target.dim() == 2:
        return torch.ones(len(inputs.target), dtype=torch.bool, device=inputs.target.device)
    return inputs.target != inputs.ignore_index


def _opinion_loss(evidence: Tensor, probability: Tensor, kl_weight: float | Tensor) -> Tensor:
    """Compute the expected cross-entropy plus ``kl_weight`` times KL, in float64.

    A and KL are small differences of large digammas and log-gammas, which torch computes to six
    digits at best in float32. float64 is what makes float32 losses accurate.

    Args:
        evidence: (..., C), non-negative.
        probability: (..., C), y; broadcasts against ``evidence``.
    """
    evidence, probability = evidence.double(), probability.double()
    alpha = evidence + 1.0
    strength = alpha.sum(-1, keepdim=True)
    cross_entropy = (probability * (torch.digamma(strength) - torch.digamma(alpha))).sum(-1)
    return cross_entropy + kl_weight * _kl_from_uniform((1.0 - probability) * evidence)


def _kl_from_uniform(evidence: Tensor) -> Tensor:
    """Compute KL(Dirichlet(1 + evidence) || Dirichlet(1)) without large terms that cancel."""
    classes = evidence.shape[-1]
    alpha = evidence + 1.0
    strength = alpha.sum(-1)
    flat = torch.full_like(strength, classes)
    return (
        (_h(strength) - _h(flat))
        + (classes - 1) * (torch.digamma(strength) - torch.digamma(flat))
        - (_h(alpha) - 1.0).sum(-1)
    )


def _h(alpha: Tensor) -> Tensor:
    """``lnGamma(a) - (a - 1) digamma(a) + a``, which grows like ``ln(a) / 2``; ``h(1) = 1``."""
    near = alpha.clamp(max=_FAR)
    exact = torch.lgamma(near) - (near - 1.0) * torch.digamma(near) + near
    # For large alpha these terms cancel even in float64; the series is accurate to 1e-17 there.
    t = 1.0 / alpha
    series = t * (-1.0 / 3.0 + t * (-1.0 / 12.0 + t * (-1.0 / 90.0 + t / 120.0)))
    far = 0.5 * (torch.log(alpha) + math.log(2.0 * math.pi) + 1.0) + series
    return torch.where(alpha < _FAR, exact, far)


def _activate(logits: Tensor, activation: str | None) -> Tensor:
    if activation == "softplus":
        return F.softplus(logits, threshold=40.0)  # torch's default of 20 errs by 2e-9
    if activation == "exp":
        return logits.clamp(-10.0, 10.0).exp()
    return logits.relu()


def _probabilities(target: Tensor, classes: int) -> Tensor:
    """Return the (B, C) probabilities of a target; all 0 for a label that is no class."""
    if target.dim() == 2:
        return target
    return target.unsqueeze(1) == torch.arange(classes, device=target.device)


def _wide(values: Tensor) -> Tensor:
    """Convert values to at least float32: products over views exceed half precision."""
    return values if values.dtype == torch.float64 else values.float()


def _keep(values: Tensor, present: Tensor | None) -> Tensor:
    """Return the values of present views, 0 for the others, even if they are NaN."""
    return values if present is None else torch.where(present.unsqueeze(-1), values, 0.0)
