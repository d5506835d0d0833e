"""Loaders: batches of image pairs on the training device, from rows of the manifest.

The row and the augmentation of a sample are functions of its number in the training stream
(``augmentation.py``), so batches do not depend on ranks, threads or resume points. Pixels are
processed in ``decoding.py``, ``resize.py`` and ``views.py``, bad files in ``image_files.py``;
``stream.py`` runs it all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from mics_fast.common.errors import InputError, NoUsableImage
from mics_fast.data.augmentation import Augmentation, View, draw_augmentation
from mics_fast.data.batch import PairBatch, Sample
from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import PairGraph, decoder_of
from mics_fast.data.image_files import ImageFiles
from mics_fast.data.manifest import Row
from mics_fast.data.sampling import RowOrder, samples_of
from mics_fast.data.stream import (
    Prepared,
    Stream,
    encoded_sample,
    sample_of,
)
from mics_fast.options import AugmentConfig, DataConfig


class TrainLoader:
    """The endless training stream: shuffled by epoch, augmented, always in full batches.

    Sample n = step * batch_size + i of the stream is row ``order(seed, n // R)[n % R]`` of the R
    rows: batches cross the end of an epoch. Each rank takes a contiguous slice of every batch, or
    of each part of a batch. The order is a uniform permutation, or, if all rows lie in shards, one
    that goes shard by shard. With balanced classes, an epoch holds each class, not each row,
    equally often. Under the policy "skip", a row without any usable image is replaced by the next
    one of its epoch.

    Args:
        rows: training rows, at least one.
        modalities: names, in the order of ``PairBatch.present``.
        data: normalisation, threads, policy for bad files.
        augment: augmentation options.
        image_size: side of the views, pixels.
        batch_size: pairs per step over all ranks; a multiple of ``world_size * parts``.
        seed: of order and augmentation.
        step: number of the first batch.
        strong: also make the strong view.
        balanced: draw every class equally often; all rows must be labelled.
        device: where decoding, augmentation and batches live.
        rank: of this process.
        world_size: number of processes that share each batch.
        parts: number of equal parts of a batch that are processed one after the other.
        cache: holds the decoded frames of these rows; None: decode them in every epoch.
        teacher: also make the teacher's view, with its own crop, flip and colour.

    Raises:
        InputError: no rows, a batch that the ranks cannot share, no DALI, a standard deviation
            that is not positive; while iterating, a file that cannot be read or decoded.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        modalities: Sequence[str],
        *,
        data: DataConfig,
        augment: AugmentConfig,
        image_size: int,
        batch_size: int,
        seed: int,
        step: int = 0,
        strong: bool = False,
        balanced: bool = False,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        cache: FrameCache | None = None,
        teacher: bool = False,
    ) -> None:
        if not rows:
            raise InputError("there are no rows to train on, wanted at least one")
        if batch_size % (world_size * parts):
            raise InputError(
                f"a batch of {batch_size} cannot be shared by {world_size} processes in {parts} "
                f"parts, wanted a multiple of {world_size * parts}"
            )
        self.rows, self.batch_size, self.seed, self.step = rows, batch_size, seed, step
        self._augment, self._cache = augment, cache
        kept = None if cache is None else cache.device
        self._graph = PairGraph(
            modalities, data, image_size, device, augment, strong, kept, teacher
        )
        self._files = ImageFiles(data.on_bad_file, device, decoder_of(data, device))
        self._dtype = torch.bfloat16 if data.dtype == "bf16" else torch.float32
        self._rank, self._parts = rank, parts
        self._share = batch_size // world_size
        self._order = RowOrder(rows, seed, balanced=balanced)
        self._stream: Stream | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> PairBatch:
        if self._stream is None:
            self._stream = Stream(
                self._graph, self._files, self._prepare, self._share, self.step, self._dtype
            )
        batch = next(self._stream)
        before, self.step = self.epoch, self.step + 1
        if self.epoch > before:
            self._report(self.epoch)
        return batch

    def close(self) -> None:
        """Report the skipped images of the unfinished epoch, if any."""
        self._report(self.epoch + 1)

    def _report(self, epoch: int) -> None:
        self._files.report(f"epoch {epoch} of {len(self.rows)} rows")

    @property
    def epoch(self) -> int:
        """Number of complete passes over the rows before the next batch."""
        return self.step * self.batch_size // len(self.rows)

    def _prepare(self, step: int) -> Prepared:
        """Return this rank's samples of a batch."""
        numbers = samples_of(step, self.batch_size, self._share, self._rank, self._parts)
        if self._cache is not None:
            self._cache.fill([self._row(number)[0] for number in numbers])
        return Prepared([self._sample(number) for number in numbers])

    def _row(self, number: int, later: int = 0) -> tuple[Row, int]:
        """Return the row of a sample of the stream, or of one ``later`` in its epoch, and the
        number of its earlier draws."""
        place, before = self._order.place(number, later)
        return self.rows[place], before

    def _sample(self, number: int) -> Sample:
        """Return a sample of the stream; if it has no image, the next one that has."""
        problems: list[str] = []
        for later in range(len(self.rows)):
            sample = self._sample_of(*self._row(number, later))
            problems += sample.problems
            if sample.present.any():
                return replace(sample, problems=problems)
        raise InputError(f"none of {len(self.rows)} train rows has an image that can be used")

    def _sample_of(self, row: Row, epoch: int) -> Sample:
        graph, names = self._graph, self._graph.modalities
        drawn = self._draw(row.index, epoch)
        crop = graph.crop(drawn)
        how = (graph.numbers(drawn, crop), crop, drawn)
        if self._cache is None:
            return encoded_sample(self._files, row, names, *how)
        self._cache.fill([row])
        found = [self._cache.frame(row, name) for name in names]
        return sample_of(row, found, self._cache.blank(), *how)

    def _draw(self, sample_id: int, epoch: int) -> dict[View, Augmentation]:
        """Draw the augmentation of each view; the strong view has the crop of the weak one."""
        drawn = {
            view: draw_augmentation(
                self._augment,
                seed=self.seed,
                epoch=epoch,
                sample_id=sample_id,
                modalities=len(self._graph.modalities),
                teacher=view == "teacher",
            )
            for view in self._graph.crops
        }
        return {view: drawn.get(view, drawn["weak"]) for view in self._graph.views}


