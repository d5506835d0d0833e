"""Every fast implementation of the feature shift against the float64 reference.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mics_kernels import shift_features
from mics_kernels.philox import normals
from tests.kernels.implementations import (
    BACKENDS,
    INTERPRETED,
    ROUNDING,
    device_of,
    moved_to,
    on_device,
)
from tests.kernels.properties import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SEED = (2**40 + 17, 5)


@dataclass
class Shift:
    features: Tensor
    target: Tensor
    variance: Tensor | None
    strength: float | Tensor
    row_ids: Tensor | None
    directions: Tensor | None


@st.composite
def shifts(draw: st.DrawFn) -> Shift:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, classes = draw(st.integers(0, 40)), draw(st.sampled_from([1, 2, 5, 17]))
    dim = draw(st.sampled_from([1, 3, 4, 17, 64, 100, 129] + ([] if INTERPRETED else [768])))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    features = torch.randn(rows, dim, generator=generator).to(dtype)
    if draw(st.booleans()):
        target = torch.softmax(3 * torch.randn(rows, classes, generator=generator), dim=1)
    else:
        target = torch.randint(-1, classes, (rows,), generator=generator)
        features[target < 0, :1] = float("nan")  # left alone
    strength: float | Tensor = 0.7
    if draw(st.booleans()):
        strength = torch.rand(rows, generator=generator)
    ids = torch.randint(-(2**40), 2**40, (rows,), generator=generator)
    directions = None
    if draw(st.booleans()):
        rank = draw(st.sampled_from([1, 3, 4, 6, 33]))
        directions = torch.randn(classes, rank, dim, generator=generator)
    variance = torch.rand(classes, dim, generator=generator) if directions is None else None
    row_ids = ids if draw(st.booleans()) else None
    return Shift(features, target, variance, strength, row_ids, directions)


def solve_shift(problem: Shift, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    device = device_of(backend)
    arguments = moved_to(device, vars(problem))
    features = on_device(problem.features, device, dtype)
    seed = torch.tensor(SEED, device=device)
    return shift_features(**{**arguments, "features": features}, seed=seed, backend=backend).cpu()


@examples(60, interpreted=15)
@given(problem=shifts())
def test_the_shift_agrees_with_the_float64_reference(backend: str, problem: Shift) -> None:
    ours = solve_shift(problem, backend)
    exact = solve_shift(problem, "reference", torch.float64)
    assert ours.dtype == problem.features.dtype
    alone = torch.zeros(len(ours), dtype=torch.bool)
    if problem.target.dim() == 1:
        alone = problem.target < 0
    torch.testing.assert_close(ours[alone], problem.features[alone], rtol=0, atol=0, equal_nan=True)
    # Noise of size 4 (directions: a sum of 33) whose parts are right to 1e-6 of their size.
    error = (ours.double() - exact)[~alone].abs()
    assert (error <= ROUNDING[ours.dtype] * exact[~alone].abs() + 4e-6).all(), error.max()


def test_the_gradient_is_the_identity_and_nothing_is_saved(backend: str) -> None:
    saved = []
    features = torch.randn(4, 6, device=device_of(backend), requires_grad=True)
    target = torch.tensor([0, -1, 1, 0], device=features.device)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        moved = shift_features(
            features, target, torch.rand(2, 6, device=features.device), strength=0.5,
            seed=torch.tensor(SEED, device=features.device), backend=backend,
        )  # fmt: skip
    outer = torch.randn_like(features)
    assert torch.equal(torch.autograd.grad(moved, features, outer)[0], outer)
    assert saved == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_misaligned_features_give_the_same_bits(
    backend: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(9) % 3
    plain = torch.randn(9, 64, generator=generator).to(dtype)
    variance = torch.rand(3, 64, generator=generator)
    expected = solve_shift(Shift(plain, target, variance, 0.5, None, None), backend)
    storage = torch.empty(plain.numel() + 1, dtype=dtype)[1:]
    for features in (plain.T.contiguous().T, storage.copy_(plain.flatten()).view_as(plain)):
        other = solve_shift(Shift(features, target, variance, 0.5, None, None), backend)
        assert torch.equal(other, expected)


def test_low_rank_noise_has_exactly_the_covariance_of_the_directions(backend: str) -> None:
    """One normal at a time: the noise is linear in them, so its covariance is R^T R / r."""
    rank, dim, rows = 6, 5, 500 if INTERPRETED else 20_000
    directions = torch.randn(2, rank, dim, generator=torch.Generator().manual_seed(0))
    target = torch.ones(rows, dtype=torch.int64)
    noise = solve_shift(Shift(torch.zeros(rows, dim), target, None, 1.0, None, directions), backend)
    draws = normals(torch.tensor(SEED), torch.arange(rows), rank)
    wanted = draws @ directions[1].double() / rank**0.5
    torch.testing.assert_close(noise.double(), wanted, rtol=1e-6, atol=4e-6)
    covariance = directions[1].T @ directions[1] / rank
    largest = covariance.diagonal().max().item()
    assert (torch.cov(noise.T) - covariance).abs().max() < 5 * largest * math.sqrt(2 / rows)
    # Posteriors mix the covariances: every class draws normals of its own.
    shares = torch.tensor([[0.3, 0.7]]).repeat(rows, 1)
    noise = solve_shift(Shift(torch.zeros(rows, dim), shares, None, 1.0, None, directions), backend)
    mixed = 0.3 * directions[0].T @ directions[0] / rank + 0.7 * covariance
    assert (torch.cov(noise.T) - mixed).abs().max() < 5 * largest * math.sqrt(2 / rows)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton on a GPU or interpreted")
def test_the_tile_does_not_change_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Shift(torch.randn(9, 100), torch.arange(9) % 3, torch.rand(3, 100), 0.5, None, None)
    whole = solve_shift(problem, "triton")
    for rows, columns in ((1, 16), (4, 64), (16, 128)):
        tile = {"D": 100, "R": rows, "K": columns}
        shift_blocks = "mics_kernels.shift.triton_shift.shift_blocks"
        monkeypatch.setattr(shift_blocks, lambda dim, tile=tile: tile)
        assert torch.equal(solve_shift(problem, "triton"), whole)
