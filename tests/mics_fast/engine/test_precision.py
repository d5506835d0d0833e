"""The meaning of each precision on each device."""

from __future__ import annotations

import pytest
import torch

from mics_fast.engine.precision import pick_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "autocast", "tf32"),
    [("fp32", None, False), ("tf32", None, True), ("bf16", torch.bfloat16, True),
     ("fp16", torch.float16, True), ("auto", None, False)],
)  # fmt: skip
def test_a_name_says_how_numbers_are_held_and_multiplied(name, autocast, tf32):
    precision = pick_precision(name, CPU)
    assert (precision.autocast, precision.tf32) == (autocast, tf32)
    assert (precision.scaler(CPU) is not None) == (name == "fp16")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_on_a_gpu_auto_is_what_it_computes_in(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert pick_precision("auto", GPU).autocast is dtype


@pytest.mark.parametrize(("name", "products"), [("fp32", "highest"), ("tf32", "high")])
def test_products_are_set_for_the_run_alone(name, products):
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), pick_precision(name, CPU).products():
        assert torch.get_float32_matmul_precision() == products
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