class EvalLoader:
    """One pass over the rows in order, with whole frames; the last batch may be smaller.

    Under the policy "skip", a row without any usable image is dropped.

    Args:
        rows: evaluation rows; may be empty.
        modalities: names, in the order of ``PairBatch.present``.
        data: normalisation, threads, policy for bad files.
        image_size: side of the views, pixels.
        batch_size: pairs per batch.
        device: where decoding and batches live.

    Raises:
        InputError: as ``TrainLoader``.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        modalities: Sequence[str],
        *,
        data: DataConfig,
        image_size: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.rows, self.batch_size = rows, min(batch_size, max(1, len(rows)))
        self._graph = PairGraph(modalities, data, image_size, device)
        self._files = ImageFiles(data.on_bad_file, device, decoder_of(data, device))

    @property
    def problems(self) -> Mapping[int, str]:
        """Row number -> sentence about its bad image, under "skip"."""
        return self._files.problems

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[PairBatch]:
        stream = Stream(self._graph, self._files, self._prepare, self.batch_size, step=0)
        found = False
        for _ in range(len(self)):
            batch = next(stream)
            if len(batch.label):
                found = True
                yield batch
        self._files.report("evaluation")
        if self.rows and not found:
            raise NoUsableImage(f"none of {len(self.rows)} rows has an image that can be used")

    def _prepare(self, step: int) -> Prepared:
        rows = self.rows[step * self.batch_size : (step + 1) * self.batch_size]
        # Batches prefetched past the end have no rows.
        some: Sequence[Row | None] = rows or [None]
        names = self._graph.modalities
        return Prepared([encoded_sample(self._files, row, names) for row in some])
