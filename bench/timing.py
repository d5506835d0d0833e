"""Timing of the implementations of a case in turns: a few calls each per round.

"cores" is CPU time over wall time of the whole case. If it is well below the number of threads, the
machine was busy with something else and wall times prove nothing: measure again, or, with one
thread, read the CPU times.

On a GPU a call is a replayed CUDA graph, or an ordinary call if none can be captured. Short
replayed calls cycle through copies of inputs and results, inside one graph, that together exceed
the L2 cache several times, so that each call reads from and writes to memory.

"As called" is another time: one ordinary call as users make it, with new inputs that a torch
operator has just made, including ``backward()`` if the case has gradients.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bench.case import Case, Rival, Rivals, Step, in_a_line
from bench.rows import Row

SHORT = 300e-6  # seconds; below, the L2 cache may decide
CACHES = 3  # times the L2 cache: inputs are at least two fifths of the bytes moved
MOST_COPIES = 256
TURN = 0.02  # seconds per implementation and round
MOST_LEAVES = 20  # new inputs held in a GPU's memory at once


class Timed(NamedTuple):
    """A function to time, its number of calls, and whether it replays a CUDA graph."""

    run: Step
    calls: int = 1
    replayed: bool = False


@dataclass
class Times:
    """Seconds per call of one implementation, round by round."""

    rounds: list[tuple[float, float]] = field(default_factory=list)  # wall and CPU
    called: list[float] = field(default_factory=list)  # as users call it
    replayed: bool = False  # as a CUDA graph


class Turns(NamedTuple):
    """Times of each implementation, and CPU time over wall time of all of them."""

    times: dict[str, Times]
    cores: float


def captured(steps: list[Step]) -> Step:
    """Capture the calls, in sequence, as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    results = []  # kept until the capture ends, so that calls do not share output memory
    with torch.cuda.graph(graph):
        for step in steps:
            results.append(step())
    return graph.replay


def on_gpu(case: Case, rivals: Rivals, device: torch.device) -> dict[str, Timed]:
    """Capture each implementation as a graph if possible, short ones over copies of the inputs."""
    timed = {}
    others: list[Rivals] = []
    for name, rival in rivals.found.items():
        timed[name] = Timed(rival.step)
        if rival.compiled or rival.waits:
            continue
        try:
            timed[name] = graph = Timed(captured([rival.step]), replayed=True)
            copies = copies_for(case, device) if seconds(graph, device, 10)[0] < SHORT else 1
            others += [case.make(device, False) for _ in range(len(others), copies - 1)]
            if copies > 1:
                steps = [rival.step, *(other.found[name].step for other in others)]
                timed[name] = Timed(captured(steps), copies, replayed=True)
        except RuntimeError as error:
            print(f"{name}: not captured as a CUDA graph ({in_a_line(error)})")
    return timed


def copies_for(case: Case, device: torch.device) -> int:
    """Return how many copies of the inputs exceed the L2 cache."""
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, 1 + math.ceil(CACHES * cache / case.work.bytes))


def wake(device: torch.device) -> None:
    """Multiply for half a second, because an idle GPU has lowered its clocks."""
    a = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        torch.mm(a, a)
        torch.cuda.synchronize(device)


def seconds(timed: Timed, device: torch.device, repeats: int) -> tuple[float, float]:
    """Return mean wall and CPU time per call over ``repeats`` consecutive runs.

    One untimed run comes first: it faults in memory that the previous implementation has returned
    to the system.
    """
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


def seconds_as_called(rival: Rival, rivals: Rivals, device: torch.device, repeats: int) -> float:
    """Return the mean wall time of a call on new inputs, without the time to make them."""
    if device.type == "cuda":
        leaves = [rivals.fresh() for _ in range(min(repeats, MOST_LEAVES))]
        waiting = iter([rivals.fresh(), *leaves])  # the first run is not timed
        calls = Timed(lambda: rival.call(next(waiting)))
        return seconds(calls, device, len(leaves))[0]
    spent = 0.0
    for _ in range(repeats):
        leaf: Any = rivals.fresh()
        start = time.perf_counter()
        rival.call(leaf)
        spent += time.perf_counter() - start
    return spent / repeats


def take_turns(case: Case, rivals: Rivals, device: torch.device, budget: float) -> Turns:
    """Time every implementation. Each has been called before, so none compiles now.

    Args:
        budget: seconds in total; at least five rounds are run.
    """
    if device.type == "cuda":
        wake(device)
        timed = on_gpu(case, rivals, device)
    else:
        timed = {name: Timed(rival.step) for name, rival in rivals.found.items()}
    repeats = {
        name: max(1, int(TURN / (one.calls * seconds(one, device, 1)[0])))
        for name, one in timed.items()
    }
    times = {name: Times(replayed=one.replayed) for name, one in timed.items()}
    start, used, rounds = time.perf_counter(), time.process_time(), 0
    while rounds < 5 or time.perf_counter() - start < budget:
        rounds += 1
        for name, one in timed.items():
            times[name].rounds.append(seconds(one, device, repeats[name]))
            called = seconds_as_called(rivals.found[name], rivals, device, repeats[name])
            times[name].called.append(called)
    cores = (time.process_time() - used) / (time.perf_counter() - start)
    return Turns(times, cores)


def rows_of(label: Row, rivals: Rivals, turns: Turns, floor_ms: float) -> Iterator[Row]:
    """Yield one row per implementation, compared with our fastest; printed as it comes."""
    found = {name: row_of(times) for name, times in turns.times.items()}
    ours = [name for name in found if rivals.found[name].ours] or list(found)
    best = min((found[name] for name in ours), key=lambda row: row["median_ms"])
    for name, row in found.items():
        row = {
            **label, "implementation": name, "ours": rivals.found[name].ours, **row,
            "ratio": row["median_ms"] / best["median_ms"],
            "ratio_of_min": row["min_ms"] / best["min_ms"],
            "ratio_of_cpu": row["cpu_ms"] / best["cpu_ms"] if best["cpu_ms"] else None,
            "called_ratio": row["called_ms"] / best["called_ms"],
            "floor_ms": floor_ms, "share_of_floor": floor_ms / row["median_ms"],
            "cores": turns.cores,
        }  # fmt: skip
        print(line_of(row), flush=True)
        yield row


def row_of(times: Times) -> Row:
    """Return the columns of one implementation's times."""
    return {
        **percentiles(times.rounds),
        "called_ms": 1e3 * statistics.median(times.called),
        "rounds": len(times.rounds),
        "replayed": times.replayed,
    }


def percentiles(times: list[tuple[float, float]]) -> Row:
    """Return median, minimum, 20th and 80th percentile of wall time, and median CPU time, in ms."""
    wall, cpu = zip(*times, strict=True)
    fifths = statistics.quantiles(wall, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(wall) * 1e3,
        "min_ms": min(wall) * 1e3,
        "p20_ms": fifths[0] * 1e3,
        "p80_ms": fifths[3] * 1e3,
        "cpu_ms": statistics.median(cpu) * 1e3,
    }


def line_of(row: Row) -> str:
    """Format a row for printing during the run."""
    cpu = row["ratio_of_cpu"]
    return (
        f"{row['operator']:26} {row['shape']:18} {row['implementation']:20} "
        f"{row['median_ms']:10.4f} ms {row['ratio']:6.1f}x "
        f"(least {row['ratio_of_min']:.1f}x, CPU {f'{cpu:.1f}x' if cpu else '-'}, "
        f"as called {row['called_ratio']:.1f}x) "
        f"{100 * (row['share_of_floor'] or 0):4.0f} % of the floor  cores {row['cores']:.2f}"
    )
