"""The consistency losses in Triton against the float64 reference.

``TRITON_INTERPRET=1 pytest <this file>`` without a GPU; on one, as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from mics_kernels.consistency import reference, triton_kernels
from mics_kernels.consistency.records import ConsistencyInputs
from mics_kernels.consistency.triton_kernels import Tile, losses_and_gradients
from tests.kernels.implementations import GPU, INTERPRETED, captured, on_device
from tests.kernels.properties import examples

pytestmark = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="needs an NVIDIA GPU or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if GPU else "cpu"
HALF = (torch.bfloat16, torch.float16)


@dataclass
class Problem:
    queries: list[Tensor]
    teachers: list[Tensor]
    keys: list[Tensor]
    queues: list[Tensor]
    temperature: float | Tensor = 0.07
    alpha: float | Tensor = 0.4
    queue_lengths: Sequence[int | Tensor] = ()
    key_ids: Tensor | None = None
    queue_ids: Sequence[Tensor] = ()
    present: Tensor | None = None

    def __repr__(self) -> str:  # short, and not all the numbers
        shapes = [list(x[0].shape) for x in (self.queries, self.keys, self.queues) if x]
        return (
            f"Problem({len(self.queries)} views of {shapes} {self.queries[0].dtype}, "
            f"T={self.temperature}, alpha={self.alpha}, lengths={self.queue_lengths}, "
            f"key_ids={self.key_ids}, queue_ids={self.queue_ids}, present={self.present})"
        )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(permutations(range(len(self.queries)), 2)) or [(0, 0)]


def features(count: int, width: int, generator: torch.Generator, near: Tensor | None) -> Tensor:
    """Unit rows, of which the first are near those of ``near``, as positives are."""
    made = torch.randn(count, width, generator=generator)
    if near is not None:
        made[: len(near)] += 1.5 * near[:count]
    return torch.nn.functional.normalize(made, dim=1)


def plain_problem(
    rows: int = 13,
    keys: int = 21,
    queue: int = 50,
    width: int = 40,
    views: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    base = features(rows, width, generator, None)
    near = width**0.5 * base

    def made(count: int) -> list[Tensor]:
        return [features(count, width, generator, near).to(dtype) for _ in range(views)]

    return Problem(made(rows), made(rows), made(keys), made(queue) if queue else [])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    dtype = draw(st.sampled_from([torch.float32, *HALF]))
    rows, views = draw(st.integers(0, 40)), draw(st.sampled_from([2, 2, 3]))
    keys = rows + draw(st.sampled_from([0, 0, 1, 7]))
    queue = draw(st.sampled_from([0, 1, 31, 64, 77]))
    width = draw(st.sampled_from([32, 64, 72, 296]))
    seed = draw(st.integers(0, 2**31))
    problem = plain_problem(rows, keys, queue, width, views, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    problem.alpha = draw(st.sampled_from([0.0, 0.4, 1.0]))
    problem.temperature = draw(st.sampled_from([0.001, 0.07, 0.5]))
    if draw(st.booleans()):
        problem.temperature = torch.tensor(problem.temperature)
        problem.alpha = torch.tensor(problem.alpha)
    if queue and draw(st.booleans()):
        lengths = torch.randint(0, queue + 1, (views,), generator=generator)
        as_tensors = draw(st.booleans())
        problem.queue_lengths = list(lengths.unbind() if as_tensors else lengths.tolist())
        for features_of_view, length in zip(problem.queues, lengths, strict=True):
            features_of_view[length:] = torch.nan  # never to be read, as below
    if draw(st.booleans()):
        problem.key_ids = torch.randint(-2, max(rows, 1), (keys,), generator=generator)
        unreadable = problem.key_ids < 0
        for x in problem.keys:
            x[unreadable] = torch.nan
        for x in (*problem.queries, *problem.teachers):
            x[unreadable[:rows]] = torch.nan
        if queue and draw(st.booleans()):
            problem.queue_ids = [
                torch.randint(-2, max(rows, 1), (queue,), generator=generator) for _ in range(views)
            ]
            for x, ids in zip(problem.queues, problem.queue_ids, strict=True):
                x[ids < 0] = torch.nan
    if draw(st.booleans()):
        problem.present = torch.rand(keys, views, generator=generator) > 0.3
        for view in range(views):
            absent = ~problem.present[:, view]
            problem.keys[view][absent] = torch.nan
            problem.queries[view][absent[:rows]] = torch.nan
            problem.teachers[view][absent[:rows]] = torch.nan
    return problem


def solve(problem: Problem, want_gradient: bool = True) -> list[Tensor]:
    """Losses, counted, gradient and temperature gradient."""

    def there(x: Any) -> Any:
        return on_device(x, DEVICE) if isinstance(x, Tensor) and GPU else x

    inputs = inputs_of(problem, want_gradient)
    inputs = inputs._make(tree_map(there, tuple(inputs)))
    return [x.cpu() for x in losses_and_gradients(inputs)]


def inputs_of(problem: Problem, want_gradient: bool = True) -> ConsistencyInputs:
    return ConsistencyInputs(
        queries=problem.queries,
        teachers=problem.teachers,
        keys=problem.keys,
        queues=problem.queues,
        temperature=problem.temperature,
        alpha=problem.alpha,
        queue_lengths=problem.queue_lengths,
        key_ids=problem.key_ids,
        queue_ids=problem.queue_ids,
        present=problem.present,
        query_modalities=[a for a, _ in problem.pairs],
        key_modalities=[b for _, b in problem.pairs],
        backend="triton",
        want_gradient=want_gradient,
    )


def solve_by_reference(problem: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Compute the results of ``solve`` by reference and autograd, with queries of ``dtype``."""
    results: list[list[Tensor]] = [[], [], [], []]
    for a, b in problem.pairs:
        query = problem.queries[a].to(dtype=dtype).clone().requires_grad_()
        inner = torch.float64 if query.dtype == torch.float64 else torch.float32
        temperature = torch.as_tensor(problem.temperature).to(inner).expand(len(query), 1).clone()
        temperature.requires_grad_()
        losses, counted = reference.losses_and_counted(
            inputs_of(problem)._replace(
                queries=[query if view == a else x for view, x in enumerate(problem.queries)],
                temperature=temperature,
                alpha=float(problem.alpha),
                query_modalities=[a],
                key_modalities=[b],
            )
        )
        slopes = torch.autograd.grad(losses.sum(), (query, temperature))
        found = (losses[0].detach(), counted[0], slopes[0], slopes[1].squeeze(1))
        for result, value in zip(results, found, strict=True):
            result.append(value)
    return [torch.stack(x) for x in results]


