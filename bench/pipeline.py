"""The image pipeline: training views per second, for several loaders in one run.

The DALI pipeline, uncached and from cached frames, is compared with a common alternative: a PyTorch
DataLoader whose workers, one per core, use Pillow, without and with JPEG draft mode (which decodes
at a half or a quarter of the size where possible, and so changes the image a little). All use the
same numbers for crop, flip, resize, colour and normalisation; the views are first checked against
DALI's. Rounds alternate; each runs in a child process and warms up before its clock starts. CPU
time is that of the process and its workers while the clock runs; "cores" is CPU time over wall
time. If it is well below the number of cores, the machine was busy with something else.

The floor of a loader that decodes is decoding only: the same crops of the same files on the same
cores, by DALI or Pillow, whichever is faster. Draft mode does less, and has a floor of its own.
These alternate with the others. The floor of cached frames is the bytes of crops and views over the
bandwidth. FLOPs are not counted. "MB" is the growth of the process up to its peak, with the private
memory of its workers; it is always host memory.

    python -m bench --full --only pipeline --manifest FILE      (of python -m mics_fast.prepare)
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from bench.memory import CPU, end_peak, private_megabytes, start_peak
from bench.peaks import peaks_of
from bench.rows import Options
from bench.rows import Row as ResultRow
from bench.timing import percentiles
from mics_fast.common.errors import InputError
from mics_fast.data.augmentation import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Augmentation,
    draw_augmentation,
    epoch_order,
)
from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import check_dali, decoded, new_pipeline
from mics_fast.data.loaders import TrainLoader
from mics_fast.data.manifest import Row, read_manifest
from mics_fast.data.shards import read_image
from mics_fast.data.views import IMAGENET_MEAN, IMAGENET_STD
from mics_fast.options import AugmentConfig, CacheConfig, DataConfig

BATCH, SEED = 32, 0
CORES = len(os.sched_getaffinity(0))
BATCHES = 12  # timed
WARM_UP = 5  # batches before and after them: more than any loader prefetches
MOST_APART = 2.0  # mean grey levels by which other decoders and resizers may differ
AUGMENT = AugmentConfig()
DALI_ALONE, PILLOW_ALONE = "decoding alone, DALI", "decoding alone, Pillow"
DRAFT_ALONE = "decoding alone, draft mode"
Mode = Literal["none", "host", "device"]
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
Views = tuple[Tensor, ...]
"""The normalised views of each modality, (B, 3, side, side)."""


@dataclass(frozen=True)
class Loader:
    """A way to make training views.

    Attributes:
        start: starts the loader; returns its batches.
        decoder: name of the decoder.
        ours: True for this project's loaders.
        kept: True if frames come from memory, decoded before the clock starts.
        floor: loaders whose shortest time is its floor; empty: the bytes of cached frames, or, for
            a loader that only decodes, no floor.
    """

    start: Callable[[], Iterable[Any]]
    decoder: str
    ours: bool = False
    kept: bool = False
    floor: tuple[str, ...] = ()


class Round(NamedTuple):
    """Time and memory of one round of a loader."""

    seconds: float  # per pair
    cpu: float  # CPU seconds per pair
    cores: float
    megabytes: float | None  # at the peak; None if unknown


def side_of(device: torch.device) -> int:
    """Return the side of a view in pixels: of vit_tiny, or on a GPU of the paper's vit_base."""
    return 384 if device.type == "cuda" else 224


def sample_of(rows: Sequence[Row], names: Sequence[str], number: int) -> tuple[Row, Augmentation]:
    """Return a row of the training stream, and its augmentation."""
    epoch, place = divmod(number, len(rows))
    row = rows[epoch_order(SEED, epoch, len(rows))[place]]
    return row, draw_augmentation(
        AUGMENT, seed=SEED, epoch=epoch, sample_id=row.index, modalities=len(names)
    )


