"""A ladder of training steps, from the published code's to this project's, timed in one run.

    a   the published step: bench/baselines/published.py
    b   ... without singular value decomposition
    c   one forward pass: of the model (alternating), and of the discriminator for both
    d   scaled_dot_product_attention, then bfloat16 if large products are 1.5 times faster in it
        (on a CPU bfloat16 attention is not fused: the fused kernel is slower)
    e   torch.compile of the encoders' blocks
    f   the contrastive loss by the fused operator
    g   frames from memory instead of decoding them for every step
    h   on a GPU: the whole step replayed as one CUDA graph

Outside the ladder: the turbo preset, which changes the method, and the fine-tuning step.

One rung is in memory at a time. Its weights come from the seed and its queue is full of random
features, the same for all. Its losses on the same frames must agree with those of the rung before;
then its steps are timed. A full run goes through the rungs three times, so that a drift of the
machine favours none of them. A rung that fails or disagrees is reported, and the others are
measured. The time of a step includes the loader, which is DALI's for every rung (the published code
decodes with Pillow between its steps). Without DALI all rungs get random frames on the device, and
the waiting time for data is unknown. On a CPU --quick skips rung e, whose compilation takes too
long.

Times are medians; "CPU" is that of all threads, "x" the speed-up over rung a. "MB" is the peak
memory of a step beyond weights and optimisers. GFLOP are those that the rung computes, without the
decomposition; MFU is their share of the peak of its precision. The floor is their time at that peak
or, if longer, the time to read and write weights and both moments. "cores" is CPU time over wall
time: if it is well below the number of threads, the machine was busy with something else.

    python -m bench --full --only training [--manifest FILE]      (else 64 pairs of the phantom)
"""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from bench.case import in_a_line
from bench.memory import end_peak, start_peak
from bench.peaks import LARGEST, bandwidth_of, flops_of, product
from bench.rows import Options, Row
from bench.rungs import Batch, Losses, Rung, Step, disagreement, fine_tuning, ladder, losses_of
from bench.timing import percentiles
from mics_fast.common.errors import InputError
from mics_fast.data.batch import PairBatch
from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import check_dali
from mics_fast.data.loaders import TrainLoader
from mics_fast.data.manifest import Manifest, read_manifest
from mics_fast.engine.capture import WARM_UP
from mics_fast.models.sizes import size_of
from mics_fast.options import CacheConfig, DataConfig, ModelSize, TrainConfig

BATCHES: dict[ModelSize, int] = {"vit_micro": 32, "vit_tiny": 8, "vit_small": 8, "vit_base": 16}
QUEUE = 4096
PAYS = 1.5  # speed-up over float32 that makes bfloat16 worth its rounding
CHECKED = WARM_UP + 2
"""Number of steps whose losses are compared; a captured step is replayed in the last two."""
LEAST = 3
"""Steps to time per turn, even if they take longer than their share of the budget."""


class Timing(NamedTuple):
    """Seconds of one step."""

    wall: float
    cpu: float
    waited: float  # for data


@dataclass
class Trial:
    """Measurements of a rung.

    Attributes:
        rung: the rung.
        losses: of the checked steps.
        times: of the timed steps.
        apart: largest difference from the losses of the reference rung.
        weights: bytes of the trained weights.
        memory_mb: peak memory of a checked step after the first; None: unknown.
        absent: why it was not measured.
        failed: True if it failed or disagreed.
    """

    rung: Rung
    losses: Losses = field(default_factory=list)
    times: list[Timing] = field(default_factory=list)
    apart: float = 0.0
    weights: int = 0
    memory_mb: float | None = None
    absent: str = ""
    failed: bool = False


class Frames(NamedTuple):
    """Batches for pre-training, decoded per step or cached, and for fine-tuning."""

    decoded: Iterator[Batch]
    cached: Iterator[Batch]
    tuning: Iterator[Batch]

    def of(self, rung: Rung) -> Iterator[Batch]:
        """Return the batches for a rung."""
        if rung.kind == "fine-tuning":
            return self.tuning
        return self.cached if rung.way.cached else self.decoded


