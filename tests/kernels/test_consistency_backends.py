"""Every fast implementation of the consistency losses against the float64 reference.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mics_kernels import consistency_loss, multimodal_consistency_loss
from tests.kernels.implementations import GPU, INTERPRETED, captured, device_of, on_device
from tests.kernels.properties import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")

# On tensor cores the probabilities are rounded to the dtype of the keys before the second product;
# measured: 9e-4 / T and 1.2e-4 / T in a gradient.
ROUNDED_PROBABILITY = {torch.float32: 0.0, torch.bfloat16: 1e-3, torch.float16: 1.3e-4}


@dataclass
class Problem:
    features: list[Tensor]
    teachers: list[Tensor]
    keys: list[Tensor]
    queues: list[Tensor] | None
    queue_lengths: list[int | Tensor] | None
    key_ids: Tensor | None
    queue_ids: list[Tensor] | None
    present: Tensor | None
    temperature: float
    alpha: float
    pairs: list[tuple[int, int]] | None
    reduction: str


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    views = draw(st.sampled_from([2, 2, 3]))
    rows = draw(st.integers(0, 20 if INTERPRETED else 40))
    dim = draw(st.sampled_from([32, 40, 64] if INTERPRETED else [32, 40, 64, 104, 296]))
    extra = draw(st.sampled_from([0, 0, 3, 30]))
    count = draw(st.sampled_from([None, 0, 1, 7, 50] + ([] if INTERPRETED else [700])))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))

    def tensors(length: int, kind: torch.dtype) -> list[Tensor]:
        return [unit(generator, length, dim).to(kind) for _ in range(views)]

    features, keys = tensors(rows, dtype), tensors(rows + extra, dtype)
    queues, lengths, queue_ids, key_ids, present = None, None, None, None, None
    if count is not None:
        queues = tensors(count, draw(st.sampled_from([dtype, torch.float32])))
        if draw(st.booleans()):
            filled = draw(st.integers(0, count))
            lengths = [filled if draw(st.booleans()) else torch.tensor(filled) for _ in queues]
            for queue in queues:
                queue[filled:] = NAN
    if draw(st.booleans()):
        key_ids = torch.randint(-1, rows + 2, (rows + extra,), generator=generator)
        for key in keys:
            key[key_ids < 0] = NAN
        if queues is not None and draw(st.booleans()):
            queue_ids = [
                torch.randint(-1, rows + 2, (len(q),), generator=generator) for q in queues
            ]
            for queue, ids in zip(queues, queue_ids, strict=True):
                queue[ids < 0] = NAN
    if draw(st.booleans()):
        present = torch.rand(rows + extra, views, generator=generator) > 0.3
        for view in range(views):
            keys[view][~present[:, view]] = NAN
            features[view][~present[:rows, view]] = NAN
    return Problem(
        features,
        [key[:rows].clone() for key in keys],
        keys,
        queues,
        lengths,
        key_ids,
        queue_ids,
        present,
        draw(st.sampled_from([0.001, 0.07, 0.5])),
        draw(st.sampled_from([0.0, 0.4, 1.0])),
        draw(st.sampled_from([None, None, [(0, 0), (1, 1)], [(1, 0), (1, 1), (0, 0)]])),
        draw(st.sampled_from(["mean", "sum", "none"])),
    )


def solve(problem: Problem, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Loss, and its gradients in the features and the temperature for a grad_out that is not 1."""
    device = device_of(backend)

    def placed(values: list[Tensor] | None) -> list[Tensor] | None:
        return None if values is None else [on_device(x, device, dtype) for x in values]

    features = [x.detach().requires_grad_() for x in placed(problem.features) or []]
    temperature = torch.tensor(problem.temperature, device=device, dtype=dtype, requires_grad=True)
    lengths = problem.queue_lengths
    loss = multimodal_consistency_loss(
        features,
        placed(problem.teachers),
        placed(problem.queues),
        keys=placed(problem.keys),
        temperature=temperature,
        alpha=problem.alpha,
        queue_lengths=lengths and [n.to(device) if isinstance(n, Tensor) else n for n in lengths],
        key_ids=None if problem.key_ids is None else problem.key_ids.to(device),
        queue_ids=problem.queue_ids and [ids.to(device) for ids in problem.queue_ids],
        present=None if problem.present is None else problem.present.to(device),
        pairs=problem.pairs,
        reduction=problem.reduction,
        backend=backend,
    )
    outer = torch.linspace(0.5, 1.5, loss.numel(), device=device).reshape(loss.shape)
    gradients = torch.autograd.grad(
        loss, [*features, temperature], outer.to(loss.dtype), materialize_grads=True
    )  # zeros for a modality that no pair names
    return [x.detach().cpu() for x in (loss, torch.stack(gradients[:-1]), gradients[-1])]


