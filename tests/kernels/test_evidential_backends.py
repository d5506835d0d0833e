"""Every fast implementation of the evidential operators against the float64 reference.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mics_kernels import evidential_fusion_loss, evidential_loss, fuse_evidence
from mics_kernels.backends import explain
from tests.kernels.implementations import BACKENDS, GPU, INTERPRETED, captured, device_of, on_device
from tests.kernels.properties import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS = 9 if INTERPRETED else 37

# Measured on each backend against float64: loss 6e-7 of its size, fused 5e-7, gradient 2e-6 of
# its largest entry (float32). A half-precision gradient is rounded once, to 8 or 11 bits.
GRADIENT_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(params=[*BACKENDS, *["cuda"] * GPU])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Problem:
    logits: Tensor
    target: Tensor
    present: Tensor | None
    weight: Tensor | None
    kl_weight: float
    activation: str
    reduction: str


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    classes = [2, 3, 5, 8, 17, 23, 64, 131] + ([] if INTERPRETED else [300, 1000])
    rows, views = draw(st.integers(0, 40)), draw(st.integers(1, 8))
    count = draw(st.sampled_from(classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 20.0]))
    logits = (torch.randn(rows, views, count, generator=generator) * scale).to(dtype)
    present = None
    if draw(st.booleans()):
        present = torch.rand(rows, views, generator=generator) > 0.4
        logits[~present] = float("nan")  # must never be read
    if draw(st.booleans()):
        target = torch.softmax(3 * torch.randn(rows, count, generator=generator), dim=1)
    else:
        target = torch.randint(count, (rows,), generator=generator)
        target[torch.rand(rows, generator=generator) < 0.2] = -100
    weight = torch.rand(rows, generator=generator) if draw(st.booleans()) else None
    return Problem(
        logits,
        target,
        present,
        weight,
        draw(st.sampled_from([0.0, 0.3, 1.0])),
        draw(st.sampled_from(["softplus", "exp", "relu"])),
        draw(st.sampled_from(["mean", "sum", "none"])),
    )


def solve(problem: Problem, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Loss, fused evidence and the gradient that arrives for a grad_out that is not 1."""
    device = device_of(backend)
    logits = on_device(problem.logits.detach(), device, dtype).requires_grad_()
    loss, fused = evidential_fusion_loss(
        logits,
        problem.target.to(device),
        kl_weight=problem.kl_weight,
        activation=problem.activation,
        present=None if problem.present is None else problem.present.to(device),
        weight=None if problem.weight is None else problem.weight.to(device),
        reduction=problem.reduction,
        backend=backend,
    )
    outer = torch.linspace(0.5, 1.5, loss.numel(), device=device).reshape(loss.shape)
    (gradient,) = torch.autograd.grad(loss, logits, outer.to(loss.dtype))
    assert loss.dtype == fused.dtype == (dtype or torch.float32)
    return [loss.detach().cpu(), fused.cpu(), gradient.cpu()]


def assert_close(ours: Tensor, exact: Tensor, relative: float, of_largest: float = 0.0) -> None:
    allowed = relative * exact.abs() + 1e-7
    if exact.numel():
        allowed = allowed + of_largest * exact.abs().max()
    error = (ours.double() - exact.double()).abs()
    assert bool((error <= allowed).all()), f"off by {error.max()}, largest {exact.abs().max()}"


@examples(60, interpreted=15)
@given(problem=problems())
def test_agrees_with_the_float64_reference(backend: str, problem: Problem) -> None:
    loss, fused, gradient = solve(problem, backend)
    exact_loss, exact_fused, exact_gradient = solve(problem, "reference", torch.float64)
    tolerance = GRADIENT_TOLERANCE[problem.logits.dtype]
    assert gradient.dtype == problem.logits.dtype
    # A sum of losses of fused evidence near 1e13: errors count against the largest row.
    assert_close(loss, exact_loss, 2e-6, 1e-6)
    assert_close(fused, exact_fused, 2e-6)
    assert_close(gradient, exact_gradient, tolerance, tolerance)


