"""Time the feature shift and the class moments: every implementation in one run.

Implementations take turns, a few calls each a round; the ratio of medians, the ratio of minima and
the ratio of CPU times (of all threads; medians) are shown. "cores" is CPU time over wall time of
the whole row: well below the number of threads, the machine was busy with something else, and wall
times prove nothing: measure again, or, with --threads 1, read the CPU times.

"eager" is what a user would have written: `x + strength * std[y] *
torch.randn_like(x)`; for the moments two one-hot matrix products, the second of squares around the
class means, as safe as ours, or of plain squares, E[x^2] - E[x]^2, which is cheaper and is not. On
a GPU times are those of a replayed CUDA graph; "copy" is a device copy of the features.

    python bench/shift.py [--device cuda] [--quick] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mics_kernels import class_moments, shift_features
from mics_kernels.backends import explain

CLASSES, DIM = 8, 768
STRENGTH = 0.5
Step = Callable[[], object]


def eager_shift(x: Tensor, y: Tensor, deviation: Tensor) -> Tensor:
    """The shift as PyTorch's own generator draws it."""
    return x + STRENGTH * deviation[y] * torch.randn_like(x)


def one_hot_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean, m2 by two matrix products, the squares taken around the class means."""
    shares = torch.nn.functional.one_hot(y, CLASSES).to(x.dtype)
    count = shares.sum(0)
    mean = (shares.T @ x) / count.unsqueeze(1)
    return count, mean, shares.T @ (x - mean[y]).square()


def plain_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from E[x^2] - E[x]^2, which cancels where means are large."""
    shares = torch.nn.functional.one_hot(y, CLASSES).to(x.dtype)
    count = shares.sum(0).unsqueeze(1)
    total = shares.T @ x
    return count, total / count, shares.T @ x.square() - total.square() / count


def ours(device: torch.device) -> list[str]:
    """Fast backends that can run here; why the others cannot is printed."""
    found = []
    for name in ("cpu",) if device.type == "cpu" else ("triton",):
        try:
            explain("shift", torch.empty(0, device=device), name)
            found.append(name)
        except RuntimeError as error:
            print(f"{name}: not measured ({error})")
    return found


def shift_steps(x: Tensor, y: Tensor) -> dict[str, Step]:
    """What is compared, by name."""
    device = x.device
    variance = torch.rand(CLASSES, DIM, device=device)
    deviation = variance.sqrt().to(x.dtype)
    seed = torch.tensor([17, 0], device=device)
    compiled = torch.compile(eager_shift, fullgraph=True)

    def of(backend: str) -> Step:
        return lambda: shift_features(x, y, variance, strength=STRENGTH, seed=seed, backend=backend)

    steps: dict[str, Step] = {name: of(name) for name in ours(device)}
    steps["eager"] = lambda: eager_shift(x, y, deviation)
    steps["eager, compiled"] = lambda: compiled(x, y, deviation)
    steps["reference"] = of("reference")
    out = torch.empty_like(x)
    steps["copy"] = lambda: out.copy_(x)
    return steps


def moments_steps(x: Tensor, y: Tensor) -> dict[str, Step]:
    """What is compared, by name."""
    compiled = torch.compile(one_hot_moments, fullgraph=True)

    def of(backend: str) -> Step:
        return lambda: class_moments(x, y, CLASSES, backend=backend)

    steps: dict[str, Step] = {name: of(name) for name in ours(x.device)}
    steps["one-hot"] = lambda: one_hot_moments(x, y)
    steps["one-hot, compiled"] = lambda: compiled(x, y)
    steps["one-hot, E[x^2]"] = lambda: plain_moments(x, y)
    steps["reference"] = of("reference")
    return steps


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


def measure(
    steps: dict[str, Step], device: torch.device, budget: float
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Seconds a call of each implementation, round by round, and CPU time over wall time."""
    for step in steps.values():
        step()  # compiles
    if device.type == "cuda":
        steps = {name: replayed(step) for name, step in steps.items()}
    repeats = {
        name: max(1, int(0.02 / seconds(step, device, 1)[0])) for name, step in steps.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    start, used = time.perf_counter(), time.process_time()
    while len(times["reference"]) < 5 or time.perf_counter() - start < budget:
        for name, step in steps.items():
            times[name].append(seconds(step, device, repeats[name]))
    cores = (time.process_time() - used) / (time.perf_counter() - start)
    return times, cores


def row_of(
    values: list[tuple[float, float]], best: list[tuple[float, float]]
) -> dict[str, float | None]:
    """Median and minimum of an implementation, and how they compare with ours."""
    (wall, cpu), (best_wall, best_cpu) = (zip(*x, strict=True) for x in (values, best))
    median, best_median = statistics.median(cpu), statistics.median(best_cpu)
    return {
        "median_ms": statistics.median(wall) * 1e3,
        "min_ms": min(wall) * 1e3,
        "cpu_ms": median * 1e3,
        "ratio_of_medians": statistics.median(wall) / statistics.median(best_wall),
        "ratio_of_minima": min(wall) / min(best_wall),
        "ratio_of_cpu_times": median / best_median if best_median else None,
        "rounds": len(values),
    }


def table(device: torch.device, budget: float) -> list[dict]:
    """Measure everything; one row for each operator, shape, dtype and implementation."""
    shapes = [(8192, torch.float32)]
    if device.type == "cuda":
        shapes += [(8192, torch.bfloat16), (65536, torch.bfloat16)]
    rows = []
    for operator, steps_of in (("shift_features", shift_steps), ("class_moments", moments_steps)):
        for batch, dtype in shapes:
            torch._dynamo.reset()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(batch, DIM, generator=generator).to(device, dtype)
            y = torch.randint(CLASSES, (batch,), generator=generator).to(device)
            times, cores = measure(steps_of(x, y), device, budget)
            best = next(iter(times.values()))
            for name, values in times.items():
                row = row_of(values, best)
                shape = f"{batch}x{DIM} {str(dtype).removeprefix('torch.')}"
                rows.append({"operator": operator, "shape": shape, "implementation": name} | row)
                rows[-1]["cores"] = cores
                text = (
                    f"{operator:15} {shape:19} {name:18} "
                    f"{row['median_ms']:9.3f} ms "
                    f"(min {row['min_ms']:.3f}, cpu {row['cpu_ms']:.3f})  "
                    f"{row['ratio_of_medians']:6.1f}x (of minima {row['ratio_of_minima']:.1f}x"
                )
                if row["ratio_of_cpu_times"] is not None:
                    text += f", of cpu times {row['ratio_of_cpu_times']:.1f}x"
                print(f"{text})  cores {cores:.2f}", flush=True)
    return rows


def main() -> None:
    """Print the table; write it, with what it ran on, as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="1 s for each row instead of 10")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write results here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    rows = table(device, 1.0 if arguments.quick else 10.0)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