class PillowPairs(torch.utils.data.Dataset[np.ndarray]):
    """Samples of the training stream by Pillow: (M, side, side, 3) uint8, in the stream's order.

    Args:
        rows: rows of the manifest.
        names: modalities.
        side: of a view, in pixels.
        draft: use JPEG draft mode.
        alone: only decode; a sample is then its number.
    """

    def __init__(
        self, rows: Sequence[Row], names: Sequence[str], side: int, *, draft: bool, alone: bool
    ) -> None:
        self.rows, self.names, self.side = rows, names, side
        self.draft, self.alone = draft, alone

    def __len__(self) -> int:
        return BATCH * (1 + WARM_UP + BATCHES + WARM_UP)

    def __getitem__(self, number: int) -> np.ndarray:
        row, drawn = sample_of(self.rows, self.names, number)
        images = [self._opened(row, name, drawn) for name in self.names]
        if self.alone:
            for image in images:
                image.load()
            return np.array(number)
        views = []
        for image, colour in zip(images, drawn.weak, strict=True):
            left, top, width, height = drawn.crop() * np.tile(image.size, 2)
            box = (left, top, left + width, top + height)
            image = image.resize((self.side, self.side), Image.Resampling.BILINEAR, box)
            for flipped, way in zip(drawn.flip, (0, 1), strict=True):
                image = image.transpose(Image.Transpose(way)) if flipped else image
            views.append(np.asarray(image.convert("RGB", colour_matrix(colour))))
        return np.stack(views)

    def _opened(self, row: Row, name: str, drawn: Augmentation) -> Image.Image:
        """Open the image; it is decoded on first use."""
        file = row.files[name]
        assert file is not None
        image = Image.open(file)
        if self.draft:
            width, height = (math.ceil(self.side / share) for share in drawn.shape)
            image.draft("RGB", (width, height))
        return image


def colour_matrix(numbers: np.ndarray) -> tuple[float, ...]:
    """Convert the documented colour change to Pillow's 3 x 4 matrix."""
    turn = np.radians(numbers[HUE])
    rotation = [[1, 0, 0], [0, np.cos(turn), np.sin(turn)], [0, -np.sin(turn), np.cos(turn)]]
    saturation = np.diag([1, numbers[SATURATION], numbers[SATURATION]])
    matrix = np.linalg.inv(YIQ) @ rotation @ saturation @ YIQ * numbers[CONTRAST]
    offset = np.full((3, 1), 128 * (1 - numbers[CONTRAST]))
    return tuple((numbers[BRIGHTNESS] * np.hstack([matrix, offset])).ravel())