def assert_accurate(ours: Tensor, exact: Tensor, eager: Tensor, floor: float) -> None:
    """At most twice as far from float64 as torch in the inputs' dtype, plus the floor."""
    assert ours.dtype == torch.float32 and ours.shape == exact.shape
    if exact.numel():
        error = (ours.double() - exact).abs().max()
        allowed = 2 * (eager.double() - exact).abs().max() + floor
        assert error <= allowed, f"off by {error}, allowed {allowed}"


def assert_same_bits(ours: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ours, others, strict=True):
        assert torch.equal(one, other)


def assert_solved(problem: Problem, results: list[Tensor]) -> None:
    exact = solve_by_reference(problem, torch.float64)
    eager = solve_by_reference(problem)
    dtype = problem.queries[0].dtype
    losses, counted, gradient, slopes = results
    assert torch.equal(counted, exact[1])
    # Measured over 60 problems, beyond twice torch's own error: losses 6e-7, and 4e-8 / T where T
    # is 0.001; slopes 1e-7 / T^2; gradient 1e-7 / T, and of bfloat16, whose probabilities weigh
    # the keys with 8 bits, 3e-4 / T.
    steep = 1.0 / float(problem.temperature)
    floor = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1.2e-4}[dtype]
    assert_accurate(losses, exact[0], eager[0], 1e-6 + 1e-7 * steep)
    assert_accurate(gradient, exact[2], eager[2], floor * steep)
    assert_accurate(slopes, exact[3], eager[3], 5e-7 * steep**2)
    for x in results:
        assert not x[~counted].any()