def rows(options: Options) -> Iterator[Row]:
    """Yield one ladder per size: vit_base on a GPU; vit_micro, and if full vit_tiny, on a CPU."""
    sizes: list[ModelSize] = ["vit_micro", "vit_tiny"] if options.full else ["vit_micro"]
    if options.device.type == "cuda":
        sizes = ["vit_base"]
    with tempfile.TemporaryDirectory() as folder:
        manifest = read_manifest(options.manifest or phantom(Path(folder)))
        for size in sizes:
            yield from table(manifest, config_of(size, options.device), options)


def phantom(folder: Path) -> Path:
    """Generate 64 pairs; return their manifest."""
    command = [sys.executable, "-m", "mics_fast.prepare", "phantom", "--pairs", "64"]
    subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder / "manifest.csv"


def table(manifest: Manifest, config: TrainConfig, options: Options) -> Iterator[Row]:
    """Check and measure every rung; yield one row per rung."""
    device = options.device
    single, half = (product(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    amp = half > PAYS * single
    reached = f"float32 {single / 1e12:.3g}, bfloat16 {half / 1e12:.3g}"
    print(f"products reach {reached} TFLOP/s; batch {config.pretrain.batch_size}, queue {QUEUE}")
    compiles = device.type == "cuda" or options.full
    rungs = [
        *ladder(config, manifest, amp=amp, compiles=compiles),
        *fine_tuning(config, manifest, amp=amp, compiles=compiles),
    ]
    frames = frames_of(manifest, config, device)
    start, used = time.perf_counter(), time.process_time()
    trials = measure(rungs, frames, options)
    cores = (time.process_time() - used) / (time.perf_counter() - start)
    for row in rows_of(trials, device, options.threads):
        row |= {"shape": f"{config.model.size}, batch {config.pretrain.batch_size}", "cores": cores}
        if not has_dali():
            row |= {"data_wait": None, "frames": "random"}
        print(line_of(row), flush=True)
        yield row


def measure(rungs: Sequence[Rung], frames: Frames, options: Options) -> list[Trial]:
    """Measure the rungs, once or three times, with one of them in memory at a time."""
    pairs, tuning = (
        unrepeated(list(itertools.islice(own, CHECKED))) for own in (frames.decoded, frames.tuning)
    )
    trials = {rung.name: Trial(rung) for rung in rungs}
    losses: dict[str, Losses] = {}
    turns, budget = (3, 120.0) if options.full else (1, 15.0)
    for _, rung in itertools.product(range(turns), rungs):
        trial = trials[rung.name]
        if trial.absent:
            continue
        if time.monotonic() > options.end:
            trial.absent = "" if trial.times else "no time was left"
            continue
        batches = tuning if rung.kind == "fine-tuning" else pairs
        try:
            attempt(trial, losses, batches, frames.of(rung), budget / turns / len(rungs),
                    options.device)  # fmt: skip
        except Exception as error:  # the other rungs are still measured
            traceback.print_exc()
            trial.absent, trial.failed = in_a_line(error), True
            # Rungs compared with this one are compared with its predecessor instead.
            losses[rung.name] = losses.get(rung.like or "", [])
    return list(trials.values())


def attempt(
    trial: Trial,
    losses: dict[str, Losses],
    batches: Sequence[Batch],
    loader: Iterator[Batch],
    budget: float,
    device: torch.device,
) -> None:
    """Build a rung, compare its losses with those of others, and time it for ``budget`` seconds.

    Raises:
        ValueError: its losses disagree.
    """
    gc.collect()  # the error of a failed rung keeps its step alive
    if device.type == "cuda":
        torch.cuda.empty_cache()
    step = trial.rung.build()
    trial.losses = losses_of(step, batches[:1])
    trial.weights = sum(p.nbytes for own in step.optimisers.values()
                        for group in own.param_groups for p in group["params"])  # fmt: skip
    step.release()
    begin = start_peak(device)
    for number, batch in enumerate(batches[1:], 1):
        values = step(batch, number)
        trial.losses.append({name: float(value) for name, value in values.items()})
    trial.memory_mb = None if begin is None else end_peak(device) - begin
    losses[trial.rung.name] = trial.losses
    trial.apart = disagreement(trial.rung, losses)
    times: list[Timing] = []
    timed_step(step, loader, device, len(batches))  # the loader may have to start
    while len(times) < LEAST or sum(one.wall for one in times) < budget:
        times.append(timed_step(step, loader, device, len(batches) + len(times)))
    trial.times += times


def timed_step(step: Step, loader: Iterator[Batch], device: torch.device, number: int) -> Timing:
    """Time one step on the loader's next batch, after freeing memory of the previous step."""
    step.release()
    begin, used = time.perf_counter(), time.process_time()
    batch = next(loader)
    waited = time.perf_counter() - begin
    step(batch, number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - begin, time.process_time() - used, waited)


def rows_of(trials: Sequence[Trial], device: torch.device, threads: int) -> list[Row]:
    """Make one row per rung; ``ratio`` is its time over that of rung g."""
    found = {trial.rung.name: row_of(trial, device, threads) for trial in trials}
    first, second, last = (found.get(name, {}) for name in ("a", "b", "g"))
    for row in found.values():
        if "absent" in row:
            continue
        row["x_ms"] = over(first, row, "ms")
        row["x_cpu_ms"] = over(first, row, "cpu_ms")
        row["times_b"] = over(second, row, "ms")
        row["ratio"] = None if row["kind"] == "fine-tuning" else over(row, last, "ms")
    return list(found.values())


def row_of(trial: Trial, device: torch.device, threads: int) -> Row:
    """Return the columns of one rung."""
    rung = trial.rung
    row: Row = {
        "operator": "training step", "threads": threads, "implementation": rung.name,
        "rung": rung.name, "kind": rung.kind, "precision": "bf16" if rung.way.amp else "fp32",
        "ours": rung.name in ("g", "h") or rung.kind != "ladder",
    }  # fmt: skip
    if trial.absent:
        row["absent"] = trial.absent
        return row | {"failed": True} if trial.failed else row
    peak = flops_of(device, torch.bfloat16 if rung.way.amp else torch.float32, threads)
    moved = 6 * trial.weights  # weights and both moments, read and written
    floor = max(rung.flops / peak, moved / bandwidth_of(device, LARGEST, threads))
    row |= speeds(trial, peak)
    row |= {
        "apart": trial.apart, "loss_first": trial.losses[0], "loss_last": trial.losses[-1],
        "memory_mb": trial.memory_mb, "bytes": moved, "flops": rung.flops,
        "floor_ms": 1e3 * floor, "share_of_floor": 1e3 * floor / row["ms"],
    }  # fmt: skip
    return row


def speeds(trial: Trial, peak: float) -> Row:
    """Return the columns of a rung's times; ``peak`` in FLOP/s."""
    rung = trial.rung
    times = percentiles([(one.wall, one.cpu) for one in trial.times])
    wall = times["median_ms"] / 1e3
    return {
        "ms": times["median_ms"],
        "min_ms": times["min_ms"],
        "p20_ms": times["p20_ms"],
        "p80_ms": times["p80_ms"],
        "cpu_ms": times["cpu_ms"],
        "rounds": len(trial.times),
        "pairs_per_second": rung.pairs / wall,
        "gflop_per_pair": rung.flops / rung.pairs / 1e9,
        "tflops": rung.flops / wall / 1e12,
        "mfu": rung.flops / wall / peak,
        "data_wait": statistics.median(one.waited for one in trial.times) / wall,
    }


def over(one: Row, other: Row, column: Literal["ms", "cpu_ms"]) -> float | None:
    """Return the ratio of two rows in a column; None if one was not measured."""
    if column not in one or not other.get(column):
        return None
    return one[column] / other[column]


def line_of(row: Row) -> str:
    """Format a row for printing."""
    if "absent" in row:
        outcome = "FAILED" if row.get("failed") else "not measured"
        return f"{row['rung']:15} {outcome} ({row['absent']})"
    memory, wait = row["memory_mb"], row["data_wait"]
    return (
        f"{row['rung']:15} {row['precision']}  {row['pairs_per_second']:8.2f} pairs/s "
        f"{row['ms']:9.1f} ms (CPU {row['cpu_ms']:9.1f})  {row['x_ms'] or 0:5.2f}x "
        f"(CPU {row['x_cpu_ms'] or 0:5.2f}x)  {row['gflop_per_pair']:8.2f} GFLOP/pair "
        f"{row['tflops']:7.3f} TFLOP/s  MFU {row['mfu']:6.1%}  "
        f"{'-' if memory is None else f'{memory:.0f}':>6} MB  wait {wait or 0:4.0%}  "
        f"loss apart {row['apart']:.0e}  cores {row['cores']:.2f}"
    )


def config_of(size: ModelSize, device: torch.device) -> TrainConfig:
    """Return the trainer's defaults with the demo's small heads, and without clipping."""
    config = TrainConfig(device="cuda" if device.type == "cuda" else "cpu")
    config.model.size = size
    batch = BATCHES[size]
    config.pretrain = replace(
        config.pretrain, batch_size=batch, queue_size=QUEUE, clip=0.0, adversarial_weight=0.1
    )
    labelled = max(1, batch // 4)
    config.finetune = replace(
        config.finetune, labelled_batch=labelled, unlabelled_batch=batch - labelled, clip=0.0
    )
    return config


def frames_of(manifest: Manifest, config: TrainConfig, device: torch.device) -> Frames:
    """Make batches from all rows of the manifest; random ones without DALI."""
    if not has_dali():
        return random_frames(manifest, config, device)
    rows, size = list(manifest.rows), size_of(config.model)
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
    return Frames(
        decoded=zip(loader(batch, None)),
        cached=zip(loader(batch, cache)),
        tuning=zip(
            loader(tuning.labelled_batch, cache),
            loader(tuning.unlabelled_batch, cache, strong=True),
            strict=True,
        ),
    )


def has_dali() -> bool:
    """Return True if DALI can read images here."""
    try:
        check_dali()
    except InputError:
        return False
    return True


def random_frames(manifest: Manifest, config: TrainConfig, device: torch.device) -> Frames:
    """Cycle through four batches of random frames on the device."""
    generator = torch.Generator(device).manual_seed(config.seed)
    side, names = size_of(config.model).image, manifest.modalities

    def views(rows: int) -> dict[str, torch.Tensor]:
        shape = (rows, 3, side, side)
        return {name: torch.randn(shape, generator=generator, device=device) for name in names}

    def batch(rows: int, number: int, strong: bool = False) -> PairBatch:
        ids = torch.arange(rows, device=device) + rows * number
        present = torch.ones(rows, len(names), dtype=torch.bool, device=device)
        return PairBatch(views(rows), views(rows) if strong else None, present,
                         ids % len(manifest.classes), present[:, 0], ids, ids)  # fmt: skip

    tuning = config.finetune
    pairs = [(batch(config.pretrain.batch_size, number),) for number in range(4)]
    both = [
        (batch(tuning.labelled_batch, number), batch(tuning.unlabelled_batch, number, strong=True))
        for number in range(4)
    ]
    return Frames(itertools.cycle(pairs), itertools.cycle(pairs), itertools.cycle(both))


def unrepeated(batches: Sequence[Batch]) -> list[Batch]:
    """Give the same frames distinct ids, because the published loss masks no repeats."""
    found, first = [], 0
    for batch in batches:
        parts = []
        for part in batch:
            ids = first + torch.arange(len(part.label), device=part.label.device)
            parts.append(replace(part, sample_id=ids, group_id=ids))
            first += len(ids)
        found.append(tuple(parts))
    return found
