"""Call the operators with every class of shapes on the stand-in for a GPU; print what is launched.

Run as a program: the stand-in cannot be undone.
"""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.stub import install
from mics_kernels import (
    ClassStatistics,
    class_moments,
    consistency_loss,
    evidential_fusion_loss,
    fuse_evidence,
    multimodal_consistency_loss,
    shift_features,
    shifted_cross_entropy,
)
from mics_kernels.triton_common import compiled_for

GENERATOR = torch.Generator().manual_seed(0)
SEED = torch.tensor([17, 0])


def unit(rows: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normalised rows."""
    numbers = torch.randn(rows, dim, generator=GENERATOR)
    return torch.nn.functional.normalize(numbers, dim=1).to(dtype)


def misaligned(x: Tensor) -> Tensor:
    """The same values, one element past an aligned address."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].copy_(x.flatten()).view_as(x)


def views(
    batch: int, count: int = 2, queue: int = 300, dtype: torch.dtype = torch.bfloat16, **given: Any
) -> Callable[[], object]:
    """The loss of several views, and its gradients."""
    features = [unit(batch, dtype=dtype).requires_grad_() for _ in range(count)]
    teachers = [unit(batch, dtype=dtype) for _ in range(count)]
    queues = [unit(queue, dtype=dtype) for _ in range(count)] if queue else None

    def call() -> object:
        loss = multimodal_consistency_loss(features, teachers, queues, temperature=0.07, **given)
        return torch.autograd.grad(loss, features)

    return call


def consistency() -> dict[str, Callable[[], object]]:
    """The consistency losses."""
    ids = {
        "key_ids": torch.arange(40),
        "queue_ids": [torch.arange(300)] * 2,
        "queue_lengths": [torch.tensor(100)] * 2,
        "present": torch.ones(40, 2, dtype=torch.bool),
    }
    query, keys, queue = unit(40).requires_grad_(), unit(50), misaligned(unit(300))
    return {
        "two views": views(40),
        "three views": views(40, count=3),
        "one row": views(1),
        "no row": views(0),
        "no queue": views(40, queue=0),
        "float32": views(40, dtype=torch.float32),
        "ids": views(40, **ids),
        "one direction": lambda: torch.autograd.grad(
            consistency_loss(query, unit(40), keys, temperature=0.07), query
        ),
        "misaligned": lambda: consistency_loss(
            misaligned(query.detach()), misaligned(unit(40)), keys, queue, temperature=0.07
        ),
    }


def evidential() -> dict[str, Callable[[], object]]:
    """The evidential operators."""

    def fusion(rows: int, classes: int, soft: bool = False, **given: Any) -> Callable[[], object]:
        logits = torch.randn(rows, 3, classes, generator=GENERATOR).requires_grad_()
        target = torch.arange(rows) % classes
        if soft:
            target = torch.full((rows, classes), 1 / classes)
        return lambda: torch.autograd.grad(
            evidential_fusion_loss(logits, target, kl_weight=0.5, **given).loss.sum(), logits
        )

    evidence = torch.rand(37, 3, 8).requires_grad_()
    return {
        "fusion loss": fusion(37, 8),
        "fusion loss, 300 classes": fusion(37, 300),
        "fusion loss, probabilities": fusion(37, 8, soft=True),
        "fusion loss, by row": fusion(37, 8, reduction="none"),
        "fusion loss, no row": fusion(0, 8),
        "fuse": lambda: torch.autograd.grad(fuse_evidence(evidence).sum(), evidence),
    }


def shift() -> dict[str, Callable[[], object]]:
    """The shift, the moments and the bound."""
    x, target, variance = torch.randn(37, 96), torch.arange(37) % 5, torch.rand(5, 96)
    directions, posteriors = torch.randn(5, 3, 96), torch.full((37, 5), 0.2)
    statistics = ClassStatistics(5, 96, momentum=0.01)

    def bound(rows: int, classes: int, **given: Any) -> Callable[[], object]:
        logits = torch.randn(rows, classes).requires_grad_()
        weight, spread = torch.randn(classes, 96).requires_grad_(), torch.rand(classes, 96)
        labels = torch.arange(rows) % classes
        return lambda: torch.autograd.grad(
            shifted_cross_entropy(logits, labels, weight, spread, strength=0.5, **given),
            [logits, weight],
        )

    def moved(x: Tensor, target: Tensor, **given: Any) -> Callable[[], object]:
        table = None if "directions" in given else variance
        return lambda: shift_features(x, target, table, strength=0.5, seed=SEED, **given)

    return {
        "shift": moved(x, target),
        "shift, posteriors": moved(x, posteriors),
        "shift, directions": moved(x, target, directions=directions),
        "shift, misaligned": moved(misaligned(x.bfloat16()), target),
        "shift, no row": moved(x[:0], target[:0]),
        "moments": lambda: class_moments(x, target, 5),
        "moments, posteriors": lambda: class_moments(x, posteriors, 5),
        "update": lambda: statistics.update(x, target),
        "update, posteriors": lambda: statistics.update(x, posteriors),
        "bound": bound(37, 5),
        "bound, many rows": bound(1000, 5),
        "bound, many classes": bound(37, 40),
        "bound, directions": bound(37, 5, directions=directions),
    }


@triton.jit(do_not_specialize=["loose"])
def probe_kernel(x, several, length, loose, factor, N: tl.constexpr):
    """Take an argument of every kind."""
    slot = tl.arange(0, N)
    total = tl.load(x + slot).to(tl.float32) * factor + tl.load(several[0] + slot)
    tl.store(several[0] + slot, total, mask=slot < length + loose)


def check_that_launches_choose_as_triton_does() -> None:
    """In any order of arguments, the compiled kernel is the one that Triton would launch."""
    pair = (torch.zeros(16), torch.zeros(16))
    arguments = list(
        product(
            (torch.zeros(16), misaligned(torch.zeros(16)), torch.zeros(16).bfloat16()),
            (pair, (misaligned(pair[0]), pair[1])),
            (1, 2, 16, 2**40),
            (1, 16, 2**40),
            (0.5, 1.0),
        )
    )
    for _ in range(2):
        for given in arguments:
            compiled, values = compiled_for(probe_kernel, (1,), given, {"N": 16, "num_warps": 1})
            assert compiled is probe_kernel[(1,)](*given, N=16, num_warps=1), given
            assert values == (16,)


def main() -> None:
    """One JSON object: name of the call -> its launches."""
    stub = install()
    check_that_launches_choose_as_triton_does()
    found = {}
    for name, call in (consistency() | evidential() | shift()).items():
        with stub.launches() as first:  # compiles
            call()
        with stub.launches() as launches:  # finds what was compiled
            call()
        assert first == launches, name
        found[name] = [astuple(launch) for launch in launches]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