def pillow_loader(pairs: PillowPairs) -> Iterable[Views]:
    """Yield uint8 batches from the workers, normalised in this process, as timm does."""
    mean, std = (255 * torch.tensor(x).reshape(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    for batch in torch.utils.data.DataLoader(pairs, batch_size=BATCH, num_workers=CORES):
        if pairs.alone:
            yield ()
            continue
        yield tuple((view.permute(0, 3, 1, 2) - mean) / std for view in batch.unbind(1))


def dali_loader(
    rows: Sequence[Row], names: Sequence[str], device: torch.device, mode: Mode
) -> Iterable[Views]:
    """Run this project's loader; a cache is filled before the clock starts."""
    data, side = DataConfig(threads=CORES, cache=CacheConfig(mode)), side_of(device)
    cache = None
    if mode != "none":
        cache = FrameCache(rows, names, data=data, image_size=side, device=device)
        cache.fill(rows)
    loader = TrainLoader(
        rows, names, data=data, augment=AUGMENT, image_size=side, batch_size=BATCH, seed=SEED,
        device=device, cache=cache,
    )  # fmt: skip
    for batch in loader:
        yield tuple(batch.views.values())


def dali_decoding(
    rows: Sequence[Row], names: Sequence[str], device: torch.device
) -> Iterable[Views]:
    """Run only DALI's decoder, on the same crops."""
    from nvidia.dali import fn

    def samples(batch: int) -> list[tuple[Row, Augmentation]]:
        return [sample_of(rows, names, batch * BATCH + place) for place in range(BATCH)]

    def images(batch: int) -> list[list[np.ndarray]]:
        found = [row for row, _ in samples(batch)]
        return [[read_image(row.files[name]) for row in found] for name in names]  # type: ignore[arg-type]

    pipeline = new_pipeline(device, CORES, BATCH, DataConfig().prefetch)
    with pipeline:
        encoded = fn.external_source(source=images, num_outputs=len(names))
        crop = fn.external_source(source=lambda batch: [d.crop() for _, d in samples(batch)])
        pipeline.set_outputs(*(decoded(image, device, crop) for image in encoded))
    pipeline.build()
    while True:
        pipeline.run()
        yield ()


def loaders_of(
    rows: Sequence[Row], names: Sequence[str], device: torch.device
) -> dict[str, Loader]:
    """Return all loaders by name."""
    ours = "nvJPEG, mixed" if device.type == "cuda" else "libjpeg-turbo in DALI"
    jpeg = features.version("libjpeg_turbo")
    pillow = f"libjpeg-turbo {jpeg} in Pillow" if jpeg else "libjpeg in Pillow"
    kept: tuple[Mode, ...] = ("host", "device") if device.type == "cuda" else ("host",)
    either = (DALI_ALONE, PILLOW_ALONE)

    def dali(mode: Mode) -> Callable[[], Iterable[Any]]:
        return partial(dali_loader, rows, names, device, mode)

    def pairs(*, draft: bool = False, alone: bool = False) -> Callable[[], Iterable[Any]]:
        pairs = PillowPairs(rows, names, side_of(device), draft=draft, alone=alone)
        return partial(pillow_loader, pairs)

    after = "none after the first epoch"
    cached = {f"DALI, {mode} cache": Loader(dali(mode), after, True, True) for mode in kept}
    return {
        "DALI": Loader(dali("none"), ours, ours=True, floor=either),
        **cached,
        "Pillow": Loader(pairs(), pillow, floor=either),
        PILLOW_ALONE: Loader(pairs(alone=True), pillow),
        "Pillow, draft mode": Loader(pairs(draft=True), pillow, floor=(DRAFT_ALONE,)),
        DRAFT_ALONE: Loader(pairs(draft=True, alone=True), pillow),
        DALI_ALONE: Loader(partial(dali_decoding, rows, names, device), ours),
    }


def one_round(rows: Sequence[Row], names: Sequence[str], device: str, name: str) -> Round:
    """Run one round of a loader in a new process, without threads of other loaders."""
    torch.set_num_threads(1)  # the loaders have threads or workers of their own
    check_dali()  # loads its libraries, so that they do not count as memory of a loader
    start = loaders_of(rows, names, torch.device(device))[name].start
    memory = start_peak(CPU)
    loader = iter(start())
    for _ in range(1 + WARM_UP):  # the first batch builds the pipeline and fills the cache
        next(loader)
    clock, used = time.perf_counter(), cpu_seconds()
    for _ in range(BATCHES):
        next(loader)
    synchronise()
    wall, spent = time.perf_counter() - clock, cpu_seconds() - used
    if memory is not None:
        workers = [child.pid for child in multiprocessing.active_children()]
        shared = sum(private_megabytes(worker) for worker in workers if worker is not None)
        memory = end_peak(CPU) - memory + shared
    pairs = BATCHES * BATCH
    return Round(wall / pairs, spent / pairs, spent / wall, memory)


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers, including running ones (Linux)."""
    workers = multiprocessing.active_children()  # reaps finished workers, which os.times includes
    return sum(os.times()[:4]) + sum(worker_seconds(child.pid) for child in workers if child.pid)


def worker_seconds(process: int) -> float:
    """Return the CPU time of a running process, in user and kernel mode."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def check_differences(rows: Sequence[Row], names: Sequence[str], device: torch.device) -> None:
    """Compare the first batch of each loader with DALI's.

    Raises:
        AssertionError: the mean difference exceeds a few grey levels.
    """
    scale = 255 * torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    mean = 255 * torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)
    views = next(iter(dali_loader(rows, names, device, "none")))
    ours = torch.stack([view.cpu() * scale + mean for view in views], 1)
    for name, draft in (("Pillow", False), ("Pillow, draft mode", True)):
        pairs = PillowPairs(rows, names, side_of(device), draft=draft, alone=False)
        theirs = torch.from_numpy(np.stack([pairs[k] for k in range(BATCH)])).permute(0, 1, 4, 2, 3)
        apart = (ours - theirs).abs().mean().item()
        print(f"{name} differs from DALI by {apart:.2f} grey levels on average")
        assert apart < MOST_APART, f"{name} does not make the views that DALI makes"


def rows(options: Options) -> Iterator[ResultRow]:
    """Measure every loader; yield one row per loader, or one that names what is missing."""
    if options.manifest is None:
        print("pipeline: not measured (give --manifest FILE)")
        yield {"absent": "no --manifest was given"}
        return
    manifest = read_manifest(options.manifest)
    try:
        check_dali()
    except InputError as error:
        print(f"pipeline: not measured ({error})")
        yield {"absent": str(error)}
        return
    complete = [row for row in manifest.rows if all(row.files.values())]
    images = [replace(row, index=k) for k, row in enumerate(complete)]
    check_differences(images, manifest.modalities, options.device)
    yield from table(images, manifest.modalities, options.device, 5 if options.full else 2)


def table(
    images: Sequence[Row], names: Sequence[str], device: torch.device, rounds: int
) -> Iterator[ResultRow]:
    """Yield one row per loader; ``ratio`` is its time over DALI's."""
    loaders = loaders_of(images, names, device)
    measured = rounds_of(loaders, images, names, device, rounds)
    medians = {
        name: statistics.median(one.seconds for one in own) for name, own in measured.items()
    }
    torch.set_num_threads(CORES)
    for name, own in measured.items():
        loader = loaders[name]
        moved, footprint = bytes_of(images, names, device, kept=loader.kept)
        floor = min((medians[other] for other in loader.floor), default=None)
        if loader.kept:
            floor = moved / peaks_of(device, footprint).bytes
        yield {
            "operator": "training views",
            "shape": f"{len(images)} pairs to {side_of(device)} px",
            "threads": CORES,
            "implementation": name,
            "ours": loader.ours,
            "decoder": loader.decoder,
            **speeds(own),
            "ratio": medians[name] / medians["DALI"],
            "bytes": moved,
            "flops": None,
            "floor_ms": None if floor is None else 1e3 * floor,
            "share_of_floor": None if floor is None else floor / medians[name],
            "pillow": PIL.__version__,
        }


def rounds_of(
    loaders: dict[str, Loader],
    images: Sequence[Row],
    names: Sequence[str],
    device: torch.device,
    rounds: int,
) -> dict[str, list[Round]]:
    """Run the rounds of all loaders, alternating between them."""
    measured: dict[str, list[Round]] = {name: [] for name in loaders}
    for _, name in itertools.product(range(rounds), loaders):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            future = pool.submit(one_round, images, names, str(device), name)
            measured[name].append(future.result())
    return measured


def speeds(rounds: list[Round]) -> ResultRow:
    """Return the columns for a loader's rounds."""
    times = percentiles([(one.seconds, one.cpu) for one in rounds])
    memory = [one.megabytes for one in rounds if one.megabytes is not None]
    return {
        "median_ms": times["median_ms"],
        "min_ms": times["min_ms"],
        "p20_ms": times["p20_ms"],
        "p80_ms": times["p80_ms"],
        "cpu_ms_per_pair": times["cpu_ms"],
        "pairs_per_second": 1e3 / times["median_ms"],
        "slowest": 1 / max(one.seconds for one in rounds),
        "fastest": 1 / min(one.seconds for one in rounds),
        "cores": statistics.median(one.cores for one in rounds),
        "extra_mb": max(memory, default=None),
        "rounds": len(rounds),
    }


def bytes_of(
    images: Sequence[Row], names: Sequence[str], device: torch.device, *, kept: bool
) -> tuple[int, int]:
    """Return the bytes moved per pair, and the bytes of the loader's working set.

    A pair moves its files, or the crops of its cached frames, and its views in float32. The working
    set is all files or cached frames and one batch of views.
    """
    side = side_of(device)
    views = 4 * len(names) * 3 * side**2
    frame = len(names) * 3 * round(side * 256 / 224) ** 2
    samples = [sample_of(images, names, number) for number in range(len(images))]
    if kept:
        share = statistics.mean(float(drawn.shape.prod()) for _, drawn in samples)
        return round(share * frame) + views, len(images) * frame + BATCH * views
    files = [file.stat().st_size for row, _ in samples for file in row.files.values() if file]
    return round(sum(files) / len(images)) + views, sum(files) + BATCH * views
