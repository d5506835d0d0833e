"""Peak memory of a call beyond its inputs, in MB (2**20 bytes).

On a GPU the allocator counts it. On a CPU it is the peak of the resident size (Linux) in a child
process, because memory freed by other implementations would be counted, or reused.
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
from bench.machine import ROOT

CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")


def extra_megabytes(
    subject: str, case: Case, name: str, step: Step, device: torch.device
) -> float | None:
    """Measure the peak memory of an implementation; None if the system does not report it.

    Args:
        subject: module of the case.
        name: the implementation.
        step: one call of it.
    """
    if device.type == "cuda":
        begin = start_peak(device)
        step()
        return None if begin is None else end_peak(device) - begin
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "bench.memory", subject, case.operator, case.shape, name]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout.splitlines()[-1])


def weigh(case: Case, name: str) -> float:
    """Measure an implementation on a CPU, in this process.

    A call on tiny inputs comes first, for memory that stays allocated after any first call.
    torch.compile needs a full-size call instead, which compiles, and whose memory is then freed.

    Raises:
        SystemExit: the system does not report peaks.
    """
    rival = case.make(CPU, False).found[name]
    (rival if rival.compiled else case.make(CPU, True).found[name]).step()
    begin = start_peak(CPU)
    if begin is None:
        raise SystemExit("peaks of the resident size need Linux with the GNU C library")
    rival.step()
    return end_peak(CPU) - begin


def start_peak(device: torch.device) -> float | None:
    """Return the MB in use and restart the peak from there; None if unknown.

    On a CPU: resident memory, after the allocator has returned unused memory.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    library = ctypes.CDLL(None)
    if not STATUS.exists() or not hasattr(library, "malloc_trim"):
        return None
    library.malloc_trim(0)
    STATUS.with_name("clear_refs").write_text("5")
    return resident_megabytes("VmRSS")


def end_peak(device: torch.device) -> float:
    """Return the peak MB in use since ``start_peak``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_megabytes("VmHWM")


def resident_megabytes(entry: str) -> float:
    """Read VmRSS (now) or VmHWM (peak) of this process from Linux."""
    lines = STATUS.read_text().splitlines()
    return next(float(line.split()[1]) / 2**10 for line in lines if line.startswith(entry))


def private_megabytes(process: int) -> float:
    """Read the memory that a process shares with no other from Linux."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("Private_")) / 2**10


if __name__ == "__main__":
    subject, operator, shape, name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    cases = importlib.import_module(f"bench.{subject}").cases(CPU)
    wanted = next(case for case in cases if (case.operator, case.shape) == (operator, shape))
    print(weigh(wanted, name))
