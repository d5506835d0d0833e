"""How fast a stage trains, what it waits for, and how much memory it takes."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

from mics_fast.engine.distributed import world_size

# Dense bf16 of the SXM boards, TFLOP/s (NVIDIA's data sheets). Whole names: those of the PCIe and
# NVL boards and of a GPU's slices (MIG) begin alike, and their peaks are lower.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}


class Meter:
    """Counts steps and the pairs of all ranks, and how long this one waited for them.

    Args:
        device: where it trains.
        before: seconds that earlier processes spent on this stage.
        flops: floating-point operations of a step over all ranks; 0: not known.
        peak_tflops: of each rank's device, in TFLOP/s; None: not known.
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
        self._steps, self._pairs, self._waited = 0, 0, 0.0

    def take(self, batches: Iterator[Any]) -> Any:
        """The next batch, a tuple of parts; its step, its pairs and the wait for it are counted."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        self._steps += 1
        self._pairs += world_size() * sum(len(part.label) for part in batch)
        return batch

    def seconds(self) -> float:
        """Since the stage began, over all processes."""
        return time.perf_counter() - self._start

    def read(self, steps_left: int) -> dict[str, float]:
        """``seconds`` since the beginning; since the last ``restart`` pairs a second, ms a step,
        the share of the time that waited for data, TFLOP/s and MFU where they are known; peak
        memory (of a GPU: allocated by torch; else: of the process) and the seconds to go."""
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

    def restart(self) -> None:
        """Begin the next interval."""
        self._last = time.perf_counter()
        self._steps, self._pairs, self._waited = 0, 0, 0.0


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a GPU, else the most the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_tflops(device: torch.device) -> float | None:
    """What a device that is known can do, in TFLOP/s; None: it is not."""
    if device.type != "cuda":
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
