"""The random stream of every fast implementation of the shift: its words, its normals, its rows.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mics_kernels import shift_features
from mics_kernels.philox import normals, philox4x32, row_uniforms, uniforms
from tests.kernels.implementations import BACKENDS, GPU, INTERPRETED, captured, device_of

if "triton" in BACKENDS:
    import triton
    import triton.language as tl

    from mics_kernels.shift.triton_shift import philox

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


pytestmark = pytest.mark.usefixtures("poisoned_memory")
# The largest error of a normal measured in 1e6 draws is 7e-7.
NORMAL_TOLERANCE = 2e-6
SEED = (2**40 + 17, 5)


def reference_words(seed: int, offset: int, row: int, draws: int) -> Tensor:
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    counter = (torch.arange(draws), row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, offset)
    return torch.stack(torch.broadcast_tensors(*philox4x32(key, counter)), dim=-1)


def native_words(seed: int, offset: int, row: int, draws: int) -> Tensor:
    native = importlib.import_module("mics_kernels._native")
    words = torch.empty(draws, 4, dtype=torch.int32)
    native.philox_words_cpu(seed, offset, row, draws, words.data_ptr())
    return words.long() & 0xFFFFFFFF


def test_uniforms_of_rows_are_those_of_the_reference(monkeypatch):
    rows = torch.tensor([0, -1, 2**35 + 7, 5, 2**62])
    key = (SEED[0], SEED[0] >> 32)
    words = philox4x32(key, (torch.arange(3), rows[:, None], rows[:, None] >> 32, 0))
    assert torch.equal(row_uniforms(SEED[0], rows, 3), uniforms(words[0]))
    monkeypatch.setattr("mics_kernels.philox.native_on_cpu", lambda *_: None)
    assert torch.equal(row_uniforms(SEED[0], rows, 3), uniforms(words[0]))


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
    """Rows where u is nearest to 0 and to 1, found by search, independently of the law."""
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


@pytest.mark.skipif(INTERPRETED, reason="C++ backend: needs a run without interpreter")
def test_every_instruction_set_draws_the_same_words(instruction_sets: Iterator[str]) -> None:
    stream = reference_words(*SEED, 2**35 + 7, 100)
    exact = normals(torch.tensor(SEED), torch.arange(30), 100)
    for name in instruction_sets:
        assert torch.equal(native_words(*SEED, 2**35 + 7, 100), stream), name
        assert (draw("cpu", 30, 100).double() - exact).abs().max() < NORMAL_TOLERANCE, name


def test_ten_million_normals_follow_the_normal_law(backend: str) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
    rows = 130 if INTERPRETED else 13_021
    draws = draw(backend, rows, 768).double()
    n = draws.numel()
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
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


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_replayed_cuda_graph_draws_anew_where_the_offset_has_advanced() -> None:
    features, variance = torch.zeros(64, 96, device="cuda"), torch.ones(3, 96, device="cuda")
    target = torch.arange(64, device="cuda") % 3
    seed = torch.tensor([11, 0], device="cuda")

    def step() -> Tensor:
        return shift_features(features, target, variance, strength=0.5, seed=seed, backend="triton")

    graph, moved = captured(step)
    for offset in (0, 1, 2):
        seed[1] = offset
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(moved, step())
