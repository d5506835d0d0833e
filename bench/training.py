"""Time a training step, from the published code's to this project's: a ladder in one run.

    a   the published step: bench/baselines/published.py
    b   ... without singular value decomposition
    c   one forward: of the model (alternating), and of the discriminator for both
    d   scaled_dot_product_attention, then bfloat16 where large products are 1.5 times as fast in it
        (on a CPU attention in bfloat16 is written out: its fused kernel is slower)
    e   torch.compile of the encoders' blocks
    f   the contrastive loss by the fused operator
    g   frames from memory, not decoded for every step
    h   on a GPU: the whole step replayed as one CUDA graph

Beside it: the turbo preset, which changes the method, and the fine-tuning step. All rungs have the
same weights, batches and queue, which is filled with random features. Before anything is timed each
rung's losses are held against those of the rung before, on the same frames; the run fails where
they differ. What is timed includes the loader, DALI's for every rung (the published one decodes
with Pillow between the steps). Rungs take turns, round by round; a turn's first step is not timed.
Times are medians; "CPU" is that of all threads, "x" how many times faster than rung a. "MB" is the
most memory a step takes beside weights and optimisers. GFLOP are counted as the rung makes them,
without the decomposition. MFU is their share of the peak of the rung's precision (peaks.py; of an
H100 and H200 989 TFLOP/s in bfloat16, 67 in float32). The floor is their time at that peak, or, if
that is longer, of reading and writing trained weights and both moments. "cores" is CPU time over
wall time: well below the number of threads, the machine was busy with something else, and only the
CPU times tell anything. On a CPU compiling takes longer than --quick has, which leaves rung e out.
A rung that disagrees or fails is left out and told; the others go on. Without DALI all rungs have
random frames that lie on the device, and nothing is said of waiting for data.

    python -m bench --full --only training [--manifest FILE]      (else 64 pairs of the phantom)
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.case import in_a_line
from bench.memory import end_peak, start_peak
from bench.peaks import LARGEST, bandwidth_of, flops_of, product
from bench.rungs import Batch, Losses, Rung, disagreement, fine_tuning, ladder, losses_of
from bench.timing import row_of
from mics_fast import prepare
from mics_fast.common.errors import InputError
from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import check_dali
from mics_fast.data.loaders import PairBatch, TrainLoader
from mics_fast.data.manifest import Manifest, read_manifest
from mics_fast.models.sizes import SIZES
from mics_fast.options.config import CacheConfig, DataConfig, TrainConfig

BATCHES = {"vit_micro": 32, "vit_tiny": 8, "vit_small": 8, "vit_base": 16}
QUICK_BATCHES = {"vit_micro": 32, "vit_tiny": 4, "vit_small": 2, "vit_base": 16}
QUEUE = 4096
PAYS = 1.5  # times float32's speed, for bfloat16 to be worth its rounding
Turn = list[tuple[float, float, float]]
"""Wall, CPU and data-wait seconds of each step."""


def table(manifest: Manifest, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and measure everything; one row for each rung."""
    config = config_of(options)
    device = torch.device(options.device)
    single, half = (product(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    amp = half > PAYS * single
    reached = f"float32 {single / 1e12:.3g}, bfloat16 {half / 1e12:.3g}"
    print(f"products reach {reached} TFLOP/s; batch {config.pretrain.batch_size}, queue {QUEUE}")
    compiles = device.type == "cuda" or not options.quick
    torch._dynamo.config.recompile_limit = 64  # the compiled rungs share the code of their blocks
    loaders = loaders_of(manifest, config, device)
    pretraining = ladder(config, manifest.modalities, amp=amp, compiles=compiles)
    classes = len(manifest.classes)
    tuning = fine_tuning(config, manifest.modalities, classes, amp=amp, compiles=compiles)
    count = 2 if options.quick else 4
    kept = {name: list(itertools.islice(loader, count)) for name, loader in loaders.items()}
    rungs: dict[str, Rung] = {}
    losses: dict[str, Losses] = {}
    rows: dict[str, dict[str, Any]] = {}
    kinds = {"ladder": pretraining, "fine-tuning": tuning}
    built = [as_far_as_it_goes(kind, own, rows) for kind, own in kinds.items()]
    for rung in itertools.chain(*built):
        precision = "bf16" if rung.way.amp else "fp32"
        row: dict[str, Any] = {"rung": rung.name, "precision": precision}
        rows[rung.name] = row
        if time.monotonic() > options.end:
            row["absent"] = "no time was left"
            continue
        batches = unrepeated(kept["tuning" if rung.name.startswith("fine") else "decoded"])
        try:
            found, row["memory_mb"] = losses_and_memory(rung, batches, device)
            row["apart"] = disagreement(rung, losses | {rung.name: found})
        except (Exception, SystemExit) as error:  # the other rungs go on
            traceback.print_exc()
            row |= {"absent": in_a_line(error), "failed": True}
            # Those that were to be held against it are held against the one before it.
            losses[rung.name] = losses.get(rung.like or "", [])
            continue
        losses[rung.name], rungs[rung.name] = found, rung
        row |= {"loss_first": found[0], "loss_last": found[-1]}
    print(f"losses agree over {count} steps; timing {len(rungs)} rungs")
    left = options.end - time.monotonic()
    times, cores = take_turns(rungs, loaders, device, min(15.0 if options.quick else 120.0, left))
    print(f"cores {cores:.2f}")
    threads = torch.get_num_threads()
    bandwidth = bandwidth_of(device, LARGEST, threads)
    for name, rung in rungs.items():
        row = rows[name]
        best = flops_of(device, torch.bfloat16 if rung.way.amp else torch.float32, threads)
        row |= speeds(times[name], rung.flops, pairs_of(config, name), best)
        row |= {"bytes": bytes_of(rung), "flops": rung.flops}
        row["floor_ms"] = 1e3 * max(rung.flops / best, row["bytes"] / bandwidth)
        row["share_of_floor"] = row["floor_ms"] / row["ms"]
        for key in ("ms", "cpu_ms"):
            first = rows.get("a", {}).get(key)
            row[f"x_{key}"] = first / row[key] if first and row[key] else None
        row |= {"rounds": len(times[name]), "cores": cores}
        row |= {} if has_dali() else {"data_wait": None, "frames": "random"}
        print(line(row), flush=True)
    return list(rows.values())


def as_far_as_it_goes(
    kind: str, rungs: Iterator[Rung], rows: dict[str, dict[str, Any]]
) -> Iterator[Rung]:
    """The rungs up to one that cannot even be built, for want of memory, say: a row tells."""
    last = "none"
    try:
        for rung in rungs:
            last = rung.name
            yield rung
    except Exception as error:  # the other rungs go on
        traceback.print_exc()
        name = f"{kind}, after {last}"
        rows[name] = {"rung": name, "absent": in_a_line(error), "failed": True}


def bytes_of(rung: Rung) -> int:
    """What a step cannot but move: every trained weight and its two moments, read and written."""
    groups = [group for own in rung.step.optimisers.values() for group in own.param_groups]
    return sum(6 * weight.nbytes for group in groups for weight in group["params"])


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
    """Batches of pre-training, "decoded" or "cached", and of fine-tuning, from all rows; without
    DALI random ones."""
    if not has_dali():
        return random_loaders(manifest, config, device)
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


def has_dali() -> bool:
    """Whether frames can be read."""
    try:
        check_dali()
    except InputError:
        return False
    return True


def random_loaders(
    manifest: Manifest, config: TrainConfig, device: torch.device
) -> dict[str, Iterator[Batch]]:
    """The same batches of random frames over and over, each four of them, on the device."""
    generator = torch.Generator(device).manual_seed(config.seed)
    side, names = SIZES[config.model.size].image, manifest.modalities

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
    return {
        "decoded": itertools.cycle(pairs),
        "cached": itertools.cycle(pairs),
        "tuning": itertools.cycle(both),
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
    begin = start_peak(device)
    for number, batch in enumerate(batches[1:], 1):
        values = rung.step(batch, number)
        losses.append({name: float(value) for name, value in values.items()})
    memory = None if begin is None else end_peak(device) - begin
    rung.step.release()
    return losses, memory


def take_turns(
    rungs: dict[str, Rung], loaders: dict[str, Iterator[Batch]], device: torch.device, budget: float
) -> tuple[dict[str, Turn], float]:
    """The steps of each rung, and CPU time over wall time of it all; ``budget`` seconds, and three
    rounds at least, or two where the time was over before it began."""
    times: dict[str, Turn] = {name: [] for name in rungs}
    start, used, rounds = time.perf_counter(), time.process_time(), 0
    while rounds < (3 if budget > 0 else 2) or time.perf_counter() - start < budget:
        rounds += 1
        for name, rung in rungs.items():
            way = "cached" if rung.way.cached else "decoded"
            loader = loaders["tuning" if name.startswith("fine") else way]
            first = timed_step(rung, loader, device, rounds)[0]
            for _ in range(max(1, int(0.3 / first))):
                times[name].append(timed_step(rung, loader, device, rounds))
            rung.step.release()
    return times, (time.process_time() - used) / (time.perf_counter() - start)


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
    wall, _, waited = (statistics.median(column) for column in zip(*times, strict=True))
    row = row_of([(one, cpu) for one, cpu, _ in times])
    return {
        "ms": row.pop("median_ms"),
        **row,
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


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    memory = row["memory_mb"]
    return (
        f"{row['rung']:15} {row['precision']}  {row['pairs_per_second']:8.2f} pairs/s "
        f"{row['ms']:9.1f} ms (CPU {row['cpu_ms']:9.1f})  {row['x_ms'] or 0:5.2f}x "
        f"(CPU {row['x_cpu_ms'] or 0:5.2f}x)  {row['gflop_per_pair']:8.2f} GFLOP/pair "
        f"{row['tflops']:7.3f} TFLOP/s  MFU {row['mfu']:6.1%}  "
        f"{'-' if memory is None else f'{memory:.0f}':>6} MB  wait {row['data_wait'] or 0:4.0%}  "
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
                device=device.type, size=size, batch=None, quick=not options.full, end=options.end
            )
            found = {row["rung"]: row for row in table(manifest, given)}
            for name, row in found.items():
                trains_likewise = not name.startswith("fine")
                label = {
                    "operator": "training step",
                    "shape": f"{size}, batch {config_of(given).pretrain.batch_size}",
                    "threads": options.threads,
                    "implementation": name,
                    "ours": name in ("g", "turbo") or not trains_likewise,
                    "ratio": over(row, found.get("g", {})),
                    "times_b": over(found.get("b", {}), row),
                }
                yield label | row if trains_likewise else label | row | {"ratio": None}


def over(one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """How many times as long as another a rung takes, where both were measured."""
    return one["ms"] / other["ms"] if "ms" in one and "ms" in other else None
