"""What a benchmark ran on, and what that machine does at most."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.roofline import Peaks

ROOT = Path(__file__).resolve().parents[1]
# bytes/s, and FLOP/s of dense bfloat16 products and of float32 outside tensor cores, by name of the
# GPU, all of it: a PCIe or NVL board or a slice (MIG) does less; as their data sheets give them.
DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": Peaks(3.35e12, 989e12, 67e12, "data sheet of the H100 SXM"),
    "NVIDIA H200": Peaks(4.8e12, 989e12, 67e12, "data sheet of the H200"),
}


def machine(device: torch.device) -> dict[str, object]:
    """Processor, versions, threads, commit and command: what a stored result needs."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "kind": device.type,
        "cpu": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_clock": clock_of_cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "gpu": from_nvidia_smi("name,driver_version,clocks.sm,clocks.mem,clocks.max.sm"),
        "commit": commit(),
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%dT%H%M", time.gmtime()),
    }


def processor() -> str:
    """Model name of the CPU, as Linux tells it."""
    return from_cpuinfo("model name") or platform.machine()


def clock_of_cpu() -> str:
    """MHz of the first core now; "" where nothing tells it."""
    return from_cpuinfo("cpu MHz")


def from_cpuinfo(entry: str) -> str:
    """The first such entry of /proc/cpuinfo, or ""."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(entry)), "")


def version(package: str) -> str | None:
    """Installed version of a package, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(command: list[str]) -> str:
    """What a command prints, "" where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def from_nvidia_smi(entries: str) -> str:
    """Of the first GPU: name, driver, clocks."""
    lines = output_of(["nvidia-smi", f"--query-gpu={entries}", "--format=csv,noheader"])
    return lines.splitlines()[0] if lines else ""


def commit() -> str:
    """Of the work tree, with "-changed" where it differs from it; "unknown" outside git."""
    short = output_of(["git", "rev-parse", "--short", "HEAD"])
    changed = output_of(["git", "status", "--porcelain", "--untracked-files=no"])
    return (short or "unknown") + ("-changed" if changed else "")


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def peaks_of(device: torch.device) -> Peaks:
    """Bandwidth and FLOP/s with the threads that are set: of known GPUs from the data sheet, else
    measured here: the best of a second of copies, and of matrix products (of float32 on a CPU,
    where they are the peak of every other multiply-add, too)."""
    if device.type == "cuda":
        known = DATA_SHEETS.get(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    bandwidth = measured_bandwidth(device)
    single = measured_product(device, torch.float32)
    matrix = single if device.type == "cpu" else measured_product(device, torch.bfloat16)
    threads = torch.get_num_threads()
    how = f"measured, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else "measured"
    return Peaks(bandwidth, matrix, single, how)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy of 256 MB, read and written."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of(lambda: target.copy_(source), device)


def measured_product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * side**3 / best_of(lambda: torch.mm(a, a, out=out), device)


def best_of(step: Callable[[], object], device: torch.device, budget: float = 1.0) -> float:
    """Least seconds of the calls that a second has room for, but for the first one."""
    step()
    times: list[float] = []
    while sum(times) < budget:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
