"""The meaning of each precision on each device."""

from __future__ import annotations

import pytest
import torch

from mics_fast.engine import precision
from mics_fast.engine.precision import pick_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "autocast", "tf32"),
    [("fp32", None, False), ("tf32", None, True), ("bf16", torch.bfloat16, True),
     ("fp16", torch.float16, True)],
)  # fmt: skip
def test_a_name_says_how_numbers_are_held_and_multiplied(name, autocast, tf32):
    picked = pick_precision(name, CPU)
    assert (picked.autocast, picked.tf32) == (autocast, tf32)
    assert (picked.scaler(CPU) is not None) == (name == "fp16")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_on_a_gpu_auto_is_what_it_computes_in(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert pick_precision("auto", GPU).autocast is dtype


@pytest.mark.parametrize(("speedup", "dtype"), [(2.0, torch.bfloat16), (0.9, None)])
def test_on_a_cpu_auto_is_bf16_where_it_is_faster(monkeypatch, speedup, dtype):
    monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)
    assert pick_precision("auto", CPU).autocast is dtype


def test_the_speed_of_bf16_follows_the_clock(monkeypatch):
    # Each product is timed by two readings; float32 and bfloat16 take turns.
    ticks = iter(
        [t for turn in range(8) for t in (10 * turn, 10 * turn + 3, 10 * turn + 5, 10 * turn + 6)]
    )
    monkeypatch.setattr(precision, "perf_counter", lambda: next(ticks))
    assert precision.bf16_speedup.__wrapped__() == 3.0


@pytest.mark.parametrize(("name", "products"), [("fp32", "highest"), ("tf32", "high")])
def test_products_are_set_for_the_run_alone(name, products):
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), pick_precision(name, CPU).products():
        assert torch.get_float32_matmul_precision() == products
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
