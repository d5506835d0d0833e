"""Evidential operators: loss or fusion, with gradient.

The reference computes in float64. "textbook" is the published formula in float32, as a user would
write it: cheaper and less accurate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import roofline
from bench.case import Case, Rival, Rivals, close, own_backends
from mics_kernels import evidential_fusion_loss, evidential_loss, fuse_evidence

SHAPES = ((8192, 3, 8), (2048, 3, 1000))
OPERATORS = ("evidential_fusion_loss", "evidential_loss", "fuse_evidence")
EXACT, TEXTBOOK = 1e-5, 1e-3  # allowed difference from the reference, of the largest element
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits or evidence (B, V, C), target (B,)) -> 0-d."""


def cases(device: torch.device) -> list[Case]:
    """List every operator at every size."""
    return [
        Case(
            operator,
            " x ".join(map(str, shape)),
            roofline.evidential(
                *shape,
                fuse=operator != "evidential_loss",
                judge=operator != "fuse_evidence",
            ),
            partial(rivals, operator, shape),
            batch=shape[0],
        )
        for operator in OPERATORS
        for shape in SHAPES
    ]


def textbook_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute softplus, Dempster's rule in closed form and the published loss in float32."""
    evidence = torch.nn.functional.softplus(logits)
    classes = logits.shape[2]
    fused = classes * (torch.prod(1.0 + evidence / classes, dim=1) - 1.0)
    opinions = torch.cat([evidence, fused.unsqueeze(1)], dim=1)
    right = torch.nn.functional.one_hot(target, classes).unsqueeze(1)
    alpha = opinions + 1.0
    strength = alpha.sum(2, keepdim=True)
    expected = (right * (torch.digamma(strength) - torch.digamma(alpha))).sum(2)
    cleared = opinions * (1 - right) + 1.0
    total = cleared.sum(2, keepdim=True)
    kl = torch.lgamma(total).squeeze(2) - torch.lgamma(cleared).sum(2)
    kl = kl - torch.lgamma(torch.tensor(float(classes), device=logits.device))
    kl = kl + ((cleared - 1.0) * (torch.digamma(cleared) - torch.digamma(total))).sum(2)
    return (expected + 0.5 * kl).sum(1).mean()


def loss_of(operator: str, backend: str) -> Loss:
    """Wrap the operator itself."""
    if operator == "fuse_evidence":
        return lambda x, y: fuse_evidence(x, backend=backend).mean()
    if operator == "evidential_loss":
        return lambda x, y: evidential_loss(x, y, kl_weight=0.5, backend=backend)
    return lambda x, y: evidential_fusion_loss(x, y, kl_weight=0.5, backend=backend).loss


def rivals(operator: str, shape: tuple[int, int, int], device: torch.device, tiny: bool) -> Rivals:
    """Make implementations on the same inputs; a step computes loss and gradient."""
    values, target = inputs(operator, shape, device, tiny)

    def rival(loss: Loss, tolerance: float = EXACT, **about: bool) -> Rival:
        def step() -> tuple[Tensor, Tensor]:
            result = loss(values, target)
            return result.detach(), torch.autograd.grad(result, values)[0]

        def check(result: Any) -> None:
            close(result, true, tolerance)

        return Rival(step, check, lambda leaf: loss(leaf, target).backward(), **about)

    names, absent = own_backends("evidential", device)
    reference = loss_of(operator, "reference")
    found = {name: rival(loss_of(operator, name), ours=True) for name in names} | {
        "reference": rival(reference),
        "reference, compiled": rival(torch.compile(reference, fullgraph=True), compiled=True),
    }
    if operator == "evidential_fusion_loss":
        compiled = torch.compile(textbook_loss, fullgraph=True)
        found["textbook float32"] = rival(textbook_loss, TEXTBOOK)
        found["textbook, compiled"] = rival(compiled, TEXTBOOK, compiled=True)
    true = found["reference"].step()
    return Rivals(lambda: (values.detach() * 1.0).requires_grad_(), found, absent)


def inputs(
    operator: str, shape: tuple[int, int, int], device: torch.device, tiny: bool
) -> tuple[Tensor, Tensor]:
    """Draw logits for the fusion loss, evidence for the others, (B, V, C); labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    batch, views, classes = (1 if tiny else shape[0]), *shape[1:]
    values = torch.randn(batch, views, classes, generator=generator)
    if operator != "evidential_fusion_loss":
        values = values.exp()
    target = torch.randint(classes, (batch,), generator=generator)
    return values.to(device).requires_grad_(), target.to(device)
