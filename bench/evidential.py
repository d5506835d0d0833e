"""Time the evidential operators: forward + gradient, every implementation in one run.

Beside the reference (float64 inside) stands the textbook formula in float32, the code a user would
have written: cheaper, and less exact. How it is timed: timing.py.

    python bench/evidential.py [--device cuda] [--quick] [--threads N] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Step, rows_of, run, take_turns
from torch import Tensor

from mics_kernels import evidential_fusion_loss, evidential_loss, fuse_evidence
from mics_kernels.backends import explain

SHAPES = ((8192, 3, 8), (2048, 3, 1000))


def textbook_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Softplus, Dempster's rule in closed form, the published loss: float32 throughout."""
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


def losses_of(operator: str, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is compared, by name: (logits (B, V, C), target (B,)) -> loss."""

    def of(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        if operator == "fuse_evidence":
            return lambda x, y: fuse_evidence(x, backend=backend).mean()
        if operator == "evidential_loss":
            return lambda x, y: evidential_loss(x, y, kl_weight=0.5, backend=backend)
        return lambda x, y: evidential_fusion_loss(x, y, kl_weight=0.5, backend=backend).loss

    names = ["cpu"] if device.type == "cpu" else ["triton", "cuda"]
    found = {}
    for name in names:
        try:
            explain("evidential", torch.empty(0, device=device), name)
            found[name] = of(name)
        except RuntimeError as error:
            print(f"{name}: not measured ({error})")
    found["reference"] = of("reference")
    found["reference, compiled"] = torch.compile(of("reference"), fullgraph=True)
    if operator == "evidential_fusion_loss":
        found["textbook float32"] = textbook_loss
        found["textbook, compiled"] = torch.compile(textbook_loss, fullgraph=True)
    return found


def step_of(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Step:
    """One call: loss and gradient."""
    return lambda: torch.autograd.grad(loss(logits, target), logits)[0]


def steps_of(operator: str, shape: tuple[int, int, int], device: torch.device) -> dict[str, Step]:
    """One call of each implementation on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    if operator != "evidential_fusion_loss":
        logits = logits.exp()  # evidence
    logits = logits.to(device).requires_grad_()
    target = torch.randint(shape[2], shape[:1], generator=generator).to(device)
    losses = losses_of(operator, device)
    return {name: step_of(loss, logits, target) for name, loss in losses.items()}


def table(device: torch.device, budget: float) -> list[dict[str, object]]:
    """Measure everything; one row for each operator, shape and implementation."""
    rows: list[dict[str, object]] = []
    for operator in ("evidential_fusion_loss", "evidential_loss", "fuse_evidence"):
        for shape in SHAPES:
            torch._dynamo.reset()
            times, cores = take_turns(steps_of(operator, shape, device), device, budget)
            label: dict[str, object] = {"operator": operator, "shape": "x".join(map(str, shape))}
            rows += rows_of(label, times, cores)
    return rows


if __name__ == "__main__":
    run(__doc__.splitlines()[0], table)
