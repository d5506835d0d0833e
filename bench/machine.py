"""Description of the machine behind a benchmark: processor, versions, clocks, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.rows import Machine

ROOT = Path(__file__).resolve().parents[1]


def machine(device: torch.device, mode: str) -> Machine:
    """Describe the machine and the run.

    Args:
        mode: quick or full.
    """
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
        "mode": mode,
    }


def processor() -> str:
    """Return the model name of the CPU (Linux), or the architecture."""
    return from_cpuinfo("model name") or platform.machine()


def clock_of_cpu() -> str:
    """Return the current MHz of the first core, or "" if unknown."""
    return from_cpuinfo("cpu MHz")


def from_cpuinfo(entry: str) -> str:
    """Return the value of the first such entry in /proc/cpuinfo, or ""."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(entry)), "")


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(command: list[str]) -> str:
    """Return the standard output of a command, or "" if it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def from_nvidia_smi(entries: str) -> str:
    """Query entries of the first GPU, or ""."""
    lines = output_of(["nvidia-smi", f"--query-gpu={entries}", "--format=csv,noheader"])
    return lines.splitlines()[0] if lines else ""


def commit() -> str:
    """Return the short commit hash, with "-changed" for modified files; "unknown" without git."""
    short = output_of(["git", "rev-parse", "--short", "HEAD"])
    changed = output_of(["git", "status", "--porcelain", "--untracked-files=no"])
    return (short or "unknown") + ("-changed" if changed else "")


def slug(name: str) -> str:
    """Convert a name to a part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
