"""Sharing of CPU threads between torch and the image pipelines.

On a CPU the networks do most of the work: torch gets every thread, and DALI a quarter as many in
addition, which sleep while enough batches are ready. On a GPU torch only launches kernels and gets
a quarter of the threads, at most four; DALI gets the rest. The operators of ``mics_kernels`` use as
many threads as torch has at each call, from a pool that sleeps between calls. Processes that
torchrun starts on one machine share its cores equally.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from mics_fast.engine.distributed import processes_here
from mics_fast.options import DataConfig, TrainConfig

_MOST_TO_LAUNCH = 4
GROUPS_OF_PROCESS, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def share_threads(threads: int, device: torch.device) -> tuple[int, int]:
    """Return the number of threads for torch, and for each image pipeline."""
    quarter = max(1, threads // 4)
    if device.type == "cpu":
        return threads, quarter
    launching = min(quarter, _MOST_TO_LAUNCH)
    return launching, max(1, threads - launching)


def available_threads() -> int:
    """Count the cores available to this process; torchrun's processes share them equally."""
    if hasattr(os, "sched_getaffinity"):  # Linux: taskset may allow only some
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    cores = math.ceil(min(cores, cpu_quota()))
    return max(1, cores // processes_here())


def cpu_quota() -> float:
    """Return the CPU quota of this process's containers, in cores; infinite without a limit.

    Reads ``cpu.max`` of its control group (version 2), or ``cpu.cfs_quota_us`` (version 1), and of
    the groups around it: the narrowest counts.
    """
    quotas = [math.inf]
    for line in _text(GROUPS_OF_PROCESS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / controllers  # version 2 has one tree, without a name
        place = root / path.strip("/")
        for group in (place, *place.parents):
            if group.is_relative_to(root):
                quotas.append(_quota(group))
    return min(quotas)


def _quota(group: Path) -> float:
    words = _text(group / "cpu.max").split()
    words = words or [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no such file
        return math.inf
    return quota / period if quota > 0 < period else math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def use_threads(config: TrainConfig, device: torch.device) -> DataConfig:
    """Set torch's number of threads.

    Without the option ``threads``, torch keeps a smaller number, such as ``OMP_NUM_THREADS``.

    Returns:
        The data options with the number of threads of the image pipeline.
    """
    for_torch, for_data = share_threads(config.threads or available_threads(), device)
    if config.threads is None:
        for_torch = min(for_torch, torch.get_num_threads())
    torch.set_num_threads(for_torch)
    return replace(config.data, threads=config.data.threads or for_data)
