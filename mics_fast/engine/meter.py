"""Meters of training: throughput, waiting time, memory, FLOP/s."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

from mics_fast.engine.distributed import world_size

# Dense bf16 peak of the SXM boards, TFLOP/s (NVIDIA's data sheets). Names are matched as a whole:
# the PCIe and NVL boards and MIG slices have the same prefix, but lower peaks.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}


class Meter:
    """Counts steps and pairs over all ranks, and measures how long this rank waited for data.

    Args:
        device: training device.
        before: seconds that earlier processes spent on this stage.
        flops: floating-point operations per step over all ranks; 0: unknown.
        peak_tflops: of each rank's device, in TFLOP/s; None: unknown.
    """

    def __init__(
        self,
        device: torch.device,
        before: float = 0.0,
        flops: float = 0.0,
        peak_tflops: float | None = None,
    ) -> None:
        self.device, self.flops, self.peak_tflops = device, flops, peak_tflops
        self._last = time.perf_counter()
        self._start = self._last - before
        self._began = self._last
        self._steps, self._pairs, self._waited = 0, 0, 0.0
        self._earlier = (0, 0, 0.0)  # the same before the last restart

    def take(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, and count the waiting time."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    def count(self, batch: Any) -> None:
        """Count a step and the pairs of its batch, a tuple of parts."""
        self._steps += 1
        self._pairs += world_size() * sum(len(part.label) for part in batch)

    def seconds(self) -> float:
        """Return the seconds since the stage began, over all processes."""
        return time.perf_counter() - self._start

    def read(self, steps_left: int) -> dict[str, float]:
        """Read the meters of this interval.

        ``seconds`` counts from the beginning of the stage. Since the last ``restart``: pairs per
        second, ms per step, share of time spent waiting for data, and, if known, TFLOP/s and MFU.
        Also the peak memory (of a GPU: allocated by torch; otherwise: of the process) and the
        seconds to go."""
        elapsed = max(time.perf_counter() - self._last, 1e-9)
        per_step = elapsed / max(1, self._steps)
        values = {
            "seconds": self.seconds(),
            "pairs_per_second": self._pairs / elapsed,
            "ms_per_step": 1000 * per_step,
            "data_wait": self._waited / elapsed,
            "memory_gib": peak_memory(self.device) / 2**30,
            "seconds_left": steps_left * per_step,
        }
        if self.flops:
            values["tflops"] = self.flops / per_step / 1e12
            if self.peak_tflops:
                values["mfu"] = values["tflops"] / (self.peak_tflops * world_size())
        return values

    def summary(self) -> str:
        """Say how fast this process trained since its beginning, validation included."""
        steps, pairs, waited = map(sum, zip(self._earlier, self._interval(), strict=True))
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        parts = [
            f"{steps} steps in {clock(elapsed)}",
            f"{pairs / elapsed:.0f} pairs/s",
            f"data wait {waited / elapsed:.0%}",
            f"{peak_memory(self.device) / 2**30:.2f} GiB",
        ]
        if self.flops:
            parts.append(f"{self.flops / 1e9:.4g} GFLOP per step")
        return ", ".join(parts)

    def _interval(self) -> tuple[int, int, float]:
        return self._steps, self._pairs, self._waited

    def restart(self) -> None:
        """Start the next interval."""
        before, own = self._earlier, self._interval()
        self._earlier = (before[0] + own[0], before[1] + own[1], before[2] + own[2])
        self._last = time.perf_counter()
        self._steps, self._pairs, self._waited = 0, 0, 0.0


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes that torch allocated on a GPU, or the process's peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a known device, in TFLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