@examples(60, interpreted=15)
@given(problem=problems())
def test_opinions_and_fusion_alone_agree_too(backend: str, problem: Problem) -> None:
    results = []
    for name, dtype in ((backend, None), ("reference", torch.float64)):
        device = device_of(name)
        evidence = problem.logits.to(dtype=dtype).abs().to(device).detach().requires_grad_()
        present = None if problem.present is None else problem.present.to(device)
        loss = evidential_loss(
            evidence,
            problem.target.to(device),
            kl_weight=problem.kl_weight,
            present=present,
            weight=None if problem.weight is None else problem.weight.to(device),
            reduction=problem.reduction,
            backend=name,
        )
        fused = fuse_evidence(evidence, present=present, backend=name)
        (slope,) = torch.autograd.grad(loss.sum(), evidence)
        (fused_slope,) = torch.autograd.grad(fused.log1p().sum(), evidence)
        results.append([x.detach().cpu() for x in (loss, fused, slope, fused_slope)])
    tolerance = GRADIENT_TOLERANCE[problem.logits.dtype]
    for ours, exact, relative in zip(*results, (2e-6, 2e-6, tolerance, tolerance), strict=True):
        assert_close(ours, exact, relative, relative)


def fixed_problem(classes: int = 5, rows: int = ROWS, reduction: str = "none") -> Problem:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(rows, 3, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    return Problem(logits, target, None, None, 0.5, "softplus", reduction)


def test_serves_eight_views_of_4096_classes(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 4096, generator=generator)
    problem = Problem(logits, torch.tensor([7, 4095]), None, None, 0.5, "softplus", "none")
    exact = solve(problem, "reference", torch.float64)
    for ours, wanted in zip(solve(problem, backend), exact, strict=True):
        assert_close(ours, wanted, 2e-6, 2e-6)


@pytest.mark.parametrize("classes", [8, 200])
def test_the_order_of_views_does_not_matter(backend: str, classes: int) -> None:
    problem = fixed_problem(classes)
    loss, fused, gradient = solve(problem, backend)
    order = [2, 0, 1]
    problem.logits = problem.logits[:, order]
    other_loss, other_fused, other_gradient = solve(problem, backend)
    assert_close(other_loss, loss, 1e-6)
    assert_close(other_fused, fused, 1e-6)
    assert_close(other_gradient, gradient[:, order], 1e-6, 1e-6)


@pytest.mark.parametrize("classes", [8, 200])
def test_a_missing_view_changes_nothing(backend: str, classes: int) -> None:
    without = fixed_problem(classes)
    view = torch.full((ROWS, 1, classes), float("nan"))
    padded = fixed_problem(classes)
    padded.logits = torch.cat([padded.logits, view], dim=1)
    padded.present = torch.tensor([True, True, True, False]).repeat(ROWS, 1)
    loss, fused, gradient = solve(without, backend)
    padded_loss, padded_fused, padded_gradient = solve(padded, backend)
    assert torch.equal(padded_loss, loss)
    assert torch.equal(padded_fused, fused)
    assert torch.equal(padded_gradient[:, :3], gradient)
    assert torch.equal(padded_gradient[:, 3:], torch.zeros_like(view))


@pytest.mark.parametrize("classes", [8, 200])
def test_strided_and_misaligned_inputs_give_the_same_bits(backend: str, classes: int) -> None:
    problem = fixed_problem(classes)
    expected = solve(problem, backend)
    plain = problem.logits
    problem.logits = plain.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for ours, wanted in zip(solve(problem, backend), expected, strict=True):
        assert torch.equal(ours, wanted)
    storage = torch.empty(plain.numel() + 1)[1:]
    problem.logits = storage.copy_(plain.flatten()).view_as(plain)
    for ours, wanted in zip(solve(problem, backend), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    problem = fixed_problem(classes=23, rows=ROWS if INTERPRETED else 3000, reduction="mean")
    first = solve(problem, backend)
    for _ in range(3):
        for again, once in zip(solve(problem, backend), first, strict=True):
            assert torch.equal(again, once)


def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    problem = fixed_problem(classes=8, rows=19)
    whole = solve(problem, backend)
    problem.logits, problem.target = problem.logits[7:], problem.target[7:]
    loss, fused, _ = solve(problem, backend)
    assert torch.equal(loss, whole[0][7:])
    assert torch.equal(fused, whole[1][7:])


def test_a_second_backward_repeats_the_gradient(backend: str) -> None:
    problem = fixed_problem(reduction="mean")
    device = device_of(backend)
    for scale in (1.0, 3.0):
        logits = problem.logits.to(device).clone().requires_grad_()
        loss = evidential_fusion_loss(
            logits, problem.target.to(device), kl_weight=0.5, backend=backend
        ).loss
        (scale * loss).backward(retain_graph=True)
        assert logits.grad is not None
        once = logits.grad.clone()
        (scale * loss).backward()
        assert torch.equal(logits.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kl_weight_may_be_a_tensor(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    problem = fixed_problem(reduction="mean")
    results = []
    for kl_weight in (0.3, torch.tensor(0.3, dtype=dtype, device=device)):
        logits = problem.logits.to(device).clone().requires_grad_()
        target = problem.target.to(device)
        loss, _ = evidential_fusion_loss(logits, target, kl_weight=kl_weight, backend=backend)
        evidence = logits.detach().exp()
        single = evidential_loss(evidence, target, kl_weight=kl_weight, backend=backend)
        loss.backward()
        results.append((loss.detach(), logits.grad, single))
    for with_float, with_tensor in zip(*results, strict=True):
        assert torch.equal(with_float, with_tensor)


def test_a_double_backward_is_refused_in_words(backend: str) -> None:
    device = device_of(backend)
    evidence = torch.rand(4, 3, device=device).requires_grad_()
    target = torch.zeros(4, dtype=torch.int64, device=device)
    loss = evidential_loss(evidence, target, kl_weight=0.5, backend=backend)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, evidence, create_graph=True)


def test_a_nan_stays_in_its_row(backend: str) -> None:
    problem = fixed_problem(classes=8)
    problem.logits[3, 1, 2] = float("nan")
    loss, fused, gradient = solve(problem, backend)
    others = torch.arange(ROWS) != 3
    assert loss[3].isnan() and fused[3, 2].isnan() and gradient[3].isnan().any()
    assert loss[others].isfinite().all() and gradient[others].isfinite().all()


def test_a_batch_without_any_counted_row_has_loss_zero(backend: str) -> None:
    problem = fixed_problem(reduction="mean")
    problem.target = torch.full_like(problem.target, -100)
    loss, fused, gradient = solve(problem, backend)
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert bool((fused > 0).all())


def test_more_than_eight_views_are_left_to_the_reference(backend: str) -> None:
    evidence = torch.rand(2, 9, 3)
    assert explain("evidential", evidence).backend == "reference"
    with pytest.raises(RuntimeError, match="8 views"):
        fuse_evidence(evidence.to(device_of(backend)), backend=backend)


@pytest.mark.skipif(INTERPRETED, reason="compiled graph: needs a run without interpreter")
def test_compiles_into_one_graph_forward_and_backward(backend: str) -> None:
    device = device_of(backend)
    problem = fixed_problem(reduction="mean")
    target = problem.target.to(device)

    def total(logits: Tensor, kl_weight: float) -> Tensor:
        result = evidential_fusion_loss(logits, target, kl_weight=kl_weight, backend=backend)
        evidence = logits.exp()
        single = evidential_loss(evidence, target, kl_weight=kl_weight, backend=backend)
        return 2 * result.loss + single + fuse_evidence(evidence, backend=backend).log().mean()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(total, fullgraph=True)
    for kl_weight in (0.1, 0.2, 0.3, 0.4, 0.5):  # annealed: must not compile anew every step
        plain = problem.logits.to(device).clone().requires_grad_()
        traced = problem.logits.to(device).clone().requires_grad_()
        total(plain, kl_weight).backward()
        compiled(traced, kl_weight).backward()
        torch.testing.assert_close(traced.grad, plain.grad, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_registered_loss_passes_opcheck(
    backend: str, reduction: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # opcheck makes tensors of its own
    device = device_of(backend)
    permuted = torch.randn(6, 4, 3, device=device).permute(0, 2, 1).requires_grad_(wanted)
    target = torch.tensor([0, 1, 2, 3, -100, 0], device=device)
    kl_weight = torch.tensor(0.5, device=device)
    arguments = (permuted, target, kl_weight, "softplus", None, None, -100)
    operator = torch.ops.mics_kernels.evidential_loss.default
    torch.library.opcheck(operator, (*arguments, reduction, backend, wanted))


def test_the_registered_fusion_passes_opcheck(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    device = device_of(backend)
    evidence = torch.rand(6, 4, 3, device=device).permute(0, 2, 1).requires_grad_()
    present = torch.rand(6, 3, device=device) > 0.3
    operator = torch.ops.mics_kernels.fused_evidence.default
    torch.library.opcheck(operator, (evidence, present, backend))
    outer = torch.rand(6, 4, device=device)
    gradient = torch.ops.mics_kernels.fused_evidence_gradient.default
    torch.library.opcheck(gradient, (evidence.detach(), present, outer, backend))


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_replayed_cuda_graph_gives_the_same_bits(backend: str) -> None:
    if backend == "cpu":
        return
    problem = fixed_problem(reduction="mean")
    logits = problem.logits.cuda().requires_grad_()
    target = problem.target.cuda()

    def step() -> tuple[Tensor, Tensor]:
        loss = evidential_fusion_loss(logits, target, kl_weight=0.5, backend=backend).loss
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    graph, replayed = captured(step)
    graph.replay()
    torch.cuda.synchronize()
    for ours, wanted in zip(replayed, step(), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.skipif(INTERPRETED, reason="C++ backend: needs a run without interpreter")
class TestTheNativeModule:
    @pytest.mark.parametrize("classes", [8, 200])
    def test_every_instruction_set_agrees(
        self, classes: int, instruction_sets: Iterator[str]
    ) -> None:
        exact = solve(fixed_problem(classes), "reference", torch.float64)
        for _ in instruction_sets:
            for ours, wanted in zip(solve(fixed_problem(classes), "cpu"), exact, strict=True):
                assert_close(ours, wanted, 2e-6, 2e-6)

    def test_the_number_of_threads_does_not_change_a_bit(
        self, set_threads: Callable[[int], None]
    ) -> None:
        problem = fixed_problem(classes=8, rows=45001, reduction="mean")  # enough for threads
        set_threads(1)
        alone = solve(problem, "cpu")
        set_threads(3)
        together = solve(problem, "cpu")
        # The sum over rows is torch's own, and may depend on its threads.
        assert_close(together[0], alone[0], 1e-6)
        assert torch.equal(together[1], alone[1])
        assert torch.equal(together[2], alone[2])


def test_cpp_and_triton_read_the_same_coefficients() -> None:
    from pathlib import Path

    from mics_kernels import coefficients

    header = (Path(__file__).parents[2] / "csrc" / "special_coefficients.h").read_text()
    for line in header.replace("\\\n", "").splitlines():
        if line.startswith("#define"):
            _, name, values = line.split(maxsplit=2)
            numbers = tuple(float(x.rstrip("f")) for x in values.split(","))
            short = name.removeprefix("MICS_").removesuffix("_COEFFICIENTS")
            assert numbers == getattr(coefficients, short), short
