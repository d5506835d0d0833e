"""Every fast implementation of shift, moments and shifted cross-entropy against float64.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mics_kernels import class_moments, merge_moments, shift_features, shifted_cross_entropy
from mics_kernels.backends import explain
from mics_kernels.philox import normals, philox4x32

if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    import triton
    import triton.language as tl

    from mics_kernels.shift import triton_kernels

    philox = triton_kernels.philox

    @triton.jit
    def words_kernel(key, counters, words, n, K: tl.constexpr):
        """counters (4, n) int64 -> words (4, n) int64."""
        i = tl.program_id(0) * K + tl.arange(0, K)
        c0 = tl.load(counters + i, mask=i < n).to(tl.uint32)
        c1 = tl.load(counters + n + i, mask=i < n).to(tl.uint32)
        c2 = tl.load(counters + 2 * n + i, mask=i < n).to(tl.uint32)
        c3 = tl.load(counters + 3 * n + i, mask=i < n).to(tl.uint32)
        w0, w1, w2, w3 = philox(tl.load(key), c0, c1, c2, c3)
        tl.store(words + i, w0.to(tl.int64), mask=i < n)
        tl.store(words + n + i, w1.to(tl.int64), mask=i < n)
        tl.store(words + 2 * n + i, w2.to(tl.int64), mask=i < n)
        tl.store(words + 3 * n + i, w3.to(tl.int64), mask=i < n)


GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] * (GPU or INTERPRETED) + ["cpu"] * (not INTERPRETED)
EXAMPLES = 15 if INTERPRETED or GPU else 60  # a GPU compiles kernels for each: seconds
PROPERTY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# The largest error of a normal measured in 1e6 draws is 7e-7.
NORMAL_TOLERANCE = 2e-6
# A half-precision result is rounded once, to 8 or 11 bits; Triton's interpreter cuts bfloat16 off.
BFLOAT16 = 2.0**-7 if INTERPRETED else 2.0**-8
ROUNDING = {torch.float32: 4e-7, torch.bfloat16: BFLOAT16, torch.float16: 2.0**-11}
SEED = (2**40 + 17, 5)


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend == "triton" else "cpu"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN: what a kernel forgets to write shows."""
    fresh, like = Tensor.new_empty, torch.empty_like

    def poison(made: Tensor) -> Tensor:
        return made.fill_(float("nan")) if made.is_floating_point() else made

    def new_empty(self: Tensor, *size: object, **options: object) -> Tensor:
        return poison(fresh(self, *size, **options))

    def empty_like(*args: object, **options: object) -> Tensor:
        return poison(like(*args, **options))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


def moved_to(device: str, values: dict[str, object]) -> dict[str, object]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}


# --- Random numbers ---


def reference_words(seed: int, offset: int, row: int, draws: int) -> Tensor:
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    counter = (torch.arange(draws), row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, offset)
    return torch.stack(torch.broadcast_tensors(*philox4x32(key, counter)), dim=-1)


def native_words(seed: int, offset: int, row: int, draws: int) -> Tensor:
    native = importlib.import_module("mics_kernels._native")
    words = torch.empty(draws, 4, dtype=torch.int32)
    native.philox_words_cpu(seed, offset, row, draws, words.data_ptr())
    return words.long() & 0xFFFFFFFF


def triton_words(key: int, counters: Tensor, tile: int) -> Tensor:
    """(4, n) words of (4, n) counters."""
    device, n = device_of("triton"), counters.shape[1]
    out = torch.empty(4, n, dtype=torch.int64, device=device)
    seed = torch.tensor([key], device=device)
    words_kernel[(triton.cdiv(n, tile),)](seed, counters.to(device), out, n, K=tile)
    return out.cpu()


@pytest.mark.parametrize("key, row, offset", [(0, 0, 0), (-1, -1, -1), (2**40 + 17, 2**35 + 7, 5)])
def test_the_stream_is_bit_for_bit_that_of_the_reference(
    backend: str, key: int, row: int, offset: int
) -> None:
    wanted = reference_words(key, offset, row, 100)
    if backend == "cpu":
        assert torch.equal(native_words(key, offset, row, 100), wanted)
        return
    counters = torch.tensor([[0], [row & 0xFFFFFFFF], [(row >> 32) & 0xFFFFFFFF], [offset]])
    counters = counters.repeat(1, 100)
    counters[0] = torch.arange(100)
    for tile in (16, 64, 256):
        assert torch.equal(triton_words(key, counters, tile).T, wanted)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton on a GPU or interpreted")
