"""Time a training step, from the published code's to this project's: a ladder in one run.

    a   the published step: bench/baselines/published.py
    b   ... without singular value decomposition
    c   one forward: of the model (alternating), and of the discriminator for both
    d   scaled_dot_product_attention, then bfloat16 where large products are 1.5 times as fast in it
        (on a CPU attention in bfloat16 is written out: its fused kernel is slower)
    e   torch.compile of the encoders' blocks
    f   the contrastive loss by the fused operator
    g   frames from memory, not decoded for every step

Beside it: the turbo preset, which changes the method, and the fine-tuning step. All rungs have the
same weights, batches and queue, which is filled with random features. Before anything is timed each
rung's losses are held against those of the rung before, on the same frames; the run fails where
they differ. What is timed includes the loader, DALI's for every rung (the published one decodes
with Pillow between the steps). Rungs take turns, round by round; a turn's first step is not timed.
Times are medians; "CPU" is that of all threads, "x" how many times faster than rung a. "MB" is the
most memory a step takes beside weights and optimisers. GFLOP are counted as the rung makes them,
without the decomposition; MFU is their share of what a large product reaches in the same run and
the rung's precision, on a GPU of 989 TFLOP/s. "cores" is CPU time over wall time: well below the
number of threads, the machine was busy with something else, and only the CPU times tell anything.
On a CPU compiling takes longer than --quick has, which leaves rung e out.

    python -m bench --full --only training [--manifest FILE]      (else 64 pairs of the phantom)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.rungs import Batch, Losses, Rung, disagreement, fine_tuning, ladder, losses_of
from mics_fast import prepare
from mics_fast.config import CacheConfig, DataConfig, TrainConfig
from mics_fast.data.cache import FrameCache
from mics_fast.data.manifest import Manifest, read_manifest
from mics_fast.data.pipeline import TrainLoader
from mics_fast.models.sizes import SIZES

GPU_PEAK = 989e12  # H100 and H200, dense bfloat16
BATCHES = {"vit_micro": 32, "vit_tiny": 8, "vit_small": 8, "vit_base": 16}
QUICK_BATCHES = {"vit_micro": 32, "vit_tiny": 4, "vit_small": 2, "vit_base": 16}
QUEUE = 4096
PAYS = 1.5  # times float32's speed, for bfloat16 to be worth its rounding
Turn = list[tuple[float, float, float]]
"""Wall, CPU and data-wait seconds of each step."""


def table(manifest: Manifest, options: argparse.Namespace) -> list[dict[str, object]]:
    """Check and measure everything; one row for each rung."""
    config = config_of(options)
    device = torch.device(options.device)
    peaks = {dtype: peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    amp = peaks[torch.bfloat16] > PAYS * peaks[torch.float32]
    on_gpu = device.type == "cuda"
    reached = f"float32 {peaks[torch.float32]:.3g}, bfloat16 {peaks[torch.bfloat16]:.3g}"
    print(f"products reach {reached} TFLOP/s; batch {config.pretrain.batch_size}, queue {QUEUE}")
    compiles = on_gpu or not options.quick
    torch._dynamo.config.recompile_limit = 64  # the compiled rungs share the code of their blocks
    loaders = loaders_of(manifest, config, device)
    pretraining = ladder(config, manifest.modalities, amp=amp, compiles=compiles)
    classes = len(manifest.classes)
    tuning = fine_tuning(config, manifest.modalities, classes, amp=amp, compiles=compiles)
    count = 2 if options.quick else 4
    kept = {name: list(itertools.islice(loader, count)) for name, loader in loaders.items()}
    rungs: dict[str, Rung] = {}
    losses: dict[str, Losses] = {}
    rows: dict[str, dict[str, object]] = {}
    for rung in itertools.chain(pretraining, tuning):
        batches = unrepeated(kept["tuning" if rung.name.startswith("fine") else "decoded"])
        losses[rung.name], memory = losses_and_memory(rung, batches, device)
        rungs[rung.name] = rung
        rows[rung.name] = {
            "rung": rung.name,
            "precision": "bf16" if rung.way.amp else "fp32",
            "apart": disagreement(rung, losses),
            "memory_mb": memory,
            "loss_first": losses[rung.name][0],
            "loss_last": losses[rung.name][-1],
        }
    print(f"losses agree over {count} steps; timing {len(rungs)} rungs")
    times, cores, reached = take_turns(rungs, loaders, device, 15.0 if options.quick else 120.0)
    print(f"cores {cores:.2f}")
    peaks[torch.float32] = max(peaks[torch.float32], reached)
    for name, rung in rungs.items():
        best = peaks[torch.bfloat16 if rung.way.amp else torch.float32] * 1e12
        best = GPU_PEAK if on_gpu else best
        rows[name] |= speeds(times[name], rung.flops, pairs_of(config, name), best)
        rows[name] |= {f"x_{n}": rows["a"][n] / rows[name][n] if rows[name][n] else None
                       for n in ("ms", "cpu_ms")}  # type: ignore[operator]  # fmt: skip
        rows[name] |= {"rounds": len(times[name]), "cores": cores}
        print(line(rows[name]), flush=True)
    return list(rows.values())


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The demo's small heads, defaults otherwise; no clipping, so that rungs do the same."""
    config = TrainConfig(device=options.device)
    config.model.size = options.size
    batch = options.batch or (QUICK_BATCHES if options.quick else BATCHES)[options.size]
    config.pretrain = replace(config.pretrain, batch_size=batch, queue_size=QUEUE, clip=0.0)
    labelled = max(1, batch // 4)
    config.finetune = replace(
        config.finetune, labelled_batch=labelled, unlabelled_batch=batch - labelled, clip=0.0
    )
    return config


def loaders_of(
    manifest: Manifest, config: TrainConfig, device: torch.device
) -> dict[str, Iterator[Batch]]:
    """Batches of pre-training, "decoded" or "cached", and of fine-tuning, from all rows."""
    rows, size = list(manifest.rows), SIZES[config.model.size]
    data = DataConfig(cache=CacheConfig("host"))
    cache = FrameCache(rows, manifest.modalities, data=data, image_size=size.image, device=device)
    cache.fill(rows)

    def loader(batch: int, kept: FrameCache | None, strong: bool = False) -> TrainLoader:
        return TrainLoader(
            rows, manifest.modalities, data=data if kept else DataConfig(),
            augment=config.pretrain.augment, image_size=size.image, batch_size=batch,
            seed=config.seed, strong=strong, device=device, cache=kept,
        )  # fmt: skip

    batch, tuning = config.pretrain.batch_size, config.finetune
    return {
        "decoded": zip(loader(batch, None)),
        "cached": zip(loader(batch, cache)),
        "tuning": zip(
            loader(tuning.labelled_batch, cache),
            loader(tuning.unlabelled_batch, cache, strong=True),
            strict=True,
        ),
    }


def unrepeated(batches: Sequence[Batch]) -> list[Batch]:
    """The same frames as rows that are all different: the published loss masks no repeats."""
    found, first = [], 0
    for batch in batches:
        parts = []
        for part in batch:
            ids = first + torch.arange(len(part.label), device=part.label.device)
            parts.append(replace(part, sample_id=ids, group_id=ids))
            first += len(ids)
        found.append(tuple(parts))
    return found


def losses_and_memory(
    rung: Rung, batches: Sequence[Batch], device: torch.device
) -> tuple[Losses, float | None]:
    """A rung's losses from its first step on, and the most memory, in MB, that the steps after the
    first take beside what it keeps; None where that cannot be told."""
    losses = losses_of(rung, batches[:1])
    rung.step.release()
    gc.collect()
    begin = start_peak(device)
    for number, batch in enumerate(batches[1:], 1):
        values = rung.step(batch, number)
        losses.append({name: float(value) for name, value in values.items()})
    memory = None if begin is None else (end_peak(device) - begin) / 2**20
    rung.step.release()
    return losses, memory


def start_peak(device: torch.device) -> float | None:
    """Bytes in use; the peak starts anew from here. On Linux's CPU: resident, after the allocator
    has given back what it does not use, else None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def end_peak(device: torch.device) -> float:
    """The most bytes in use since ``start_peak``."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resident("VmHWM")


def resident(entry: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def take_turns(
    rungs: dict[str, Rung], loaders: dict[str, Iterator[Batch]], device: torch.device, budget: float
) -> tuple[dict[str, Turn], float, float]:
    """The steps of each rung, CPU time over wall time of it all, and the most TFLOP/s of a float32
    product, measured once a round; three rounds at least, and ``budget`` seconds."""
    times: dict[str, Turn] = {name: [] for name in rungs}
    start, used, rounds, best = time.perf_counter(), time.process_time(), 0, 0.0
    while rounds < 3 or time.perf_counter() - start < budget:
        rounds += 1
        best = max(best, peak(device, torch.float32))
        for name, rung in rungs.items():
            way = "cached" if rung.way.cached else "decoded"
            loader = loaders["tuning" if name.startswith("fine") else way]
            first = timed_step(rung, loader, device, rounds)[0]
            for _ in range(max(1, int(0.3 / first))):
                times[name].append(timed_step(rung, loader, device, rounds))
            rung.step.release()
    return times, (time.process_time() - used) / (time.perf_counter() - start), best


def timed_step(
    rung: Rung, loader: Iterator[Batch], device: torch.device, number: int
) -> tuple[float, float, float]:
    """Wall, CPU and data-wait seconds of one step on the loader's next batch."""
    begin, used = time.perf_counter(), time.process_time()
    batch = next(loader)
    waited = time.perf_counter() - begin
    rung.step(batch, number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - used, waited


def speeds(times: Turn, flops: float, pairs: int, best: float) -> dict[str, float]:
    """What a row says of its steps; ``best`` in FLOP/s."""
    wall, cpu, waited = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "ms": wall * 1e3,
        "cpu_ms": cpu * 1e3,
        "pairs_per_second": pairs / wall,
        "gflop_per_pair": flops / pairs / 1e9,
        "tflops": flops / wall / 1e12,
        "mfu": flops / wall / best,
        "data_wait": waited / wall,
    }


def pairs_of(config: TrainConfig, name: str) -> int:
    """Rows of the manifest in a step."""
    tuning = config.finetune
    fine = name.startswith("fine")
    return tuning.labelled_batch + tuning.unlabelled_batch if fine else config.pretrain.batch_size


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    shortest = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        (left @ right)[0, 0].item()
        shortest = min(shortest, time.perf_counter() - begin)
    return 2 * side**3 / shortest / 1e12


def line(row: dict[str, object]) -> str:
    """A row as it is printed."""
    memory = row["memory_mb"]
    return (
        f"{row['rung']:15} {row['precision']}  {row['pairs_per_second']:8.2f} pairs/s "
        f"{row['ms']:9.1f} ms (CPU {row['cpu_ms']:9.1f})  {row['x_ms']:5.2f}x "
        f"(CPU {row['x_cpu_ms'] or 0:5.2f}x)  {row['gflop_per_pair']:8.2f} GFLOP/pair "
        f"{row['tflops']:7.3f} TFLOP/s  MFU {row['mfu']:6.1%}  "
        f"{'-' if memory is None else f'{memory:.0f}':>6} MB  wait {row['data_wait']:4.0%}  "
        f"loss apart {row['apart']:.0e}"
    )


def rows(device: torch.device, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A ladder for each size of model: vit_base on a GPU; vit_micro and, but for --quick, vit_tiny
    on a CPU.

    Columns beside those of ``table``: ``ratio``, how many times as long as rung g a rung takes, and
    ``times_b``, how many times faster than rung b it is.
    """
    sizes = ("vit_micro", "vit_tiny") if options.full else ("vit_micro",)
    with tempfile.TemporaryDirectory() as folder:
        if options.manifest is None:
            prepare.main(["phantom", "--out", folder, "--pairs", "64"])
        manifest = read_manifest(options.manifest or Path(folder) / "manifest.csv")
        for size in ("vit_base",) if device.type == "cuda" else sizes:
            given = argparse.Namespace(
                device=device.type, size=size, batch=None, quick=not options.full
            )
            found = {str(row["rung"]): row for row in table(manifest, given)}
            for name, row in found.items():
                milliseconds = float(str(row["ms"]))
                trains_likewise = not name.startswith("fine")
                label = {
                    "operator": "training step",
                    "shape": f"{size}, batch {config_of(given).pretrain.batch_size}",
                    "threads": options.threads,
                    "implementation": name,
                    "ours": name in ("g", "turbo") or not trains_likewise,
                    "ratio": milliseconds / float(str(found["g"]["ms"])),
                    "times_b": float(str(found["b"]["ms"])) / milliseconds,
                }
                yield label | row if trains_likewise else label | row | {"ratio": None}
