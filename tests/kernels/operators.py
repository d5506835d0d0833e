"""Each operator as a function of one input that gets a gradient, and an example of that input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mics_kernels as mk

Loss = Callable[[Tensor, str | None], Tensor]


def _unit(seed: int, rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


LABELS = torch.tensor([0, 1, 2, 3])
WEIGHT, VARIANCE, EVIDENCE = _unit(1, 5), _unit(2, 5).square(), _unit(3, 5).abs().reshape(4, 2, 5)
TEACHER, KEYS, QUEUE = _unit(4, 4), _unit(5, 4), _unit(6, 9)
SEED = torch.tensor([1, 2])


def _fusion_loss(x: Tensor, backend: str | None) -> Tensor:
    return mk.evidential_fusion_loss(x, LABELS, kl_weight=0.5, backend=backend).loss


def _loss(x: Tensor, backend: str | None) -> Tensor:
    return mk.evidential_loss(x, LABELS, kl_weight=0.5, backend=backend)


def _fuse(x: Tensor, backend: str | None) -> Tensor:
    return mk.fuse_evidence(x, backend=backend).square().sum()


def _consistency(x: Tensor, backend: str | None) -> Tensor:
    return mk.consistency_loss(x, TEACHER, KEYS, QUEUE, temperature=0.1, backend=backend)


def _multimodal(x: Tensor, backend: str | None) -> Tensor:
    return mk.multimodal_consistency_loss(
        [x, TEACHER], [TEACHER, KEYS], [QUEUE, QUEUE], temperature=0.1, queue_lengths=[3, 9],
        backend=backend,
    )  # fmt: skip


def _bound(x: Tensor, backend: str | None) -> Tensor:
    return mk.shifted_cross_entropy(x, LABELS, WEIGHT, VARIANCE, strength=0.5, backend=backend)


def _shift(x: Tensor, backend: str | None) -> Tensor:
    options = {"strength": 0.5, "seed": SEED, "backend": backend}
    return mk.shift_features(x, LABELS, VARIANCE, **options).square().sum()


OPERATORS: dict[str, tuple[Loss, Tensor]] = {
    "evidential_fusion_loss": (_fusion_loss, EVIDENCE - 0.2),
    "evidential_loss": (_loss, EVIDENCE),
    "fuse_evidence": (_fuse, EVIDENCE),
    "consistency_loss": (_consistency, _unit(7, 4)),
    "multimodal_consistency_loss": (_multimodal, _unit(7, 4)),
    "shifted_cross_entropy": (_bound, _unit(8, 4)[:, :5]),
    "shift_features": (_shift, _unit(9, 4)),
}
