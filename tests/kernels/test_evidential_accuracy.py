"""Float32 against 40 digits: KL, its gradient and fusion, over nine decades of evidence.

``python tests/kernels/test_evidential_accuracy.py`` prints the table of the operator's README.
"""

from __future__ import annotations

import functools
import os

import mpmath
import pytest
import torch
from torch import Tensor

from mics_kernels import evidential_loss, fuse_evidence

CLASSES = (2, 8, 23, 1000)
SCALES = (1e-3, 0.05, 1.0, 20.0, 400.0, 8e3, 1.06e5)
GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] * (GPU or INTERPRETED) + ["cuda"] * GPU + ["cpu"] * (not INTERPRETED)


def evidence_of(classes: int, scale: float, rows: int) -> Tensor:
    """Rows of evidence within a factor of 1.5 of ``scale``, from below and from above."""
    generator = torch.Generator().manual_seed(classes)
    spread = torch.rand(rows, classes, generator=generator)
    return scale * (1.0 + 0.5 * spread)


@functools.cache
def truth(classes: int, scale: float) -> tuple[Tensor, Tensor]:
    """KL(Dirichlet(1 + e) || Dirichlet(1)) and its gradient in 40 digits, rounded to float64."""
    mpmath.mp.dps = 40
    values, slopes = [], []
    for row in evidence_of(classes, scale, _rows(classes)).tolist():
        alpha = [1 + mpmath.mpf(e) for e in row]
        strength = mpmath.fsum(alpha)
        psi, psi1 = mpmath.digamma(strength), mpmath.psi(1, strength)
        value = mpmath.loggamma(strength) - mpmath.loggamma(classes)
        value += mpmath.fsum(
            (a - 1) * (mpmath.digamma(a) - psi) - mpmath.loggamma(a) for a in alpha
        )
        values.append(float(value))
        common = (strength - classes) * psi1
        slopes.append([float((a - 1) * mpmath.psi(1, a) - common) for a in alpha])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)


def _rows(classes: int) -> int:
    return 2 if classes == 1000 else 8


def ours(classes: int, scale: float, device: str, backend: str) -> tuple[Tensor, Tensor]:
    """KL and its gradient: a target without any class leaves nothing else of the loss."""
    evidence = evidence_of(classes, scale, _rows(classes)).to(device).requires_grad_()
    nothing = torch.zeros_like(evidence)
    loss = evidential_loss(evidence, nothing, kl_weight=1.0, reduction="none", backend=backend)
    (slope,) = torch.autograd.grad(loss.sum(), evidence)
    return loss.detach().double().cpu(), slope.double().cpu()


def textbook(classes: int, scale: float) -> tuple[Tensor, Tensor]:
    """The formula as published, in float32 throughout."""
    evidence = evidence_of(classes, scale, _rows(classes)).requires_grad_()
    alpha = evidence + 1.0
    strength = alpha.sum(1, keepdim=True)
    first = torch.lgamma(strength).squeeze(1) - torch.lgamma(alpha).sum(1)
    first = first - torch.lgamma(torch.tensor(float(classes)))
    loss = first + ((alpha - 1.0) * (torch.digamma(alpha) - torch.digamma(strength))).sum(1)
    (slope,) = torch.autograd.grad(loss.sum(), evidence)
    return loss.detach().double(), slope.double()


def _device(backend: str) -> str:
    return "cuda" if GPU and backend != "cpu" else "cpu"


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_and_its_gradient_are_exact_in_float32(backend: str, classes: int) -> None:
    device = _device(backend)
    for scale in SCALES:
        kl, slope = truth(classes, scale)
        our_kl, our_slope = ours(classes, scale, device, backend)
        error = (our_kl - kl).abs()
        if scale >= 1.0:
            assert (error / kl).max() <= 2e-6, scale
        else:
            assert error.max() <= 5e-4, scale
        assert (our_slope - slope).abs().max() <= 3e-7, scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_evidence_is_exact_in_float32(backend: str) -> None:
    device = _device(backend)
    for scale in SCALES:
        evidence = torch.stack([evidence_of(c, scale, 4)[:, :8] for c in (8, 9, 10)], dim=1)
        exact = 8.0 * (torch.prod(1.0 + evidence.double() / 8.0, dim=1) - 1.0)
        fused = fuse_evidence(evidence.to(device), backend=backend).double().cpu()
        assert ((fused - exact).abs() / exact).max() <= 1e-6, scale


def main() -> None:
    """Print the README's table for the C++ backend."""
    print("| C | evidence | KL | error: ours | textbook | gradient error: ours | textbook |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for classes in CLASSES:
        for scale in SCALES:
            kl, slope = truth(classes, scale)
            errors = []
            for results in (ours(classes, scale, "cpu", "cpu"), textbook(classes, scale)):
                errors.append(((results[0] - kl).abs().max(), (results[1] - slope).abs().max()))
            (our_kl, our_slope), (their_kl, their_slope) = errors
            print(
                f"| {classes} | {scale:g} | {kl.mean():.3g} | {our_kl:.1e} | {their_kl:.1e} "
                f"| {our_slope:.1e} | {their_slope:.1e} |"
            )


if __name__ == "__main__":
    main()
