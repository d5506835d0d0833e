"""The image pipeline: pairs a second of training views, each way to make them in one run.

The DALI pipeline, uncached and from frames kept in memory, stands beside what many would write: a
PyTorch DataLoader whose workers use Pillow, without and with JPEG draft mode (which decodes at a
half or a quarter of the size where that is enough, and so changes the image a little). All crop,
flip, resize, colour and normalise by the same numbers; how far their views are from those of DALI
is checked first. Rounds alternate; each is a process of its own and warms up before its clock runs.
"cores" is CPU time over wall time of a round with its start: well below the number of cores, the
machine was busy with something else. "CPU ms" is that CPU time for each pair, which suffers less.

    python -m bench --full --only pipeline --manifest FILE      (of python -m mics_fast.prepare)
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from mics_fast.config import AugmentConfig, CacheConfig, DataConfig
from mics_fast.data.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    draw_augmentation,
    epoch_order,
)
from mics_fast.data.cache import FrameCache
from mics_fast.data.manifest import Row, read_manifest
from mics_fast.data.pipeline import TrainLoader
from mics_fast.data.views import IMAGENET_MEAN, IMAGENET_STD

SIDE, BATCH, SEED, WORKERS = 224, 32, 0, 2
BATCHES = 16  # on the clock
WARM_UP = 6  # batches before it, and after it: more than any of the loaders makes ahead
MOST_APART = 2.0  # grey levels on average, by which other decoders and resizes may differ
AUGMENT = AugmentConfig()
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
Views = tuple[Tensor, ...]
"""The normalised views of each modality, (B, 3, SIDE, SIDE)."""


class PillowPairs(torch.utils.data.Dataset):
    """Samples of the training stream by Pillow: (M, SIDE, SIDE, 3) uint8, in the stream's order.

    Args:
        rows: what to train on.
        names: modalities.
        draft: use JPEG draft mode.
    """

    def __init__(self, rows: Sequence[Row], names: Sequence[str], draft: bool) -> None:
        self.rows, self.names, self.draft = rows, names, draft

    def __len__(self) -> int:
        return BATCH * (1 + WARM_UP + BATCHES + WARM_UP)

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, len(self.rows))
        row = self.rows[epoch_order(SEED, epoch, len(self.rows))[place]]
        drawn = draw_augmentation(
            AUGMENT, seed=SEED, epoch=epoch, sample_id=row.index, modalities=len(self.names)
        )
        views = []
        for name, colour in zip(self.names, drawn.weak, strict=True):
            image = Image.open(row.files[name])
            if self.draft:
                image.draft("RGB", tuple(math.ceil(SIDE / share) for share in drawn.shape))
            left, top, width, height = drawn.crop() * np.tile(image.size, 2)
            box = (left, top, left + width, top + height)
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
            for flipped, way in zip(drawn.flip, (0, 1), strict=True):
                image = image.transpose(Image.Transpose(way)) if flipped else image
            views.append(np.asarray(image.convert("RGB", colour_matrix(colour))))
        return np.stack(views)


def colour_matrix(numbers: np.ndarray) -> tuple[float, ...]:
    """The documented colour change as Pillow's 3 x 4 matrix."""
    turn = np.radians(numbers[HUE])
    rotation = [[1, 0, 0], [0, np.cos(turn), np.sin(turn)], [0, -np.sin(turn), np.cos(turn)]]
    saturation = np.diag([1, numbers[SATURATION], numbers[SATURATION]])
    matrix = np.linalg.inv(YIQ) @ rotation @ saturation @ YIQ * numbers[CONTRAST]
    offset = np.full((3, 1), 128 * (1 - numbers[CONTRAST]))
    return tuple((numbers[BRIGHTNESS] * np.hstack([matrix, offset])).ravel())