def assert_as_good_as_eager(problem: Problem, backend: str) -> None:
    """Off float64 by at most twice what the same formula is off in the same dtype, and a floor.

    The floor is what one rounding of a feature to float32 does to a logit, and to its derivatives:
    where a softmax is peaked the gradient is the difference of two equal features, or hangs on the
    rounding of two logits that are as large (measured: 4e-3 at T = 0.001, 4e-6 at T = 0.07).
    """
    exact = solve(problem, "reference", torch.float64)
    eager = solve(problem, "reference")
    ours = solve(problem, backend)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == problem.features[0].dtype
    rounding, views = 2e-7 / problem.temperature, len(problem.features)
    rows = 1 if problem.reduction == "mean" else len(problem.features[0]) * views * (views - 1)
    half = ROUNDED_PROBABILITY[problem.features[0].dtype] if backend == "triton" else 0.0
    floors = (
        (rounding + 4e-7) * (rows if problem.reduction == "sum" else 1),
        (rounding * (1 + 0.02 / problem.temperature) + 4e-7 + half / problem.temperature) * views,
        (rounding / problem.temperature + 4e-7) * rows,
    )
    for mine, theirs, true, floor in zip(ours, eager, exact, floors, strict=True):
        if true.numel():
            allowed = 2 * (theirs.double() - true).abs().max() + floor
            error = (mine.double() - true).abs().max()
            assert error <= allowed, f"off by {error}, allowed {allowed}"


@examples(150, interpreted=25)
@given(problem=problems())
def test_agrees_with_the_float64_reference(backend: str, problem: Problem) -> None:
    assert_as_good_as_eager(problem, backend)


def fixed_problem(rows: int = 9, dim: int = 64, queue: int = 300) -> Problem:
    generator = torch.Generator().manual_seed(rows)
    features, keys = ([unit(generator, rows, dim) for _ in range(2)] for _ in range(2))
    queues = [unit(generator, queue, dim) for _ in range(2)]
    return Problem(
        features,
        [k.clone() for k in keys],
        keys,
        queues,
        None,
        None,
        None,
        None,
        0.07,
        0.4,
        None,
        "none",
    )


