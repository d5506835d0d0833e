"""Times: implementations take turns, a few calls each a round.

"cores" is CPU time over wall time of the whole case: well below the number of threads, the machine
was busy with something else, and wall times prove nothing. Then measure again, or, with one
thread, read the CPU times. On a GPU a call is a replayed CUDA graph, or an ordinary call where none
can be captured; short replayed calls go round copies of the inputs, and of the results, that
together exceed the L2 cache several times, inside one graph, so that each finds its inputs in
memory and writes its results there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench.case import OURS, Case, Rivals, Step, in_a_line

SHORT = 300e-6  # seconds below which what lies in the L2 cache may decide
CACHES = 3  # so many times the L2 cache: inputs are at least two fifths of what a case moves
MOST_COPIES = 256


class Timed(NamedTuple):
    """A function to time, how many calls of the implementation it makes, and whether it replays
    them as a CUDA graph."""

    run: Step
    calls: int = 1
    replayed: bool = False


class Turns(NamedTuple):
    """Wall and CPU seconds a call of each implementation, round by round; CPU time over wall time
    of it all; which were replayed as CUDA graphs."""

    times: dict[str, list[tuple[float, float]]]
    cores: float
    replayed: set[str]


def captured(steps: list[Step]) -> Step:
    """The same calls, one after the other, as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    results = []  # kept to the end, so that no two calls write to the same memory
    with torch.cuda.graph(graph):
        for step in steps:
            results.append(step())
    return graph.replay


def on_gpu(case: Case, rivals: Rivals, device: torch.device) -> dict[str, Timed]:
    """Each implementation as a graph, the short ones over copies of the inputs; as ordinary calls
    where it cannot be captured."""
    timed = {}
    others: list[Rivals] = []
    for name, step in rivals.steps.items():
        timed[name] = Timed(step)
        if not rivals.captured(name):
            continue
        try:
            timed[name] = graph = Timed(captured([step]), replayed=True)
            copies = copies_for(case, device) if seconds(graph, device, 10)[0] < SHORT else 1
            others += [case.make(device, False) for _ in range(len(others), copies - 1)]
            if copies > 1:
                steps = [step, *(other.steps[name] for other in others)]
                timed[name] = Timed(captured(steps), copies, replayed=True)
        except RuntimeError as error:
            print(f"{name}: not captured as a CUDA graph ({in_a_line(error)})")
    return timed


def copies_for(case: Case, device: torch.device) -> int:
    """Of the inputs, so that none of what a call reads is in the L2 cache any more."""
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, 1 + math.ceil(CACHES * cache / case.work.bytes))


def wake(device: torch.device) -> None:
    """Half a second of products, after which the clocks of an idle GPU are up."""
    a = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        torch.mm(a, a)
        torch.cuda.synchronize(device)


def seconds(timed: Timed, device: torch.device, repeats: int) -> tuple[float, float]:
    """Mean wall time, and CPU time, of a call in ``repeats`` runs in a row, after one that is not
    timed: it faults in the memory that the implementation before has given back to the system."""
    timed.run()
    calls = repeats * timed.calls
    if device.type == "cpu":
        start, used = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            timed.run()
        wall, used = time.perf_counter() - start, time.process_time() - used
        return wall / calls, used / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        timed.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls, 0.0


def take_turns(case: Case, rivals: Rivals, device: torch.device, budget: float) -> Turns:
    """Time every implementation. Each has been called before, and so is compiled.

    Args:
        budget: seconds for all of them; five rounds at least.
    """
    if device.type == "cuda":
        wake(device)
        timed = on_gpu(case, rivals, device)
    else:
        timed = {name: Timed(step) for name, step in rivals.steps.items()}
    # About 20 ms of each a round.
    repeats = {
        name: max(1, int(0.02 / (one.calls * seconds(one, device, 1)[0])))
        for name, one in timed.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    start, used, rounds = time.perf_counter(), time.process_time(), 0
    while rounds < 5 or time.perf_counter() - start < budget:
        rounds += 1
        for name, one in timed.items():
            times[name].append(seconds(one, device, repeats[name]))
    cores = (time.process_time() - used) / (time.perf_counter() - start)
    return Turns(times, cores, {name for name, one in timed.items() if one.replayed})


def rows_of(label: dict[str, object], turns: Turns, floor_ms: float) -> Iterator[dict[str, object]]:
    """A row for each implementation, compared with the best of ours; printed as it comes.

    Columns: median, least, 20th and 80th percentile of wall time and median of CPU time (of all
    threads) in ms; ``ratio``, ``ratio_of_min`` and ``ratio_of_cpu``: how many times as long as
    ours; ``share_of_floor``: the floor over the median, above 1 by noise alone.
    """
    found = {name: row_of(values) for name, values in turns.times.items()}
    ours = [name for name in OURS if name in found] or list(found)
    best = min((found[name] for name in ours), key=lambda row: row["median_ms"])
    for name, row in found.items():
        ratio, minima, cpu = (
            row[key] / best[key] if best[key] else None for key in ("median_ms", "min_ms", "cpu_ms")
        )
        share = floor_ms / row["median_ms"]
        print(
            f"{label['operator']:26} {label['shape']:18} {name:20} {row['median_ms']:10.4f} ms "
            f"{ratio:6.1f}x (minima {minima:.1f}x, CPU {f'{cpu:.1f}x' if cpu else '-'}) "
            f"{100 * share:4.0f} % of the floor  cores {turns.cores:.2f}",
            flush=True,
        )
        yield {
            **label, "implementation": name, "ours": name in OURS, **row,
            "ratio": ratio, "ratio_of_min": minima, "ratio_of_cpu": cpu,
            "floor_ms": floor_ms, "share_of_floor": share,
            "rounds": len(turns.times[name]), "cores": turns.cores,
            "replayed": name in turns.replayed,
        }  # fmt: skip


def row_of(values: list[tuple[float, float]]) -> dict[str, float]:
    """Median, least, 20th and 80th percentile of wall time, and median CPU time, in ms."""
    wall, cpu = zip(*values, strict=True)
    fifths = statistics.quantiles(wall, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(wall) * 1e3,
        "min_ms": min(wall) * 1e3,
        "p20_ms": fifths[0] * 1e3,
        "p80_ms": fifths[3] * 1e3,
        "cpu_ms": statistics.median(cpu) * 1e3,
    }