def pillow_loader(rows: Sequence[Row], names: Sequence[str], draft: bool) -> Iterable[Views]:
    """Batches of uint8 from two workers, normalised here, as timm does."""
    mean, std = (255 * torch.tensor(x).reshape(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    loader = torch.utils.data.DataLoader(
        PillowPairs(rows, names, draft),
        batch_size=BATCH,
        num_workers=WORKERS,
    )
    for batch in loader:
        yield tuple((view.permute(0, 3, 1, 2) - mean) / std for view in batch.unbind(1))


def dali_loader(
    rows: Sequence[Row], names: Sequence[str], device: torch.device, mode: str
) -> Iterable[Views]:
    """The project's own; with a cache that holds every frame before the clock runs."""
    data = DataConfig(threads=os.cpu_count() or 1, cache=CacheConfig(mode))
    cache = None
    if mode != "none":
        cache = FrameCache(rows, names, data=data, image_size=SIDE, device=device)
        cache.fill(rows)
    loader = TrainLoader(
        rows, names, data=data, augment=AUGMENT, image_size=SIDE, batch_size=BATCH, seed=SEED,
        device=device, cache=cache,
    )  # fmt: skip
    for batch in loader:
        yield tuple(batch.views.values())


def loaders_of(
    rows: Sequence[Row], names: Sequence[str], device: torch.device
) -> dict[str, tuple[Callable[[], Iterable[Views]], str]]:
    """Implementation -> a function that starts it, and its decoder."""
    ours = "nvJPEG, mixed" if device.type == "cuda" else "libjpeg-turbo in DALI"
    jpeg = features.version("libjpeg_turbo")
    pillow = f"libjpeg-turbo {jpeg} in Pillow" if jpeg else "libjpeg in Pillow"
    modes = ("none", "host", "device") if device.type == "cuda" else ("none", "host")
    found: dict[str, tuple[Callable[[], Iterable[Views]], str]] = {}
    for mode in modes:
        name = "DALI" if mode == "none" else f"DALI, {mode} cache"
        decoder = ours if mode == "none" else "none after the first epoch"
        found[name] = (lambda mode=mode: dali_loader(rows, names, device, mode), decoder)
    for draft in (False, True):
        name = f"Pillow, {WORKERS} workers{', draft mode' if draft else ''}"
        found[name] = (lambda draft=draft: pillow_loader(rows, names, draft), pillow)
    return found


def one_round(
    rows: Sequence[Row], names: Sequence[str], device: str, name: str
) -> tuple[float, float, float]:
    """Pairs a second, cores used, and CPU milliseconds a pair; in a new process, where no thread
    of another implementation runs."""
    torch.set_num_threads(1)  # the loaders have two threads or workers of their own
    start = loaders_of(rows, names, torch.device(device))[name][0]
    loader = iter(start())
    next(loader)  # imports, builds, fills the cache
    used, begun = cpu_seconds(), time.perf_counter()
    for _ in range(WARM_UP):
        next(loader)
    clock = time.perf_counter()
    for _ in range(BATCHES):
        next(loader)
    synchronise()
    rate = BATCHES * BATCH / (time.perf_counter() - clock)
    for _ in itertools.islice(loader, WARM_UP + 1):  # to the end, where workers are waited for
        pass
    spent, wall = cpu_seconds() - used, time.perf_counter() - begun
    return rate, spent / wall, 1e3 * spent / (BATCH * (BATCHES + 2 * WARM_UP))


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """CPU time of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def check_differences(rows: Sequence[Row], names: Sequence[str], device: torch.device) -> None:
    """The first batch of each is that of DALI to some grey levels on average: the same work.

    Raises:
        AssertionError: it is not.
    """
    scale = 255 * torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    mean = 255 * torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)
    views = next(iter(dali_loader(rows, names, device, "none")))
    ours = torch.stack([view.cpu() * scale + mean for view in views], 1)
    for name, draft in (("Pillow", False), ("Pillow, draft mode", True)):
        pairs = PillowPairs(rows, names, draft)
        theirs = torch.from_numpy(np.stack([pairs[k] for k in range(BATCH)])).permute(0, 1, 4, 2, 3)
        apart = (ours - theirs).abs().mean().item()
        print(f"{name} differs from DALI by {apart:.2f} grey levels on average")
        assert apart < MOST_APART, f"{name} does other work than DALI"


def rows(device: torch.device, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Measure everything; a row for each implementation, or one that says what is missing."""
    if options.manifest is None:
        print("pipeline: not measured (give --manifest FILE)")
        yield {"absent": "no --manifest was given"}
        return
    manifest = read_manifest(options.manifest)
    images = [replace(row, index=k) for k, row in enumerate(manifest.rows)]
    check_differences(images, manifest.modalities, device)
    yield from table(images, manifest.modalities, device, 5 if options.full else 2)


def table(
    images: Sequence[Row], names: Sequence[str], device: torch.device, rounds: int
) -> Iterator[dict[str, object]]:
    """One row for each implementation; ``ratio``: how many times as long as DALI it takes."""
    decoders = {name: decoder for name, (_, decoder) in loaders_of(images, names, device).items()}
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in decoders}
    for _, name in itertools.product(range(rounds), decoders):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            future = pool.submit(one_round, images, names, str(device), name)
            measured[name].append(future.result())
    base = statistics.median(rate for rate, _, _ in measured["DALI"])
    for name, decoder in decoders.items():
        own, cores, milliseconds = (list(column) for column in zip(*measured[name], strict=True))
        rate = statistics.median(own)
        print(
            f"{name:30} {rate:7.1f} pairs/s ({min(own):.1f} to {max(own):.1f})  "
            f"{rate / base:5.2f}x  cores {statistics.median(cores):.2f}  "
            f"CPU ms {statistics.median(milliseconds):.1f}  decoder: {decoder}"
        )
        yield {
            "operator": "training views",
            "shape": f"{len(images)} pairs to {SIDE} px",
            "threads": os.cpu_count(),
            "implementation": name,
            "ours": name.startswith("DALI"),
            "decoder": decoder,
            "pairs_per_second": rate,
            "slowest": min(own),
            "fastest": max(own),
            "ratio": base / rate,
            "cores": statistics.median(cores),
            "cpu_ms": statistics.median(milliseconds),
            "pillow": PIL.__version__,
            "rounds": rounds,
        }
