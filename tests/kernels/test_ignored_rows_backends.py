"""Ignored rows change nothing in any backend, even if they hold NaN or infinity.

Without a GPU this runs the reference and the C++ implementation; ``TRITON_INTERPRET=1 pytest <this
file>`` the Triton one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mics_kernels as mk
from tests.kernels.implementations import BACKENDS, device_of

B, C, D = 6, 5, 8
FILL = [float("nan"), float("inf")]
Step = Callable[[float, str, str], list[Tensor]]


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spoiled(x: Tensor, ignored: Tensor, fill: float, device: str) -> Tensor:
    """A copy with ``fill`` in the rows to ignore."""
    return torch.where(ignored.reshape(-1, *[1] * (x.dim() - 1)), fill, x).to(device)


IGNORED = torch.tensor([False, True, False, False, True, False])
LABELS = torch.tensor([0, -1, 2, 3, -1, 4])


def evidential(fill: float, backend: str, device: str) -> list[Tensor]:
    evidence = spoiled(rows(0, B, 2, C).abs(), IGNORED, fill, device).requires_grad_()
    weight = spoiled(rows(1, B).abs(), IGNORED, fill, device)
    options = {"kl_weight": 0.5, "weight": weight, "ignore_index": -1, "backend": backend}
    target = LABELS.to(device)
    loss = mk.evidential_loss(evidence, target, **options)
    fusion = mk.evidential_fusion_loss(evidence, target, **options)
    gradients = torch.autograd.grad(loss + fusion.loss, evidence)
    counted = ~IGNORED.to(device)
    return [loss, fusion.loss, fusion.fused_evidence[counted], *gradients]


def absent_views(fill: float, backend: str, device: str) -> list[Tensor]:
    absent = torch.zeros(B, 2, dtype=torch.bool)
    absent[2, 1] = absent[4, 0] = absent[4, 1] = True
    evidence = torch.where(absent.unsqueeze(2), fill, rows(0, B, 2, C).abs())
    evidence = evidence.to(device).requires_grad_()
    options = {"present": ~absent.to(device), "backend": backend}
    fused = mk.fuse_evidence(evidence, **options)
    target = LABELS.clamp(min=0).to(device)
    fusion = mk.evidential_fusion_loss(evidence, target, kl_weight=0.5, **options)
    gradients = torch.autograd.grad(fused.sum() + fusion.loss, evidence)
    return [fused, fusion.loss, fusion.fused_evidence, *gradients]


def consistency(fill: float, backend: str, device: str) -> list[Tensor]:
    ids = torch.arange(B)
    ids[IGNORED] = -1
    query = spoiled(rows(1, B, D), IGNORED, fill, device).requires_grad_()
    teacher = spoiled(rows(2, B, D), IGNORED, fill, device)
    keys = spoiled(rows(3, B, D), IGNORED, fill, device)
    queue = spoiled(rows(4, 10, D), torch.arange(10) >= 7, fill, device)
    temperature = torch.tensor(0.5, device=device, requires_grad=True)
    loss = mk.consistency_loss(
        query, teacher, keys, queue, temperature=temperature, queue_length=7,
        key_ids=ids.to(device), backend=backend,
    )  # fmt: skip
    return [loss, *torch.autograd.grad(loss, (query, temperature))]


def absent_modalities(fill: float, backend: str, device: str) -> list[Tensor]:
    present = torch.ones(B, 2, dtype=torch.bool)
    present[IGNORED, 0] = False
    query = spoiled(rows(1, B, D), IGNORED, fill, device).requires_grad_()
    teacher = spoiled(rows(2, B, D), IGNORED, fill, device)
    other = rows(3, B, D).to(device).requires_grad_()
    loss = mk.multimodal_consistency_loss(
        [query, other], [teacher, other.detach()], temperature=0.5, present=present.to(device),
        backend=backend,
    )  # fmt: skip
    return [loss, *torch.autograd.grad(loss, (query, other))]


def moments(fill: float, backend: str, device: str) -> list[Tensor]:
    features = spoiled(rows(0, B, D), IGNORED, fill, device)
    weight = spoiled(rows(1, B).abs(), IGNORED, fill, device)
    labels = LABELS.to(device)
    by_label = mk.class_moments(features, labels, C, weight=weight, backend=backend)
    nothing = torch.where(IGNORED, 0.0, 1.0).to(device)
    posteriors = rows(2, B, C).softmax(1).to(device)
    by_weight = mk.class_moments(features, posteriors, C, weight=nothing, backend=backend)
    return [*by_label, *by_weight]


def shift(fill: float, backend: str, device: str) -> list[Tensor]:
    features, labels = rows(0, B, D).to(device), LABELS.to(device)
    strength = spoiled(rows(1, B).abs(), IGNORED, fill, device)
    seed = torch.tensor([1, 2], device=device)
    options = {"strength": strength, "seed": seed, "backend": backend}
    moved = mk.shift_features(features, labels, rows(2, C, D).square().to(device), **options)
    along = rows(3, C, 2, D).to(device)
    return [moved, mk.shift_features(features, labels, None, directions=along, **options)]


def bound(fill: float, backend: str, device: str) -> list[Tensor]:
    logits = spoiled(rows(0, B, C), IGNORED, fill, device).requires_grad_()
    weight = rows(1, C, D).to(device).requires_grad_()
    variance = rows(2, C, D).square().to(device)
    strength = spoiled(rows(3, B).abs(), IGNORED, fill, device)
    loss = mk.shifted_cross_entropy(
        logits, LABELS.to(device), weight, variance, strength=strength, backend=backend
    )
    return [loss, *torch.autograd.grad(loss, (logits, weight))]


STEPS: list[Step] = [
    evidential, absent_views, consistency, absent_modalities, moments, shift, bound,
]  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("fill", FILL)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_what_ignored_rows_hold_changes_nothing(step: Step, fill: float, backend: str) -> None:
    device = device_of(backend)
    with_fill, with_zeros = (step(value, backend, device) for value in (fill, 0.0))
    for ours, wanted in zip(with_fill, with_zeros, strict=True):
        assert torch.equal(ours, wanted)
