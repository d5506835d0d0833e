"""Promises of shift, moments and shifted cross-entropy: the same bits, graphs, registration.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mics_kernels import class_moments, shift_features, shifted_cross_entropy
from mics_kernels.backends import explain
from tests.kernels.implementations import BACKENDS, INTERPRETED, device_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SEED = (2**40 + 17, 5)


def everything(backend: str, rows: int = 37) -> list[Tensor]:
    """Run every operator of the folder on one batch, with labels and with posteriors."""
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


def bound_calls() -> dict[str, tuple[object, ...]]:
    device = device_of("triton")
    target = torch.tensor([0, 1, -1, 2, 2, 0], device=device)
    variance, strength = torch.rand(3, 5, device=device), torch.tensor(0.5, device=device)
    logits = torch.randn(3, 6, device=device).T.requires_grad_()
    weight = torch.randn(5, 3, device=device).T.requires_grad_()
    plain, head = logits.detach(), weight.detach()
    sums, outer = torch.tensor([[5.0, 1.0]], device=device), torch.tensor(0.7, device=device)
    by_row = torch.rand(6, device=device)
    given = (target, head, variance)
    return {
        "shifted_cross_entropy": (
            logits, target, weight, variance, strength, "mean", "triton", True,
        ),
        "shifted_cross_entropy alone": (plain, *given, by_row, "none", "triton", False),
        "shifted_cross_entropy_gradient": (
            plain, sums, *given, strength, outer, "mean", "triton", True,
        ),
        "shifted_cross_entropy_gradient by row": (
            plain, sums, *given, by_row, by_row, "none", "triton", False,
        ),
    }  # fmt: skip


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton on a GPU or interpreted")
@pytest.mark.parametrize(
    "call",
    ["shifted_cross_entropy", "shifted_cross_entropy alone", "shifted_cross_entropy_gradient",
     "shifted_cross_entropy_gradient by row"],
)  # fmt: skip
def test_the_registered_bound_passes_opcheck(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck makes tensors of its own
    operator = getattr(torch.ops.mics_kernels, call.partition(" ")[0]).default
    torch.library.opcheck(operator, bound_calls()[call])


@pytest.mark.skipif(INTERPRETED, reason="C++ backend: needs a run without interpreter")
class TestTheNativeModule:
    def test_every_instruction_set_agrees(self, instruction_sets: Iterator[str]) -> None:
        expected = everything("cpu")
        for _ in instruction_sets:
            for ours, wanted in zip(everything("cpu"), expected, strict=True):
                torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=4e-6)

    def test_the_number_of_threads_does_not_change_a_bit(
        self, set_threads: Callable[[int], None]
    ) -> None:
        set_threads(1)
        alone = everything("cpu", rows=20_000)  # enough for threads
        set_threads(3)
        together = everything("cpu", rows=20_000)
        # The head's logits and weights are torch's own products, which may depend on its threads.
        for ours, wanted in zip(together[:-3], alone[:-3], strict=True):
            assert torch.equal(ours, wanted)