def assert_same_bits(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, other in zip(ours, wanted, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_forward_pass_alone_gives_the_same_losses(backend: str, alpha: float) -> None:
    for rows in (3, 9, 40):
        problem = replace(fixed_problem(rows), alpha=alpha)
        with torch.no_grad():
            alone = multimodal_consistency_loss(
                [x.to(device_of(backend)) for x in problem.features],
                [x.to(device_of(backend)) for x in problem.teachers],
                [x.to(device_of(backend)) for x in problem.queues or []],
                temperature=0.07,
                alpha=alpha,
                reduction="none",
                backend=backend,
            )
        torch.testing.assert_close(alone.cpu(), solve(problem, backend)[0], rtol=1e-6, atol=2e-6)


def test_agrees_with_cross_entropy_and_with_attention(backend: str) -> None:
    device = device_of(backend)
    problem = fixed_problem()
    query, teacher = problem.features[0].double(), problem.teachers[0].double()
    assert problem.queues is not None
    pool = torch.cat([problem.keys[1], problem.queues[1]]).double()
    target = 0.4 * (teacher @ pool.T / 0.07).softmax(1)
    target[:, : len(query)] += 0.6 * torch.eye(len(query))
    given = [x.to(device) for x in (problem.teachers[0], problem.keys[1], problem.queues[1])]
    asks = problem.features[0].to(device).requires_grad_()
    ours = consistency_loss(asks, *given, temperature=0.07, reduction="none", backend=backend)
    wanted = F.cross_entropy(query @ pool.T / 0.07, target, reduction="none")
    torch.testing.assert_close(ours.double().cpu(), wanted, rtol=0, atol=4e-6)
    (gradient,) = torch.autograd.grad(ours.sum(), asks)
    attention = F.scaled_dot_product_attention(query[None], pool[None], pool[None], scale=1 / 0.07)
    torch.testing.assert_close(
        gradient.double().cpu(), (attention[0] - target @ pool) / 0.07, rtol=0, atol=8e-6
    )


def test_the_order_of_the_queue_does_not_matter(backend: str) -> None:
    problem = fixed_problem()
    assert problem.queues is not None
    before = solve(problem, backend)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    after = solve(replace(problem, queues=[queue[order] for queue in problem.queues]), backend)
    for mine, other in zip(after, before, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_identical_keys_share_the_probability(backend: str) -> None:
    problem = fixed_problem()
    key = problem.keys[1][:1]
    problem.keys = [key.expand(9, -1).contiguous()] * 2
    problem.queues = [key.expand(300, -1).contiguous()] * 2
    problem.teachers = problem.keys
    loss, gradient, _ = solve(problem, backend)
    torch.testing.assert_close(
        loss, torch.full((9,), 2 * 309.0).log() * 2 - 2 * torch.tensor(2.0).log(), rtol=1e-6, atol=0
    )
    assert gradient.abs().max() < 2e-6 / 0.07


def test_strided_and_misaligned_inputs_give_the_same_bits(backend: str) -> None:
    problem = fixed_problem()
    expected = solve(problem, backend)

    def strided(values: list[Tensor]) -> list[Tensor]:
        return [x.T.contiguous().T for x in values]

    def misaligned(values: list[Tensor]) -> list[Tensor]:
        return [torch.empty(x.numel() + 1)[1:].copy_(x.flatten()).view_as(x) for x in values]

    for move in (strided, misaligned):
        moved = replace(
            problem,
            features=move(problem.features),
            teachers=move(problem.teachers),
            keys=move(problem.keys),
            queues=move(problem.queues or []),
        )
        assert_same_bits(solve(moved, backend), expected)


def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    problem = fixed_problem(70, queue=300 if INTERPRETED else 20000)
    first = solve(problem, backend)
    for _ in range(3):
        assert_same_bits(solve(problem, backend), first)


def test_a_second_backward_repeats_the_gradient(backend: str) -> None:
    problem = fixed_problem()
    device = device_of(backend)
    features = [x.to(device).requires_grad_() for x in problem.features]
    teachers = [x.to(device) for x in problem.teachers]
    loss = multimodal_consistency_loss(features, teachers, temperature=0.1, backend=backend)
    first = torch.autograd.grad(loss, features, retain_graph=True)
    assert_same_bits(list(torch.autograd.grad(loss, features)), list(first))


def test_a_double_backward_is_refused_in_words(backend: str) -> None:
    problem = fixed_problem()
    device = device_of(backend)
    query = problem.features[0].to(device).requires_grad_()
    keys = problem.keys[0].to(device)
    loss = consistency_loss(query, keys, keys, temperature=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, query, create_graph=True)


@pytest.mark.skipif(INTERPRETED, reason="compiled graph: needs a run without interpreter")
def test_compiles_into_one_graph_forward_and_backward(backend: str) -> None:
    device = device_of(backend)
    problem = fixed_problem()
    teachers = [x.to(device) for x in problem.teachers]
    queues = [x.to(device) for x in problem.queues or []]
    ids = torch.arange(9, device=device)
    length = torch.tensor(100, device=device)

    def total(features: list[Tensor], temperature: Tensor, alpha: float) -> Tensor:
        both = multimodal_consistency_loss(
            features, teachers, queues, temperature=temperature, alpha=alpha,
            queue_lengths=[length, length], key_ids=ids, backend=backend,
        )  # fmt: skip
        one = consistency_loss(
            features[0], teachers[0], teachers[1], temperature=0.1, alpha=alpha, backend=backend
        )
        return 2 * both + one

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(total, fullgraph=True)
    for alpha in (0.1, 0.2, 0.3, 0.4):  # ramped: must not compile anew every step
        results = []
        for run in (total, compiled):
            features = [x.to(device).clone().requires_grad_() for x in problem.features]
            temperature = torch.tensor(0.07, device=device, requires_grad=True)
            loss = run(features, temperature, alpha)
            results.append([loss.detach(), *torch.autograd.grad(loss, [*features, temperature])])
        for traced, plain in zip(*results, strict=True):
            torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("wanted", [True, False])
def test_the_registered_losses_pass_opcheck(
    backend: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # opcheck makes tensors of its own
    device = device_of(backend)
    problem = fixed_problem()

    def permuted(values: list[Tensor]) -> list[Tensor]:
        return [x.T.contiguous().T.to(device) for x in values]

    queries = [x.requires_grad_(wanted) for x in permuted(problem.features)]
    temperature = torch.tensor(0.07, device=device, requires_grad=wanted)
    operator = torch.ops.mics_kernels.consistency_losses.default
    others = (permuted(problem.teachers), permuted(problem.keys), permuted(problem.queues or []))
    lengths = [torch.tensor(50, device=device)] * 2
    ids = torch.arange(9, device=device)
    present = torch.rand(9, 2, device=device) > 0.3
    torch.library.opcheck(
        operator,
        (
            queries, *others, temperature, torch.tensor(0.4, device=device), lengths, ids, [],
            present, [0, 1], [1, 0], backend, wanted,
        ),
    )  # fmt: skip


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_replayed_cuda_graph_reads_temperature_alpha_and_length_anew(backend: str) -> None:
    if backend == "cpu":
        return
    problem = fixed_problem()
    features = [x.cuda().requires_grad_() for x in problem.features]
    teachers = [x.cuda() for x in problem.teachers]
    queues = [x.cuda() for x in problem.queues or []]
    temperature, alpha = torch.tensor(0.07).cuda(), torch.tensor(0.4).cuda()
    length = torch.tensor(300).cuda()

    def step() -> list[Tensor]:
        loss = multimodal_consistency_loss(
            features, teachers, queues, temperature=temperature, alpha=alpha,
            queue_lengths=[length, length], backend=backend,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, features)]

    graph, replayed = captured(step)
    temperature.fill_(0.2), alpha.fill_(0.1), length.fill_(17)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(replayed, step())


@pytest.mark.skipif(INTERPRETED, reason="C++ backend: needs a run without interpreter")
class TestTheNativeModule:
    def test_every_instruction_set_agrees(self, instruction_sets: Iterator[str]) -> None:
        for _ in instruction_sets:
            for rows, dim in ((1, 32), (9, 104), (33, 64)):
                assert_as_good_as_eager(fixed_problem(rows, dim), "cpu")

    def test_the_number_of_threads_does_not_change_a_bit(
        self, set_threads: Callable[[int], None]
    ) -> None:
        problem = replace(fixed_problem(600, queue=20000), reduction="none")
        results = []
        for count in (1, 3):
            set_threads(count)
            results.append(solve(problem, "cpu")[:2])
        assert_same_bits(*results)

    def test_parts_of_the_keys_are_combined_without_a_trace(self) -> None:
        problem = fixed_problem(5, queue=30000)
        assert_as_good_as_eager(problem, "cpu")
