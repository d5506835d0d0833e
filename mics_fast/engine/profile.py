"""Profiling of training steps: a trace for a browser, and a table by phase."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

PHASES = ("data", "forward", "backward", "optimiser", "after_step")
WARM_UP = 5  # steps before the profile, for compilation and memory pools


def phase(name: str) -> AbstractContextManager[Any]:
    """Mark a phase, one of ``PHASES``, in the trace of a profiler, if one is on."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


@contextmanager
def profiled(steps: int, folder: Path, name: str) -> Iterator[Callable[[], None]]:
    """Profile ``steps`` steps after a warm-up; 0: no profile.

    Writes ``folder/<name>.json``, a trace for chrome://tracing or Perfetto, and
    ``folder/<name>.txt``, a table.

    Yields:
        A function to call after each step.
    """
    if not steps:
        yield lambda: None
        return
    written = False

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"{name}.json"))
        (folder / f"{name}.txt").write_text(table(profile, steps))
        written = True

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=plan, on_trace_ready=write
    ) as profile:
        yield profile.step
    if not written:
        print(f"{name} ended before step {WARM_UP}: nothing was profiled", file=sys.stderr)


def table(profile: torch.profiler.profile, steps: int) -> str:
    """Format the milliseconds per step by phase on the host, then the slowest operators.

    On a GPU the host only launches work: see the second part and the trace for GPU time.
    """
    averages = profile.key_averages()
    spent = {row.key: row.cpu_time_total / 1000 / steps for row in averages}
    total = sum(spent.get(name, 0.0) for name in PHASES)
    lines = [f"{steps} steps, host time a step", f"{'phase':<12}{'ms':>10}{'share':>8}"]
    for name in PHASES:
        own = spent.get(name, 0.0)
        lines.append(f"{name:<12}{own:>10.3f}{own / max(total, 1e-9):>8.1%}")
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + averages.table(sort_by=key, row_limit=25) + "\n"
