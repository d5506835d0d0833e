"""Rounding that differs between a GPU and Triton's interpreter: fused ``a * b + c``, and exp.

``TRITON_INTERPRET=1 pytest <this file>``; on a GPU, as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.implementations import GPU, INTERPRETED

pytestmark = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="needs an NVIDIA GPU or TRITON_INTERPRET=1"
)
if GPU or INTERPRETED:
    from mics_kernels import consistency_loss, evidential_fusion_loss
    from mics_kernels.consistency import triton_kernels


def rounded_once(plain: Callable[..., Any], sign: float) -> Callable[..., Any]:
    """A sum of two float32 tensors of which one may be a product that was not rounded."""

    def combined(builder: Any, a: Any, b: Any) -> Any:
        result = plain(builder, a, b)
        exact = [getattr(x, "unrounded", None) for x in (a, b)]
        if result.data.dtype == np.float32 and any(x is not None for x in exact):
            first = a.data.astype(np.float64) if exact[0] is None else exact[0]
            # A GPU takes one of two products as it is.
            second = b.data if exact[1] is None or exact[0] is not None else exact[1]
            result.data = (first + sign * second).astype(np.float32)
        return result

    return combined


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    multiply = Builder.create_fmul

    def product(builder: Any, a: Any, b: Any) -> Any:
        result = multiply(builder, a, b)
        if result.data.dtype == np.float32:
            result.unrounded = a.data.astype(np.float64) * b.data
        return result

    def approximate_exp(builder: Any, a: Any) -> Any:
        """Two to the power of what tl.exp rounds first."""
        result = exponential(builder, a)
        rounded = a.data * np.float32(1.44269504)
        result.data = np.exp2(rounded.astype(np.float64)).astype(np.float32)
        return result

    exponential = Builder.create_exp
    monkeypatch.setattr(Builder, "create_exp", approximate_exp)
    monkeypatch.setattr(Builder, "create_fmul", product)
    monkeypatch.setattr(Builder, "create_fadd", rounded_once(Builder.create_fadd, 1.0))
    monkeypatch.setattr(Builder, "create_fsub", rounded_once(Builder.create_fsub, -1.0))


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_a_sum_over_many_tiles_of_keys_neither_fades_nor_grows(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "splits_for", lambda *_: 1)  # all keys in one program
    device = "cuda" if GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, 16, generator=generator) for n in (4, 4, 4, 1600)]
    query, teacher, keys, queue = (torch.nn.functional.normalize(x).to(device) for x in made)
    losses, exact = (
        consistency_loss(
            query.to(dtype),
            teacher,
            keys,
            queue,
            temperature=temperature,
            alpha=0.0,
            reduction="none",
            backend=backend,
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    # Measured: 8e-7 and 1.6e-5, of the products alone; 1.6e-5 and 1e-4 where each tile adds some.
    assert (losses - exact).abs().max() < 1e-6 + 2e-7 / temperature


def test_evidence_is_the_exponential_to_the_last_digits() -> None:
    device = "cuda" if GPU else "cpu"
    logits = torch.linspace(-10, 10, 2000).reshape(20, 1, 100).to(device)
    target = torch.zeros(20, dtype=torch.int64, device=device)
    fused = evidential_fusion_loss(
        logits, target, kl_weight=0.0, activation="exp", backend="triton"
    ).fused_evidence
    exact = logits[:, 0].double().exp()
    # Measured: 1.7e-7; with tl.exp alone 5.3e-7, and eight views multiply that. A GPU's powers of
    # two, of which there are two here, are themselves off by up to 1.7e-7 each.
    assert (fused / exact - 1).abs().max() < (3e-7 if INTERPRETED else 6e-7)
