"""Operators under everything that is not a plain tensor in eager mode.

Tracers, dispatch modes, functorch's transforms, lazy tensors and subclasses: the operator gives
what its reference gives, or refuses in a sentence that names ``backend="reference"``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import mics_kernels as mk
from mics_kernels.addresses import address
from tests.kernels.operators import KEYS, LABELS, OPERATORS, TEACHER, VARIANCE, WEIGHT, Loss

CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> tuple[Loss, Tensor]:
    """Each operator, with an input."""
    return OPERATORS[request.param]


def gradient_by_reference(loss: Loss, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x, "reference"), x)[0]


# --- Forward-mode differentiation -----------------------------------------------------------------


def test_a_dual_number_is_refused_by_name_of_the_reference(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match='backend="reference"'),
    ):
        loss(forward_ad.make_dual(x, torch.ones_like(x)), None)


def test_the_reference_has_a_forward_derivative(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            loss(forward_ad.make_dual(x, torch.ones_like(x)), "reference")
        ).tangent
    torch.testing.assert_close(tangent, gradient_by_reference(loss, x).sum(), **CLOSE)


def test_a_plain_tensor_beside_dual_numbers_is_served(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    with forward_ad.dual_level():
        torch.testing.assert_close(loss(x, None), loss(x, "reference"), **CLOSE)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_functional_forward_derivatives_are_refused(
    operator: tuple[Loss, Tensor], transform: Any
) -> None:
    loss, x = operator
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        transform(lambda z: loss(z, None))(x)


def test_a_tangent_of_a_constant_is_refused_too() -> None:
    def of_teacher(teacher: Tensor) -> Tensor:
        return mk.consistency_loss(TEACHER, teacher, KEYS, temperature=0.1)

    def of_variance(variance: Tensor) -> Tensor:
        return mk.shift_features(TEACHER, LABELS, variance, strength=1.0, seed=torch.tensor([0, 0]))

    for function, x in ((of_teacher, TEACHER), (of_variance, VARIANCE)):
        with pytest.raises(NotImplementedError, match='backend="reference"'):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


# --- functorch ------------------------------------------------------------------------------------


def test_a_functional_gradient_is_the_gradient(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    gradient, value = torch.func.grad_and_value(lambda z: loss(z, None))(x)
    torch.testing.assert_close(gradient, gradient_by_reference(loss, x), **CLOSE)
    torch.testing.assert_close(value, loss(x, "reference"), **CLOSE)


def test_a_vectorised_call_is_a_call_for_each_entry(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    batch = torch.stack([x, 0.5 * x, 0.1 * x])
    values = torch.vmap(lambda z: loss(z, None))(batch)
    torch.testing.assert_close(values, torch.stack([loss(z, None) for z in batch]), **CLOSE)
    gradients = torch.vmap(torch.func.grad(lambda z: loss(z, None)))(batch)
    wanted = torch.stack([gradient_by_reference(loss, z) for z in batch])
    torch.testing.assert_close(gradients, wanted, **CLOSE)


def test_the_gradient_of_a_vectorised_call_is_the_sum_of_gradients(
    operator: tuple[Loss, Tensor],
) -> None:
    loss, x = operator
    factors = torch.tensor([1.0, 0.5])

    def total(z: Tensor, backend: str | None) -> Tensor:
        return torch.vmap(lambda factor: loss(factor * z, backend))(factors).sum()

    gradient = torch.func.grad(lambda z: total(z, None))(x)
    wanted = sum(factor * gradient_by_reference(loss, factor * x) for factor in factors)
    torch.testing.assert_close(gradient, wanted, **CLOSE)


def test_jacobians_agree_with_the_gradient(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    wanted = gradient_by_reference(loss, x)
    for jacobian in (
        torch.func.jacrev(lambda z: loss(z, None))(x),
        torch.autograd.functional.jacobian(lambda z: loss(z, None), x, vectorize=True),
    ):
        torch.testing.assert_close(jacobian, wanted, **CLOSE)


def test_the_weight_of_a_shifted_head_gets_its_functional_gradient() -> None:
    def loss(weight: Tensor, backend: str | None) -> Tensor:
        logits = TEACHER @ weight.T
        return mk.shifted_cross_entropy(
            logits, LABELS, weight, VARIANCE, strength=0.5, backend=backend
        )

    gradient = torch.func.grad(lambda w: loss(w, None))(WEIGHT)
    torch.testing.assert_close(gradient, gradient_by_reference(loss, WEIGHT), **CLOSE)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda w: torch.func.grad(lambda v: loss(v, None))(w).square().sum())(
            WEIGHT
        )


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "shift_features"])
def test_a_second_functional_derivative_is_refused_not_zero(name: str) -> None:
    loss, x = OPERATORS[name]
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda z: torch.func.grad(lambda y: loss(y, None))(z).square().sum())(x)


def test_fused_evidence_of_a_loss_stays_a_constant_in_a_transform() -> None:
    def total(logits: Tensor, backend: str | None) -> Tensor:
        output = mk.evidential_fusion_loss(logits, LABELS, kl_weight=0.5, backend=backend)
        return output.loss + output.fused_evidence.sum()

    x = OPERATORS["evidential_fusion_loss"][1]
    gradient = torch.func.grad(lambda z: total(z, None))(x)
    torch.testing.assert_close(gradient, gradient_by_reference(total, x), **CLOSE)


# --- Tracers and dispatch modes -------------------------------------------------------------------


def test_a_fake_tensor_gives_a_fake_result(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = loss(mode.from_tensor(x), None)
    assert isinstance(result, FakeTensor) and result.shape == ()


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_a_traced_graph_computes_for_other_inputs(
    operator: tuple[Loss, Tensor], tracing_mode: str
) -> None:
    loss, x = operator
    graph = make_fx(
        lambda z: loss(z, None), tracing_mode=tracing_mode, _allow_non_fake_inputs=True
    )(x)
    torch.testing.assert_close(graph(0.5 * x), loss(0.5 * x, None), **CLOSE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_torchscript_trace_computes_for_other_inputs(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    traced = torch.jit.trace(lambda z: loss(z, None), (x,), check_trace=False)
    other = (0.5 * x).requires_grad_()
    value = traced(other)
    torch.testing.assert_close(value, loss(0.5 * x, None), **CLOSE)
    (gradient,) = torch.autograd.grad(value, other)
    torch.testing.assert_close(gradient, gradient_by_reference(loss, 0.5 * x), **CLOSE)


def test_a_dispatch_mode_sees_the_operator(operator: tuple[Loss, Tensor]) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    loss, x = operator
    x = x.clone().requires_grad_()
    with Watch():
        value = loss(x, None)
        (gradient,) = torch.autograd.grad(value, x)
    assert any(name.startswith("mics_kernels") for name in seen)
    torch.testing.assert_close(value, loss(x, None))
    torch.testing.assert_close(gradient, gradient_by_reference(loss, x), **CLOSE)


# --- Tensors that are not plain -------------------------------------------------------------------


class Named(Tensor):
    """A subclass with memory of its own."""


def test_a_subclass_is_served_through_torch(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    torch.testing.assert_close(loss(x.as_subclass(Named), None).as_subclass(Tensor), loss(x, None))


def test_a_lazily_negated_input_is_negated(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(loss(lazy, None), loss(x, None))


def test_a_lazily_negated_constant_is_negated() -> None:
    lazy = torch.complex(torch.zeros_like(TEACHER), -TEACHER).conj().imag
    wanted = mk.consistency_loss(KEYS, TEACHER, KEYS, temperature=0.1)
    assert lazy.is_neg()
    assert torch.equal(mk.consistency_loss(KEYS, lazy, KEYS, temperature=0.1), wanted)


def test_a_zero_without_memory_is_a_zero() -> None:
    zeros = torch._efficientzerotensor((4, 5))
    ours = mk.shifted_cross_entropy(zeros, LABELS, WEIGHT, VARIANCE, strength=0.5)
    wanted = mk.shifted_cross_entropy(torch.zeros(4, 5), LABELS, WEIGHT, VARIANCE, strength=0.5)
    torch.testing.assert_close(ours, wanted)


def test_a_sparse_tensor_is_refused(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    with pytest.raises(TypeError, match="must be a dense tensor, got layout sparse_coo"):
        loss(x.to_sparse(), None)


def test_an_address_of_a_tensor_without_memory_is_refused() -> None:
    with pytest.raises(RuntimeError, match='backend="reference"'):
        address(torch._efficientzerotensor((2,)))


# --- Gradients that others write into -------------------------------------------------------------


def test_writing_into_a_gradient_leaves_the_next_one_alone(operator: tuple[Loss, Tensor]) -> None:
    loss, x = operator
    x = x.clone().requires_grad_()
    value = loss(x, None)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    wanted = first.clone()
    first.mul_(0.5)
    (second,) = torch.autograd.grad(value, x, retain_graph=True)
    assert torch.equal(second, wanted)
    second.zero_()
    value.backward()
    assert torch.equal(x.grad, wanted)
