"""What the benchmarks share: calls that take turns, their times, and what they ran on.

Implementations take turns, a few calls each a round; ratios of medians, of minima and of CPU times
(of all threads; medians) are shown. "cores" is CPU time over wall time of the whole row: well below
the number of threads, the machine was busy with something else, and wall times prove nothing. Then
measure again, or, with --threads 1, read the CPU times. On a GPU times are those of a replayed
CUDA graph (torch.compile: of an ordinary call, where a graph of its backward cannot be captured).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Step = Callable[[], object]
OURS = ("cpu", "triton", "cuda")


def replayed(step: Step) -> Step:
    """The same call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Step, device: torch.device, repeats: int) -> tuple[float, float]:
    """Mean wall time, and CPU time, of ``repeats`` calls in a row, after one that is not timed: it
    faults in the memory that the implementation before has given back to the system."""
    step()
    if device.type == "cpu":
        start, used = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            step()
        wall, used = time.perf_counter() - start, time.process_time() - used
        return wall / repeats, used / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats, 0.0


def take_turns(
    steps: dict[str, Step], device: torch.device, budget: float
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Wall and CPU seconds a call of each implementation, round by round, and CPU time over wall
    time of it all.

    Args:
        steps: what to time, by name; "compiled" in a name: not captured in a CUDA graph.
        device: what they run on.
        budget: seconds for all of them; five rounds at least.
    """
    for step in steps.values():
        step()  # compiles
    if device.type == "cuda":
        steps = {n: step if "compiled" in n else replayed(step) for n, step in steps.items()}
    repeats = {n: max(1, int(0.02 / seconds(step, device, 1)[0])) for n, step in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    start, used, rounds = time.perf_counter(), time.process_time(), 0
    while rounds < 5 or time.perf_counter() - start < budget:
        rounds += 1
        for name, step in steps.items():
            times[name].append(seconds(step, device, repeats[name]))
    return times, (time.process_time() - used) / (time.perf_counter() - start)


def rows_of(
    label: dict[str, object], times: dict[str, list[tuple[float, float]]], cores: float
) -> Iterator[dict[str, object]]:
    """A row for each implementation, compared with the best of ours; printed as it comes."""
    found = {name: row_of(values) for name, values in times.items()}
    ours = [name for name in OURS if name in times] or ["reference"]
    best = min((found[name] for name in ours), key=lambda row: row["median_ms"])
    for name, row in found.items():
        ratios = {
            n: row[n] / best[n] if best[n] else None for n in ("median_ms", "min_ms", "cpu_ms")
        }
        medians, minima, cpu = (f"{r:.1f}x" if r else "-" for r in ratios.values())
        print(
            f"{' '.join(str(part) for part in label.values()):36} {name:22} "
            f"{row['median_ms']:10.4f} ms (min {row['min_ms']:.4f}, CPU {row['cpu_ms']:.4f}) "
            f"{medians:>8} (minima {minima}, CPU {cpu})  cores {cores:.2f}",
            flush=True,
        )
        yield {
            **label,
            "implementation": name,
            **row,
            **{f"ratio_of_{n.removesuffix('_ms')}": ratio for n, ratio in ratios.items()},
            "rounds": len(times[name]),
            "cores": cores,
        }


def row_of(values: list[tuple[float, float]]) -> dict[str, float]:
    """Median and least wall time, and median CPU time, in milliseconds."""
    wall, cpu = zip(*values, strict=True)
    return {
        "median_ms": statistics.median(wall) * 1e3,
        "min_ms": min(wall) * 1e3,
        "cpu_ms": statistics.median(cpu) * 1e3,
    }


def run(description: str, table: Callable[[torch.device, float], list[dict[str, object]]]) -> None:
    """Command line of a benchmark: print its table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="1 s for each row instead of 10")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write results here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    rows = table(device, 1.0 if arguments.quick else 10.0)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def processor() -> str:
    """Model name of the CPU, as Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
