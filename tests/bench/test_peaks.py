"""Peaks: the best of several tries, never below what is measured beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import peaks
from bench.peaks import LARGEST, bandwidth_of, flops_of, peaks_of, probe, rate
from bench.roofline import Work, floor_seconds

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forget figures of other tests, keep none for them, and make tries short."""
    monkeypatch.setattr(peaks, "SECONDS", 1e-4)
    kept = (probe, flops_of, bandwidth_of)
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


class Library:
    """A stand-in for probe.c, with streams of made-up speed, in rounds per second."""

    def __init__(self, **speeds: float) -> None:
        self.speeds = speeds

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: (name, arguments)

    def fma_flops(self) -> int:
        return 64

    def bf16_flops(self) -> int:
        return 0


@pytest.mark.parametrize("fastest", ["read", "copy", "whole"])
def test_bandwidth_is_that_of_the_fastest_stream_over_the_bytes_of_the_case(
    fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def speed(rounds: Any, threads: int, work: int, arguments: Any) -> float:
        name, given = rounds(3, *arguments[0])
        kind = {"read_passes": "read", "copy_passes": "whole" if given[-1] == 1 else "copy"}[name]
        assert given[1:3] == (work, 3) and given[0] % 64 == 0 and len(arguments) == threads
        sizes.append(threads * work)
        return 2.0 if kind == fastest else 1.0

    monkeypatch.setattr(peaks, "probe", Library)
    monkeypatch.setattr(peaks, "rate", speed)
    assert bandwidth_of(CPU, 10_000_000, 2) == 2.0
    assert sizes == pytest.approx([10_000_000] * 3, rel=0.05)
    bandwidth_of(CPU, 100 * LARGEST, 2)  # no more memory than it takes to leave every cache
    assert max(sizes) == LARGEST


def test_bfloat16_may_have_units_that_only_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "probe", Library)
    monkeypatch.setattr(peaks, "rate", lambda *arguments: 5.0)
    monkeypatch.setattr(peaks, "product", lambda device, dtype: 9.0)
    assert flops_of(CPU, torch.bfloat16, 1) == 9.0
    assert flops_of(CPU, torch.float32, 1) == 5.0


def test_a_rate_is_of_all_threads_and_the_best_try(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter([0.02, 0.05, 0.03, 0.025, 0.04, 0.08])
    monkeypatch.setattr(peaks, "SECONDS", 0.02)
    monkeypatch.setattr(peaks, "together", lambda *arguments: next(tries))
    assert rate(lambda *_: None, 2, 64, [(), ()]) == pytest.approx(2 * 64 / 0.02)


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
def test_no_product_of_torch_beats_the_multiply_adds_and_no_copy_the_streams(
    set_threads: Callable[[int], None],
) -> None:
    """Limits are the best of up to twenty tries: other processes only ever lower them."""
    assert probe() is not None
    source = torch.ones(2**20)
    target = torch.empty_like(source)
    set_threads(1)
    product = peaks.product(CPU, torch.float32)
    copied = 2 * source.nbytes / peaks.best_of(lambda: target.copy_(source), CPU, 0.05)
    single = stream = 0.0
    for _ in range(20):
        for one in (flops_of, bandwidth_of):
            one.cache_clear()
        single = max(single, flops_of(CPU, torch.float32, 1))
        stream = max(stream, bandwidth_of(CPU, 2 * source.nbytes, 1))
        if product < 1.5 * single and copied < 1.5 * stream:
            break
    assert 1e9 < product < 1.5 * single
    assert copied < 1.5 * stream


def test_without_a_compiler_the_floor_says_that_it_is_torch_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(peaks, "copy", lambda device: 2.0)
    monkeypatch.setattr(peaks, "product", lambda device, dtype: 3.0)
    found = peaks_of(CPU, 1000)
    assert (found.bytes, found.matrix_flops, found.vector_flops) == (2.0, 3.0, 3.0)
    assert found.reached and "torch's own" in found.source


@pytest.mark.parametrize(
    ("name", "bandwidth"), [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H200", 4.8e12)]
)
def test_of_known_gpus_the_data_sheet_counts(
    name: str, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peaks_of(GPU, 1000)
    assert found.bytes == bandwidth and not found.reached
    assert flops_of(GPU, torch.bfloat16, 1) == 989e12 and flops_of(GPU, torch.float32, 1) == 67e12
    assert floor_seconds(Work(0, 989 * 10**12, matrix=True), found) == 1.0


def test_another_h100_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PCIe card has slower memory and clocks."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")
    monkeypatch.setattr(peaks, "copy", lambda device: 2.0)
    monkeypatch.setattr(peaks, "product", lambda device, dtype: 3.0)
    assert peaks_of(GPU, 1000).bytes == 2.0
