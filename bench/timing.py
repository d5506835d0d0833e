"""What the benchmarks share: calls that take turns, their times, and what they ran on.

Implementations take turns, a few calls each a round; the ratio of medians and the ratio of minima
are both shown. "cores" is CPU time over wall time of the whole row: well below the number of
threads, the machine was busy with something else, and the row proves nothing. Then measure again,
with --threads 1. On a GPU times are those of a replayed CUDA graph (torch.compile: of an ordinary
call, where a graph of the compiled backward cannot be captured).
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


def seconds(step: Step, device: torch.device, repeats: int) -> float:
    """Mean time of ``repeats`` calls in a row."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats


def take_turns(
    steps: dict[str, Step], device: torch.device, budget: float
) -> tuple[dict[str, list[float]], float]:
    """Seconds a call of each implementation, round by round, and CPU time over wall time.

    Args:
        steps: what to time, by name; "compiled" in a name: not captured in a CUDA graph.
        device: what they run on.
        budget: seconds for all of them; five rounds at least.
    """
    for step in steps.values():
        step()  # compiles
    if device.type == "cuda":
        steps = {n: step if "compiled" in n else replayed(step) for n, step in steps.items()}
    repeats = {name: max(1, int(0.02 / seconds(step, device, 1))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, used, rounds = time.perf_counter(), time.process_time(), 0
    while rounds < 5 or time.perf_counter() - start < budget:
        rounds += 1
        for name, step in steps.items():
            times[name].append(seconds(step, device, repeats[name]))
    return times, (time.process_time() - used) / (time.perf_counter() - start)


def rows_of(
    label: dict[str, object], times: dict[str, list[float]], cores: float
) -> Iterator[dict[str, object]]:
    """A row for each implementation, compared with the best of ours; printed as it comes."""
    ours = [name for name in OURS if name in times] or ["reference"]
    best = times[min(ours, key=lambda name: statistics.median(times[name]))]
    for name, values in times.items():
        median, least = statistics.median(values), min(values)
        ratio = median / statistics.median(best)
        print(
            f"{' '.join(str(part) for part in label.values()):38} {name:24} "
            f"{median * 1e3:10.4f} ms (min {least * 1e3:.4f})  {ratio:7.1f}x "
            f"(of minima {least / min(best):.1f}x)  cores {cores:.2f}",
            flush=True,
        )
        yield label | {
            "implementation": name,
            "median_ms": median * 1e3,
            "min_ms": least * 1e3,
            "ratio_of_medians": ratio,
            "ratio_of_minima": least / min(best),
            "rounds": len(values),
            "cores": cores,
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
