"""The meter's figures are those of the interval, checked with a fake clock."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mics_fast.engine import meter
from mics_fast.engine.meter import Meter, peak_tflops

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock set by the test: ``clock.now = 3``."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def batches(clock, wait):
    while True:
        clock.now += wait
        yield (SimpleNamespace(label=range(3)), SimpleNamespace(label=range(5)))


def test_an_interval_is_measured_from_the_last_one(clock):
    measured = Meter(CPU, before=50.0, flops=4e12, peak_tflops=20.0)
    stream = batches(clock, wait=0.5)
    for _ in range(4):
        measured.count(measured.take(stream))
        clock.now += 1.5
    values = measured.read(steps_left=10)
    assert values.pop("memory_gib") > 0
    assert values == pytest.approx(
        {"seconds": 58, "pairs_per_second": 4, "ms_per_step": 2000, "data_wait": 0.25,
         "seconds_left": 20, "tflops": 2, "mfu": 0.1}
    )  # fmt: skip
    measured.restart()
    measured.count(measured.take(stream))
    clock.now += 0.5
    assert measured.read(9)["ms_per_step"] == pytest.approx(1000)


def test_no_share_of_a_peak_that_is_not_known(clock):
    for flops, peak, named in ((0.0, 10.0, set()), (1e9, None, {"tflops"})):
        measured = Meter(CPU, flops=flops, peak_tflops=peak)
        clock.now += 1
        assert {"tflops", "mfu"} & set(measured.read(1)) == named
    assert peak_tflops(CPU) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989.0), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", None),
     ("NVIDIA H200 NVL", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None)],
)  # fmt: skip
def test_the_peak_of_a_gpu_that_is_known(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak


def test_memory_on_a_cpu_is_the_most_the_process_held():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    assert meter.peak_memory(CPU) == pytest.approx(1024 * int(line.split()[1]), rel=0.02)
