"""Peak rates of a machine, from which floors are computed.

For a known GPU they come from its data sheet, for another one from torch's own copy and product.
For a CPU they are measured in the same run, with the same number of threads, by a small C program
(probe.c), because a processor can do more than torch's product and copy show. The program
multiplies and adds in registers. It streams over as many bytes as the case moves, since data that
stay in a cache between calls arrive faster than from memory. Reading and copying are both tried and
the faster counts; passes alternate in direction, so that each begins with cached data of the last.
bfloat16 has a loop of its own on processors with AVX-512 bfloat16 instructions; torch's product
counts if it is faster, as torch may use tiles (AMX).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.roofline import Peaks
from mics_fast.engine.meter import PEAK_TFLOPS

# bytes/s, and float32 FLOP/s outside tensor cores, by full name of the GPU: PCIe and NVL boards and
# MIG slices have less. The trainer's meter has the FLOP/s of dense bfloat16 products.
DATA_SHEETS = {
    name: Peaks(bandwidth, 1e12 * PEAK_TFLOPS[name], 67e12, f"data sheet of the {board}")
    for name, bandwidth, board in (
        ("NVIDIA H100 80GB HBM3", 3.35e12, "H100 SXM"),
        ("NVIDIA H200", 4.8e12, "H200"),
    )
}
BLOCK = 2**16  # bytes per step of a stream, as in probe.c
LARGEST = 2**28  # bytes; larger than any cache
TRIES = 5
SECONDS = 0.02  # minimum per try, so that starting threads does not matter


def peaks_of(device: torch.device, footprint: int) -> Peaks:
    """Return the rates for a case that moves ``footprint`` bytes, with torch's threads."""
    known = data_sheet(device)
    if known is not None:
        return known
    threads = torch.get_num_threads()
    single = flops_of(device, torch.float32, threads)
    # A CPU's operators multiply float32.
    matrix = single if device.type == "cpu" else flops_of(device, torch.bfloat16, threads)
    source = f"{threads} thread{'s' * (threads > 1)}"
    reached = device.type == "cuda" or probe() is None
    if reached:
        why = "no data sheet is known" if device.type == "cuda" else "there is no C compiler"
        source = f"torch's own copy and product, as {why}"
    return Peaks(bandwidth_of(device, footprint, threads), matrix, single, source, reached)


def data_sheet(device: torch.device) -> Peaks | None:
    """Return the peaks of a known GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return DATA_SHEETS.get(name)


@cache
def flops_of(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measure the FLOP/s of float32 (on a GPU outside tensor cores) or bfloat16 products."""
    known = data_sheet(device)
    if known is not None:
        return known.vector_flops if dtype == torch.float32 else known.matrix_flops
    library = probe() if device.type == "cpu" else None
    name = "fma" if dtype == torch.float32 else "bf16"
    work = getattr(library, f"{name}_flops")() if library else 0
    rounds = getattr(library, f"{name}_rounds", None)
    found = rate(rounds, threads, work, [(0.5, 1.0)] * threads) if rounds and work else 0.0
    # Nothing multiplies float32 faster than multiply-adds; bfloat16 may have units of its own.
    return found if found and dtype == torch.float32 else max(found, product(device, dtype))


@cache
def bandwidth_of(device: torch.device, footprint: int, threads: int) -> float:
    """Measure the bytes per second, read and written, of the fastest stream."""
    library = probe() if device.type == "cpu" else None
    if library is None:
        return copy(device)
    share = max(2, round(min(footprint, LARGEST) / threads / BLOCK)) // 2 * 2 * BLOCK
    kept = [torch.ones(share // 4 + 16) for _ in range(threads)]
    places = [(aligned(buffer), share) for buffer in kept]
    streams: list[tuple[Callable[..., Any], tuple[int, ...]]] = [
        (library.read_passes, ()),
        (library.copy_passes, (0,)),
        (library.copy_passes, (1,)),
    ]

    def passes(stream: Callable[..., Any], more: tuple[int, ...]) -> Callable[..., Any]:
        return lambda count, place, size: stream(place, size, count, *more)

    return max(rate(passes(*stream), threads, share, places) for stream in streams)


def aligned(buffer: Tensor) -> int:
    """Return the first address in a buffer that is aligned for vector registers."""
    return -(-buffer.data_ptr() // 64) * 64


def rate(
    rounds: Callable[..., Any], threads: int, work: int, arguments: Sequence[tuple[Any, ...]]
) -> float:
    """Measure the combined rate of threads that start together.

    Args:
        rounds: takes a number of rounds and a thread's arguments; releases Python's lock.
        threads: number of them.
        work: bytes or FLOPs per thread and round.
        arguments: of each thread.
    """
    count = 1
    while (shortest := together(rounds, count, arguments)) < SECONDS:
        count = max(2 * count, int(1.5 * count * SECONDS / shortest))
    for _ in range(TRIES):
        shortest = min(shortest, together(rounds, count, arguments))
    return count * work * threads / shortest


def together(rounds: Callable[..., Any], count: int, arguments: Sequence[tuple[Any, ...]]) -> float:
    """Return the seconds from the first thread's start to the last one's end."""
    barrier = threading.Barrier(len(arguments))
    times: list[tuple[float, float]] = []

    def work(own: tuple[Any, ...]) -> None:
        barrier.wait()
        start = time.perf_counter()
        rounds(count, *own)
        times.append((start, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(own,)) for own in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    starts, ends = zip(*times, strict=True)
    return max(ends) - min(starts)


@cache
def probe() -> ctypes.CDLL | None:
    """Compile probe.c for this processor; None without a C compiler."""
    source = Path(__file__).with_name("probe.c")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "probe.so"
        for compiler in filter(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang")):
            options = ["-O3", "-march=native", "-shared", "-fPIC"]
            command = [compiler, *options, str(source), "-o", str(built)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return declared(ctypes.CDLL(str(built)))
    return None


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the library's functions."""
    for name in ("fma", "bf16"):
        getattr(library, f"{name}_flops").restype = ctypes.c_long
        rounds = getattr(library, f"{name}_rounds")
        rounds.argtypes, rounds.restype = (ctypes.c_long, *[ctypes.c_float] * 2), ctypes.c_float
    stream = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    library.read_passes.argtypes = stream
    library.copy_passes.argtypes = (*stream, ctypes.c_int)
    library.read_passes.restype = library.copy_passes.restype = ctypes.c_float
    return library


def copy(device: torch.device) -> float:
    """Measure the bytes/s read and written by torch's copy of 256 MB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of(lambda: target.copy_(source), device)


def product(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of torch's square matrix product, the better of two sizes."""
    sides = (1024, 2048) if device.type == "cpu" else (8192,)

    def reached(side: int) -> float:
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        return 2 * side**3 / best_of(lambda: torch.mm(a, a, out=out), device)

    return max(reached(side) for side in sides)


def best_of(step: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """Return the shortest time of the calls within ``budget`` seconds, without the first."""
    step()
    times: list[float] = []
    while sum(times) < budget:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