def solved(problem: Problem) -> tuple[Problem, list[Tensor]]:
    return problem, solve(problem)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, or True: what a kernel forgets to write shows."""
    fresh = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = fresh(self, *size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else True)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@examples(100, interpreted=20)
@given(problem=problems())
def test_agrees_with_the_float64_reference(problem: Problem) -> None:
    results = solve(problem)
    assert_solved(problem, results)
    losses, counted, gradient, slopes = solve(problem, want_gradient=False)
    # Not the same bits: without a second product the compiler lays out the first one otherwise.
    steep = 1.0 / float(problem.temperature)
    torch.testing.assert_close(losses, results[0], rtol=0, atol=1e-6 + 1e-7 * steep)
    assert torch.equal(counted, results[1])
    assert gradient.numel() == slopes.numel() == 0


def test_serves_no_queue_one_row_and_none() -> None:
    assert_solved(*solved(plain_problem(queue=0)))
    assert_solved(*solved(plain_problem(rows=1, keys=1, queue=0)))
    losses, counted, gradient, slopes = solve(plain_problem(rows=0, keys=3))
    assert losses.shape == counted.shape == slopes.shape == (2, 0)
    assert gradient.shape == (2, 0, 40)


def test_serves_one_pair_of_one_list_of_keys() -> None:
    assert_solved(*solved(plain_problem(views=1)))


@pytest.mark.parametrize("width", [8, 128, 512, 1024])
def test_serves_narrow_and_wide_features(width: int) -> None:
    assert_solved(*solved(plain_problem(rows=9, keys=9, queue=20, width=width)))


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unlike_dtypes_are_computed_in_the_widest(
    query_dtype: torch.dtype, queue_dtype: torch.dtype
) -> None:
    problem = plain_problem(dtype=query_dtype)
    problem.queues = [x.to(queue_dtype) for x in problem.queues]
    if query_dtype != queue_dtype:
        problem.teachers = [x.double() for x in problem.teachers]  # then in float32
    results = solve(problem)
    exact = solve_by_reference(problem, torch.float64)
    same = query_dtype == queue_dtype == torch.bfloat16
    floor = (1e-3 if same else 1e-6) / 0.07
    assert (results[0] - exact[0]).abs().max() < 3e-6
    assert (results[2] - exact[2]).abs().max() < floor


def strict_problem() -> Problem:
    """Ids with repeats, missing views and a queue that is not full."""
    problem = plain_problem(rows=19, keys=30, queue=150)
    generator = torch.Generator().manual_seed(1)
    problem.key_ids = torch.randint(-1, 12, (30,), generator=generator)
    problem.queue_ids = [torch.randint(-1, 12, (150,), generator=generator) for _ in range(2)]
    problem.present = torch.rand(30, 2, generator=generator) > 0.2
    problem.queue_lengths = [150, torch.tensor(61, device=DEVICE)]
    return problem


@pytest.mark.parametrize(
    "tile", [Tile(16, 16, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)]
)
def test_the_tile_does_not_matter(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "tile_for", lambda *_: tile)
    assert_solved(*solved(strict_problem()))


@pytest.mark.parametrize("splits", [1, 2, 5, 17, 40])  # the last: more than there are tiles
def test_the_number_of_splits_does_not_matter(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "splits_for", lambda *_: splits)
    assert_solved(*solved(strict_problem()))


def test_the_same_inputs_give_the_same_bits() -> None:
    first = solve(strict_problem())
    for _ in range(3):
        assert_same_bits(solve(strict_problem()), first)


def test_strided_and_misaligned_inputs_give_the_same_bits() -> None:
    plain = strict_problem()
    expected = solve(plain)

    def strided(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    def misaligned(x: Tensor) -> Tensor:
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].copy_(x.flatten()).view_as(x)

    moves: list[Callable[[Tensor], Tensor]] = [strided, misaligned]
    for move in moves:
        problem = replace(plain)
        for name in ("queries", "teachers", "keys", "queues"):
            setattr(problem, name, [move(x) for x in getattr(plain, name)])
        assert plain.present is not None
        problem.present = move(plain.present)
        assert_same_bits(solve(problem), expected)


def test_the_order_of_the_queue_does_not_matter() -> None:
    problem = plain_problem(queue=90)
    losses, _, gradient, _ = solve(problem)
    problem.queues = [x.flip(0) for x in problem.queues]
    other_losses, _, other_gradient, _ = solve(problem)
    torch.testing.assert_close(other_losses, losses, rtol=0, atol=2e-6)
    torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=2e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    whole = plain_problem(rows=24, keys=24)
    problem = plain_problem(rows=24, keys=24)
    problem.queries[0][3] = torch.nan
    problem.teachers[0][5] = torch.nan
    results, changed = solve(whole), solve(problem)
    others = torch.ones(24, dtype=torch.bool)
    others[[3, 5]] = False
    for one, other in zip(results, changed, strict=True):
        assert torch.equal(one[:, others], other[:, others])
    assert changed[0][0, 3].isnan() and changed[0][0, 5].isnan()


@pytest.mark.parametrize("temperature", [0.001, 0.5])
def test_keys_that_are_all_alike_share_the_probability(temperature: float) -> None:
    problem = plain_problem(rows=7, keys=7, queue=40)
    for x in (*problem.keys, *problem.queues):
        x.copy_(problem.keys[0][0].expand_as(x))
    problem.temperature = temperature
    losses, _, gradient, slopes = solve(problem)
    # Among n alike keys the loss is log(n), wherever the query is: nothing to learn.
    atol = 1e-6 + 1e-7 / temperature
    torch.testing.assert_close(losses, torch.full((2, 7), 47.0).log(), rtol=0, atol=atol)
    assert gradient.abs().max() < 3e-7 / temperature
    assert slopes.abs().max() < 5e-7 / temperature**2


@pytest.mark.parametrize("length", [-5, 10**12])
def test_a_wrong_length_reads_nothing_out_of_bounds(length: int) -> None:
    problem = plain_problem()
    problem.queue_lengths = [torch.tensor(length, device=DEVICE)] * 2
    results = solve(problem)
    problem.queue_lengths = [min(max(length, 0), 50)] * 2
    assert_same_bits(solve(problem), results)


@triton.jit
def _far_kernel(features, out, tile, length, N: tl.constexpr):
    """Sweep of one far tile by 16 rows of ones."""
    queries = tl.full((16, 1024), 1.0, features.dtype.element_ty)
    row = tl.arange(0, 16)
    sums = tl.zeros((16,), tl.float32)
    peak, total, _, _, _ = triton_kernels._sweep(
        queries, row, row, features, features, tile, tile + 1, length, 1.0,
        sums - float("inf"), sums, sums, sums, tl.zeros((16, 1), tl.float32),
        1024, 1024, 16, N, False, False, False, "ieee",
    )  # fmt: skip
    tl.store(out + row, peak)
    tl.store(out + 16 + row, total)


def test_keys_beyond_two_to_the_31_elements_are_read_where_they_are() -> None:
    rows = 2**21 + 48  # of 1024 features; memory that is not touched is not taken
    features = torch.empty(rows, 1024, dtype=torch.float16, device=DEVICE)
    features[-32:] = torch.arange(32, device=DEVICE).unsqueeze(1) / 1024
    out = torch.empty(2, 16, device=DEVICE)
    with triton_kernels.device_of(features):
        _far_kernel[(1,)](features, out, rows // 16 - 1, rows, N=16)
    assert torch.equal(out[0].cpu(), torch.full((16,), 31.0))
    expected = (2.0 ** -torch.arange(16.0)).sum()
    torch.testing.assert_close(out[1].cpu(), expected.expand(16))


@pytest.mark.parametrize("processors", [80, 108, 132, 148, 170])
@pytest.mark.parametrize("batch", [1, 8, 32, 100, 1024, 4096])
def test_splits_fill_the_gpu_but_take_little_memory(processors: int, batch: int) -> None:
    for capability in (80, 90, 100, 120):
        tile = triton_kernels.tile_for(capability, batch, 256, 2, False, False)
        row_tiles = 2 * triton.cdiv(2 * batch, tile.rows)
        key_tiles, residents = (batch + 65536) // tile.keys, 8 // tile.warps
        splits = triton_kernels.splits_for(row_tiles, key_tiles, processors, residents)
        programs = splits * row_tiles
        if batch <= 100:  # one wave: a second one would only take memory
            assert programs <= residents * processors
        assert programs >= 0.85 * processors * triton.cdiv(programs, processors)
        scratch = 2 * splits * 2 * batch * (256 + 4) * 4
        assert batch > 1024 or scratch < 58e6


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120, 121])
def test_tiles_fit_in_shared_memory(capability: int) -> None:
    for batch in (1, 8, 9, 32, 64, 4096):
        for width in (16, 32, 64, 128, 256, 512, 1024):
            for itemsize, exact in ((2, False), (4, True)):
                if itemsize == 4 and width == 1024 and capability not in (80, 90, 100, 103):
                    with pytest.raises(RuntimeError, match="shared memory"):
                        triton_kernels.tile_for(capability, batch, width, 4, True, True)
                    continue
                for has_ids in (False, True):
                    tile = triton_kernels.tile_for(
                        capability, batch, width, itemsize, has_ids, exact
                    )
                    least = (tile.rows + tile.keys) * width * itemsize
                    assert tile.rows % 16 == tile.keys % 16 == 0
                    assert least <= triton_kernels.shared_memory(capability)


def test_float32_products_follow_torch_by_whichever_setting() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for name, wanted in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(name)
            assert triton_kernels._precision() == wanted
        torch.set_float32_matmul_precision("highest")
        for wanted in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = wanted
            assert triton_kernels._precision() == wanted
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_replayed_cuda_graph_follows_the_queue_and_the_temperature() -> None:
    problem = plain_problem(rows=64, keys=64, queue=500, width=256, dtype=torch.bfloat16)
    for name in ("queries", "teachers", "keys", "queues"):
        setattr(problem, name, [x.cuda() for x in getattr(problem, name)])
    length = torch.tensor(100, device="cuda")
    problem.queue_lengths = [length, length]
    problem.temperature = torch.tensor(0.07, device="cuda")

    def step() -> tuple[Tensor, ...]:
        return losses_and_gradients(inputs_of(problem))

    graph, replayed = captured(step)
    length.fill_(333)
    problem.temperature.fill_(0.1)
    graph.replay()
    torch.cuda.synchronize()
    for ours, wanted in zip(replayed, step(), strict=True):
        assert torch.equal(ours, wanted)