def test_a_known_answer_of_random123() -> None:
    counter = torch.tensor([[0x243F6A88], [0x85A308D3], [0x13198A2E], [0x03707344]])
    words = triton_words(0x299F31D0_A4093822, counter, tile=16)
    assert words.flatten().tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def draw(backend: str, rows: int, columns: int, seed: tuple[int, int] = SEED) -> Tensor:
    """(rows, columns) normals, as the shift draws them."""
    device = device_of(backend)
    return shift_features(
        torch.zeros(rows, columns, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.ones(1, columns, device=device),
        strength=1.0,
        seed=torch.tensor(seed, device=device),
        backend=backend,
    ).cpu()


@pytest.mark.parametrize("columns", [1, 7, 64, 100, 768])
@pytest.mark.parametrize("seed", [(0, 0), (-1, 2**32 - 1), SEED])
def test_normals_are_those_of_the_reference(
    backend: str, columns: int, seed: tuple[int, int]
) -> None:
    rows = 8 if INTERPRETED else 500
    exact = normals(torch.tensor(seed), torch.arange(rows), columns)
    assert (draw(backend, rows, columns, seed).double() - exact).abs().max() < NORMAL_TOLERANCE


def test_normals_of_extreme_words_are_right_too(backend: str) -> None:
    """Where u is nearest to 0 and to 1: rows found by search, the law has no say in it."""
    seed = torch.tensor(SEED)
    rows = torch.arange(2_000_000)
    word = philox4x32((seed[0], seed[0] >> 32), (0, rows, 0, SEED[1]))[0]
    extreme = torch.cat([word.topk(20).indices, word.topk(20, largest=False).indices])
    device = device_of(backend)
    moved = shift_features(
        torch.zeros(40, 4, device=device), torch.zeros(40, dtype=torch.int64, device=device),
        torch.ones(1, 4, device=device), strength=1.0, seed=seed.to(device),
        row_ids=extreme.to(device), backend=backend,
    ).cpu().double()  # fmt: skip
    exact = normals(seed, extreme, 4)
    radius, exact_radius = moved[:, :2].norm(dim=1), exact[:, :2].norm(dim=1)
    assert exact_radius.min() < 3e-3 and exact_radius.max() > 5
    assert (moved - exact).abs().max() < NORMAL_TOLERANCE
    assert (radius / exact_radius - 1).abs().max() < 1e-6


def test_ten_million_normals_follow_the_normal_law(backend: str) -> None:
    rows = 130 if INTERPRETED else 13_021
    draws = draw(backend, rows, 768).double()
    n = draws.numel()
    assert scipy.stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    # Standard errors of the first four moments: 1, 2, 15 and 96 over n.
    for power, value, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs(draws.pow(power).mean().item() - value)
        assert error < 4 * math.sqrt(spread / n), power


def test_columns_rows_and_steps_are_independent(backend: str) -> None:
    rows = 200 if INTERPRETED else 20_000
    one, two = draw(backend, rows, 8).double(), draw(backend, rows, 8, (SEED[0], 6)).double()
    bound = 4.5 / math.sqrt(rows)
    for a in (one, one.square() - 1, one * one.roll(1, 1)):
        # Between columns; between a row and the next; between a step and the next.
        correlation = torch.corrcoef(a.T) - torch.eye(8)
        assert correlation.abs().max() < bound
        assert torch.corrcoef(torch.cat([a[:-1].T, a[1:].T]))[:8, 8:].abs().max() < bound
    assert torch.corrcoef(torch.cat([one.T, two.T]))[:8, 8:].abs().max() < bound


def test_row_ids_not_positions_decide_the_noise(backend: str) -> None:
    device = device_of(backend)
    features, target = torch.randn(9, 70, device=device), torch.arange(9, device=device) % 2
    options = {"strength": 0.5, "seed": torch.tensor(SEED, device=device), "backend": backend}
    variance, ids = torch.rand(2, 70, device=device), torch.arange(9, device=device) + 2**33
    whole = shift_features(features, target, variance, row_ids=ids, **options)
    order = torch.tensor([7, 0, 3, 8], device=device)
    part = shift_features(features[order], target[order], variance, row_ids=ids[order], **options)
    assert torch.equal(part, whole[order])
    # Without ids a row is its position: the same rows in another order get other noise.
    plain = shift_features(features, target, variance, **options)
    assert not torch.equal(
        shift_features(features[order], target[order], variance, **options), plain[order]
    )


# --- Shift ---


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
    device = "cpu" if backend == "reference" else device_of(backend)
    arguments = moved_to(device, vars(problem))
    features = problem.features.to(device=device, dtype=dtype)
    seed = torch.tensor(SEED, device=device)
    return shift_features(**{**arguments, "features": features}, seed=seed, backend=backend).cpu()


@PROPERTY
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
    device = device_of(backend)
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
    assert device_of(backend) == device


# --- Moments ---


def numpy_moments(
    features: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and m2 in float64, class by class, in two passes over the rows that count."""
    count = shares.sum(0)
    mean = np.zeros((shares.shape[1], features.shape[1]))
    m2 = np.zeros_like(mean)
    for c, share in enumerate(shares.T):
        rows = features[share > 0]
        if len(rows):
            mean[c] = np.average(rows, axis=0, weights=share[share > 0])
            m2[c] = share[share > 0] @ (rows - mean[c]) ** 2
    return count, mean, m2


def one_hot(target: Tensor, classes: int) -> Tensor:
    return target if target.dim() == 2 else (target[:, None] == torch.arange(classes)).double()


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor | None]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(0, 80 if INTERPRETED else 300))
    classes, dim = draw(st.sampled_from([1, 2, 8, 23])), draw(st.sampled_from([1, 4, 17, 64, 100]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    features = (torch.randn(rows, dim, generator=generator) + 3).to(dtype)
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(rows, generator=generator)
        weight[torch.rand(rows, generator=generator) < 0.2] = 0
        features[weight == 0] = float("nan")  # never read
    if draw(st.booleans()):
        return features, torch.rand(rows, classes, generator=generator).softmax(1), classes, weight
    target = torch.randint(-1, classes, (rows,), generator=generator)
    features[target < 0] = float("nan")  # never read
    return features, target, classes, weight


@PROPERTY
@given(batch=batches())
def test_moments_agree_with_numpy(
    backend: str, batch: tuple[Tensor, Tensor, int, Tensor | None]
) -> None:
    features, target, classes, weight = batch
    device = device_of(backend)
    moved = None if weight is None else weight.to(device)
    ours = class_moments(
        features.to(device), target.to(device), classes, weight=moved, backend=backend
    )
    shares = one_hot(target, classes).double()
    if weight is not None:
        shares = shares * weight.double().unsqueeze(1)
    exact = numpy_moments(features.double().numpy(), shares.numpy())
    assert [part.dtype for part in ours] == [torch.float64, torch.float32, torch.float32]
    for part, wanted, rtol in zip(ours, exact, (1e-12, 1e-6, 1e-6), strict=True):
        np.testing.assert_allclose(part.cpu().numpy(), wanted, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("distance", [1e4, 1e6])
def test_means_far_outside_the_spread_lose_nothing(
    backend: str, soft: bool, distance: float
) -> None:
    """The spread is 1; at 1e6, a float32 sum of a few rows is off by a tenth of that a row."""
    rows, classes, dim = 500 if INTERPRETED else 8192, 8, 33
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, dim, generator=generator) + distance
    target = torch.randint(classes, (rows,), generator=generator)
    features += target.unsqueeze(1) * 3.0
    if soft:
        target = torch.rand(rows, classes, generator=generator).softmax(1)
    device = device_of(backend)
    ours = class_moments(features.to(device), target.to(device), classes, backend=backend)
    exact = numpy_moments(features.double().numpy(), one_hot(target, classes).double().numpy())
    for part, wanted in zip(ours, exact, strict=True):
        np.testing.assert_allclose(part.cpu().numpy(), wanted, rtol=1e-6)


def test_an_outlier_in_the_first_row_spoils_nothing(backend: str) -> None:
    """A shift by the first row, E[(x - x_0)^2] - E[x - x_0]^2, would lose all digits here."""
    features = torch.randn(200, 20, generator=torch.Generator().manual_seed(2)) + 5
    features[0] = 1e6
    target = torch.zeros(200, dtype=torch.int64)
    target[0] = 1
    weight = torch.ones(200)
    device = device_of(backend)
    ours = class_moments(
        features.to(device), target.to(device), 2, weight=weight.to(device), backend=backend
    )
    shares = one_hot(target, 2).numpy()
    exact = numpy_moments(features.double().numpy(), shares)
    np.testing.assert_allclose(ours.m2.cpu().numpy()[0], exact[2][0], rtol=1e-6)


def test_merged_shards_are_the_whole(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    device = device_of(backend)
    features = (torch.randn(400, 24, generator=generator) * 2 + 100).to(device)
    target = torch.randint(-1, 5, (400,), generator=generator).to(device)
    whole = class_moments(features, target, 5, backend=backend)
    merged = class_moments(features[:0], target[:0], 5, backend=backend)
    for part in torch.arange(400, device=device).split([1, 0, 130, 2, 267]):
        shard = class_moments(features[part], target[part], 5, backend=backend)
        merged = merge_moments(merged, shard)
    # Measured 1.8e-6: between merges, means of 50 deviations are rounded to float32.
    for ours, wanted in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=4e-6, atol=0)


def test_a_nan_stays_in_its_class_and_column(backend: str) -> None:
    features = torch.randn(40, 6)
    features[7, 2] = float("nan")
    target = torch.arange(40) % 4
    device = device_of(backend)
    ours = class_moments(features.to(device), target.to(device), 4, backend=backend)
    for part in ours[1:]:
        spoiled = part.cpu().isnan()
        assert spoiled[3, 2] and spoiled.sum() == 1


# --- Shifted cross-entropy ---


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
    device = "cpu" if backend == "reference" else device_of(backend)
    arguments = moved_to(device, vars(problem))
    logits = problem.logits.to(device=device, dtype=dtype).detach().requires_grad_()
    weight = problem.weight.to(device=device, dtype=dtype).detach().requires_grad_()
    arguments |= {"logits": logits, "weight": weight}
    loss = shifted_cross_entropy(**arguments, backend=backend)
    outer = torch.linspace(0.5, 1.5, loss.numel(), device=device).reshape(loss.shape)
    gradients = torch.autograd.grad(loss, (logits, weight), outer.to(loss.dtype))
    assert loss.dtype == (dtype or torch.float32)
    return [loss.detach().cpu(), *(g.cpu() for g in gradients)]


@PROPERTY
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


# --- All of them ---


def everything(backend: str, rows: int = 37) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    device = device_of(backend)
    features = torch.randn(rows, 100, generator=generator).to(device)
    target = torch.randint(-1, 6, (rows,), generator=generator).to(device)
    posteriors = torch.rand(rows, 6, generator=generator).softmax(1).to(device)
    variance = torch.rand(6, 100, generator=generator).to(device)
    directions = torch.randn(6, 5, 100, generator=generator).to(device)
    weight = torch.randn(6, 100, generator=generator).to(device).requires_grad_()
    options = {"strength": 0.5, "seed": torch.tensor(SEED, device=device), "backend": backend}
    results = []
    for labels in (target, posteriors):
        results += [shift_features(features, labels, variance, **options)]
        results += [shift_features(features, labels, None, directions=directions, **options)]
        results += class_moments(features, labels, 6, backend=backend)
    logits = (features @ weight.T).detach().requires_grad_()
    loss = shifted_cross_entropy(
        logits, target, weight, variance, strength=0.5, reduction="none", backend=backend
    )
    return [*results, loss.detach(), *torch.autograd.grad(loss.sum(), (logits, weight))]


def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    first = everything(backend)
    for _ in range(3):
        for again, once in zip(everything(backend), first, strict=True):
            assert torch.equal(again, once)


def test_float64_is_left_to_the_reference(backend: str) -> None:
    features = torch.zeros(2, 3, dtype=torch.float64)
    for op in ("shift", "moments"):
        assert explain(op, features).backend == "reference"
    with pytest.raises(RuntimeError, match="float64 asks for more"):
        class_moments(features, torch.tensor([0, 1]), 2, backend=backend)


@pytest.mark.skipif(INTERPRETED, reason="compiled graph: needs a run without interpreter")
@pytest.mark.parametrize("low_rank", [False, True])
def test_compiles_into_one_graph_forward_and_backward(backend: str, low_rank: bool) -> None:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(5)
    plain = torch.randn(9, 12, generator=generator).to(device)
    head = torch.randn(4, 12, generator=generator).to(device)
    target = (torch.arange(9) % 5 - 1).to(device)
    variance = None if low_rank else torch.rand(4, 12, generator=generator).to(device)
    directions = torch.randn(4, 3, 12, generator=generator).to(device) if low_rank else None
    seed = torch.tensor(SEED, device=device)

    def total(features: Tensor, weight: Tensor, strength: float) -> Tensor:
        options = {"strength": strength, "directions": directions, "backend": backend}
        moved = shift_features(features, target, variance, seed=seed, **options)
        logits = features @ weight.T
        bound = shifted_cross_entropy(logits, target, weight, variance, **options)
        mean = class_moments(features, target, 4, backend=backend).mean
        return moved.square().sum() + bound + (features @ mean.T).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(total, fullgraph=True)
    for strength in (0.1, 0.2, 0.3, 0.4, 0.5):  # ramped: must not compile anew every step
        gradients = []
        for run in (total, compiled):
            features, weight = plain.clone().requires_grad_(), head.clone().requires_grad_()
            gradients.append(
                torch.autograd.grad(run(features, weight, strength), (features, weight))
            )
        for eager, traced in zip(*gradients, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def registered_calls(backend: str) -> dict[str, tuple[object, ...]]:
    device = device_of(backend)
    features = torch.randn(5, 6, device=device).T.requires_grad_()
    target = torch.tensor([0, 1, -1, 2, 2, 0], device=device)
    shares = torch.rand(6, 3, device=device).softmax(1)
    variance, directions = torch.rand(3, 5, device=device), torch.randn(3, 2, 5, device=device)
    strength, seed = torch.tensor(0.5, device=device), torch.tensor(SEED, device=device)
    logits = torch.randn(3, 6, device=device).T.requires_grad_()
    table = torch.rand(3, 3, device=device).requires_grad_()
    rows = torch.arange(6, device=device)
    return {
        "shift_features": (features, target, variance, strength, seed, None, None, backend),
        "shift_features along directions": (
            features, shares, None, torch.rand(6, device=device), seed, rows, directions, backend,
        ),
        "class_moments": (features.detach(), shares, 3, torch.rand(6, device=device), backend),
        "shifted_losses": (logits, target, table, strength, backend, True),
        "shifted_losses alone": (logits.detach(), target, table.detach(), strength, backend, False),
    }  # fmt: skip


@pytest.mark.parametrize("call", registered_calls("cpu"))
def test_the_registered_operators_pass_opcheck(
    backend: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # opcheck makes tensors of its own
    operator = getattr(torch.ops.mics_kernels, call.partition(" ")[0]).default
    torch.library.opcheck(operator, registered_calls(backend)[call])


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_replayed_cuda_graph_draws_anew_where_the_offset_has_advanced() -> None:
    features, variance = torch.zeros(64, 96, device="cuda"), torch.ones(3, 96, device="cuda")
    target = torch.arange(64, device="cuda") % 3
    seed = torch.tensor([11, 0], device="cuda")

    def step() -> Tensor:
        return shift_features(features, target, variance, strength=0.5, seed=seed, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for offset in (0, 1, 2):
        seed[1] = offset
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, step())


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton on a GPU or interpreted")
def test_the_tile_does_not_change_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Shift(torch.randn(9, 100), torch.arange(9) % 3, torch.rand(3, 100), 0.5, None, None)
    whole = solve_shift(problem, "triton")
    for rows, columns in ((1, 16), (4, 64), (16, 128)):
        tile = {"D": 100, "R": rows, "K": columns}
        monkeypatch.setattr(triton_kernels, "shift_blocks", lambda dim, tile=tile: tile)
        assert torch.equal(solve_shift(problem, "triton"), whole)


@pytest.mark.skipif(INTERPRETED, reason="C++ backend: needs a run without interpreter")
class TestTheNativeModule:
    def test_every_instruction_set_draws_the_same_words_and_agrees(self) -> None:
        native = importlib.import_module("mics_kernels._native")
        best = native.build_info()["instruction set"]
        stream = reference_words(*SEED, 2**35 + 7, 100)
        exact = normals(torch.tensor(SEED), torch.arange(30), 100)
        expected = everything("cpu")
        tried = 0
        try:
            for name in ("avx512", "avx2", "sse2", "neon", "generic"):
                if native.use_instruction_set(name):
                    tried += 1
                    assert torch.equal(native_words(*SEED, 2**35 + 7, 100), stream)
                    assert (draw("cpu", 30, 100).double() - exact).abs().max() < NORMAL_TOLERANCE
                    for ours, wanted in zip(everything("cpu"), expected, strict=True):
                        torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=4e-6)
        finally:
            native.use_instruction_set(best)
        assert tried >= 1

    def test_the_number_of_threads_does_not_change_a_bit(self) -> None:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = everything("cpu", rows=20_000)  # enough for threads
            torch.set_num_threads(3)
            together = everything("cpu", rows=20_000)
        finally:
            torch.set_num_threads(threads)
        # The head's logits and weights are torch's own products, which may depend on its threads.
        for ours, wanted in zip(together[:-3], alone[:-3], strict=True):
            assert torch.equal(ours, wanted)
