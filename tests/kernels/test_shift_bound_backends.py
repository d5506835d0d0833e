"""Every fast implementation of the shifted cross-entropy, a bound, against the float64 reference.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mics_kernels import shifted_cross_entropy
from tests.kernels.implementations import INTERPRETED, ROUNDING, device_of, moved_to
from tests.kernels.properties import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Bound:
    logits: Tensor
    target: Tensor
    weight: Tensor
    variance: Tensor | None
    strength: float | Tensor
    directions: Tensor | None
    reduction: str


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, dim = draw(st.integers(0, 40)), 12
    classes = draw(st.sampled_from([2, 3, 8, 23] + ([] if INTERPRETED else [100, 1100])))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits = (5 * torch.randn(rows, classes, generator=generator)).to(dtype)
    target = torch.randint(-1, classes, (rows,), generator=generator)
    logits[target < 0] = float("nan")  # ignored
    weight = 0.3 * torch.randn(classes, dim, generator=generator)
    strength: float | Tensor = 0.7
    if draw(st.booleans()):
        strength = torch.rand(rows, generator=generator)
    directions = None
    if draw(st.booleans()):
        directions = torch.randn(classes, 3, dim, generator=generator)
    variance = torch.rand(classes, dim, generator=generator) if directions is None else None
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    return Bound(logits, target, weight, variance, strength, directions, reduction)


def solve_bound(problem: Bound, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Loss, and gradients of logits and weight for a grad_out that is not 1."""
    device = device_of(backend)
    arguments = moved_to(device, vars(problem))
    logits = problem.logits.to(device=device, dtype=dtype).detach().requires_grad_()
    weight = problem.weight.to(device=device, dtype=dtype).detach().requires_grad_()
    arguments |= {"logits": logits, "weight": weight}
    loss = shifted_cross_entropy(**arguments, backend=backend)
    outer = torch.linspace(0.5, 1.5, loss.numel(), device=device).reshape(loss.shape)
    gradients = torch.autograd.grad(loss, (logits, weight), outer.to(loss.dtype))
    assert loss.dtype == (dtype or torch.float32)
    return [loss.detach().cpu(), *(g.cpu() for g in gradients)]


@examples(60, interpreted=15)
@given(problem=bounds())
def test_the_bound_and_its_gradients_agree_with_the_float64_reference(
    backend: str, problem: Bound
) -> None:
    ours = solve_bound(problem, backend)
    exact = solve_bound(problem, "reference", torch.float64)
    assert ours[1].dtype == problem.logits.dtype
    rounding = ROUNDING[problem.logits.dtype]
    for part, wanted, relative in zip(ours, exact, (1e-6, rounding, rounding), strict=True):
        largest = wanted.abs().max() if wanted.numel() else 0.0
        error = (part.double() - wanted).abs()
        assert (error <= relative * (wanted.abs() + 4 * largest) + 1e-7).all(), error.max()


def test_a_batch_without_any_counted_row_has_loss_zero(backend: str) -> None:
    for rows in (0, 3):
        target = torch.full((rows,), -1)
        problem = Bound(
            torch.randn(rows, 4), target, torch.randn(4, 5), torch.rand(4, 5), 0.5, None, "mean"
        )
        loss, of_logits, of_weight = solve_bound(problem, backend)
        assert loss == 0.0 and not of_logits.any() and not of_weight.any()


def test_a_double_backward_is_refused_in_words(backend: str) -> None:
    device = device_of(backend)
    logits = torch.randn(3, 4, device=device, requires_grad=True)
    loss = shifted_cross_entropy(
        logits, torch.zeros(3, dtype=torch.int64, device=device), torch.rand(4, 5, device=device),
        torch.rand(4, 5, device=device), strength=0.5, backend=backend,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)
