"""Peak memory of a call beyond what it was given, in MB (2**20 bytes).

On a GPU as its allocator counts it. On a CPU it is the peak of the resident size (Linux), in a
process of its own, because what other implementations have left behind would be counted or used.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import subprocess
import sys
from pathlib import Path

import torch

from bench.case import Case, Step

STATUS = Path("/proc/self/status")


def extra_megabytes(
    subject: str, case: Case, name: str, step: Step, device: torch.device
) -> float | None:
    """Of implementation ``name`` of a subject's case; None where nothing tells it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "bench.memory", subject, case.operator, case.shape, name]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    return float(done.stdout.splitlines()[-1])


def weigh(case: Case, name: str) -> float:
    """On a CPU, in this process. Before comes a call on tiny inputs, for what stays of a first
    call; of torch.compile one of full size, which compiles, and whose memory is given back."""
    device = torch.device("cpu")
    step = case.make(device, False).steps[name]
    (step if "compiled" in name else case.make(device, True).steps[name])()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident_megabytes("VmRSS")
    step()
    return resident_megabytes("VmHWM") - before


def resident_megabytes(entry: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, as Linux counts it."""
    lines = STATUS.read_text().splitlines()
    return next(float(line.split()[1]) / 2**10 for line in lines if line.startswith(entry))


if __name__ == "__main__":
    subject, operator, shape, name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    cases = importlib.import_module(f"bench.{subject}").cases(torch.device("cpu"))
    wanted = next(case for case in cases if (case.operator, case.shape) == (operator, shape))
    print(weigh(wanted, name))
