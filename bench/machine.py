"""What a benchmark ran on."""

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

ROOT = Path(__file__).resolve().parents[1]


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
