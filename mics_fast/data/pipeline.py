"""From rows of the manifest to batches of image pairs on the training device, by NVIDIA DALI.

Which row a sample is and how it is changed are functions of its number in the training stream
(``augment.py``), so a batch is the same on any number of ranks and threads and after a resume. What
happens to the pixels is in ``graph.py``, to bad files in ``files.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mics_fast.config import AugmentConfig, DataConfig
from mics_fast.data.augment import draw_augmentation, epoch_order
from mics_fast.data.cache import FrameCache
from mics_fast.data.files import WHOLE, ImageFiles
from mics_fast.data.graph import PairGraph
from mics_fast.data.manifest import Row
from mics_fast.errors import InputError

# What is decoded in the place of a missing image: a black netpbm file, large enough to be cropped.
_PLACEHOLDER = np.frombuffer(b"P6 32 32 255\n" + bytes(32 * 32 * 3), dtype=np.uint8)


@dataclass
class PairBatch:
    """B rows of the manifest on the training device.

    Args:
        views: modality -> (B, 3, H, W) float32 (bfloat16 where asked for), normalised: the weak or
            the evaluation view; 0 where the image is missing.
        strong: the strong view of the same crops, where asked for.
        present: (B, M) bool, columns in the order of ``views``.
        label: (B,) int64 class, -1 = unknown.
        labelled: (B,) bool, may training use the label.
        sample_id: (B,) int64 manifest row.
        group_id: (B,) int64 contrastive id.
    """

    views: dict[str, Tensor]
    strong: dict[str, Tensor] | None
    present: Tensor
    label: Tensor
    labelled: Tensor
    sample_id: Tensor
    group_id: Tensor


class TrainLoader:
    """The endless training stream: shuffled by epoch, augmented, always in full batches.

    Sample n = step * batch_size + i of the stream is row ``order(seed, n // R)[n % R]`` of the R
    rows: batches run over the end of an epoch. A rank takes its contiguous slice of every batch.
    A row none of whose images can be used, where bad files are skipped, is replaced by the next
    one of its epoch.

    Args:
        rows: what to train on, at least one.
        modalities: names, in the order of ``PairBatch.present``.
        data: normalisation, threads, what to do with bad files.
        augment: how pairs are changed.
        image_size: side of the views, pixels.
        batch_size: pairs a step over all ranks; a multiple of ``world_size``.
        seed: of order and augmentation.
        step: number of the first batch.
        strong: also make the strong view.
        device: where decoding, augmentation and batches live.
        rank: of this process.
        world_size: processes that share each batch.
        cache: keeps the decoded frames of these rows; None: decode anew each time.

    Raises:
        InputError: no rows, a batch that the ranks cannot share, no DALI, a standard deviation
            that is not positive; while iterating: a file that cannot be read or decoded.
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
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        cache: FrameCache | None = None,
    ) -> None:
        if not rows:
            raise InputError("there are no rows to train on, wanted at least one")
        if batch_size % world_size:
            raise InputError(
                f"a batch of {batch_size} cannot be shared by {world_size} processes, wanted a "
                f"multiple of {world_size}"
            )
        self.rows, self.batch_size, self.seed, self.step = rows, batch_size, seed, step
        self._augment, self._cache = augment, cache
        kept = None if cache is None else cache.device
        self._graph = PairGraph(modalities, data, image_size, device, augment, strong, kept)
        self._files = cache.files if cache else ImageFiles(data.on_bad_file, device)
        self._dtype = torch.bfloat16 if data.dtype == "bf16" else torch.float32
        self._share = batch_size // world_size
        self._offset = rank * self._share
        self._stream: _Stream | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> PairBatch:
        if self._stream is None:
            self._stream = _Stream(
                self._graph, self._files, self._prepare, self._share, self.step, self._dtype
            )
        batch = next(self._stream)
        before, self.step = self.epoch, self.step + 1
        for epoch in range(before, self.epoch):
            self._files.report(f"epoch {epoch + 1}")
        return batch

    @property
    def epoch(self) -> int:
        """How often all rows have come before the next batch begins."""
        return self.step * self.batch_size // len(self.rows)

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of the next batch, and what the stream is made of."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on with the batch at which the state was taken, on any number of ranks.

        Raises:
            InputError: the state belongs to another stream.
        """
        for name, here in self._identity().items():
            if state_dict[name] != here:
                raise InputError(
                    f"the saved loader position has {name} {state_dict[name]}, wanted {here}, "
                    "that of this run"
                )
        self.step = state_dict["step"]
        self._stream = None

    def _identity(self) -> dict[str, int]:
        names = "\n".join(f"{row.index} {row.id}" for row in self.rows)
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": len(self.rows),
            "rows_checksum": zlib.crc32(names.encode()),
        }

    def _prepare(self, step: int) -> _Prepared:
        """The samples of this rank in a batch."""
        first = step * self.batch_size + self._offset
        numbers = range(first, first + self._share)
        if self._cache is not None:
            self._cache.fill([self._row(number)[0] for number in numbers])
        return _Prepared([self._sample(number) for number in numbers])

    def _row(self, number: int, later: int = 0) -> tuple[Row, int]:
        """Row and epoch of a sample of the stream, or of one that comes later in its epoch."""
        count = len(self.rows)
        epoch, place = divmod(number, count)
        return self.rows[epoch_order(self.seed, epoch, count)[(place + later) % count]], epoch

    def _sample(self, number: int) -> _Sample:
        """A sample of the stream; the next one that has an image, where it has none."""
        problems: list[str] = []
        for later in range(len(self.rows)):
            sample = self._sample_of(*self._row(number, later))
            problems += sample.problems
            if sample.present.any():
                return replace(sample, problems=problems)
        raise InputError(f"none of {len(self.rows)} train rows has an image that can be used")

    def _sample_of(self, row: Row, epoch: int) -> _Sample:
        names = self._graph.modalities
        drawn = draw_augmentation(
            self._augment,
            seed=self.seed,
            epoch=epoch,
            sample_id=row.index,
            modalities=len(names),
        )
        numbers, crop = self._graph.numbers(drawn), drawn.crop()
        if self._cache is None:
            return _encoded_sample(self._files, row, names, crop, numbers)
        self._cache.fill([row])
        found = [self._cache.frame(row, name) for name in names]
        return _sample(row, found, self._cache.blank(), numbers, crop)


class EvalLoader:
    """One pass over the rows in their order, whole frames, the last batch smaller.

    A row none of whose images can be used is left out where bad files are skipped.

    Args:
        rows: what to evaluate; may be empty.
        modalities: names, in the order of ``PairBatch.present``.
        data: normalisation, threads, what to do with bad files.
        image_size: side of the views, pixels.
        batch_size: pairs a batch.
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
        self._files = ImageFiles(data.on_bad_file, device)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[PairBatch]:
        stream = _Stream(self._graph, self._files, self._prepare, self.batch_size, step=0)
        found = False
        for _ in range(len(self)):
            batch = next(stream)
            if len(batch.label):
                found = True
                yield batch
        self._files.report("evaluation")
        if self.rows and not found:
            raise InputError(f"none of {len(self.rows)} rows has an image that can be used")

    def _prepare(self, step: int) -> _Prepared:
        rows = self.rows[step * self.batch_size : (step + 1) * self.batch_size]
        # Past the end, where batches are made ahead, there is no row.
        some: Sequence[Row | None] = rows or [None]
        names = self._graph.modalities
        return _Prepared([_encoded_sample(self._files, row, names) for row in some])


@dataclass(frozen=True)
class _Sample:
    """What the graph reads of one sample, and whose it is.

    Args:
        row: of the manifest; None: none.
        present: (M,) bool, which modalities it has.
        images: of each modality, encoded or kept; something black where it has none.
        numbers: of its augmentation, as ``PairGraph.numbers`` gives them.
        crop: (4,) float32, what is decoded of the encoded images.
        problems: a sentence on each bad image that it goes without.
    """

    row: Row | None
    present: np.ndarray
    images: Sequence[np.ndarray | Tensor]
    numbers: tuple[np.ndarray, ...]
    crop: np.ndarray
    problems: Sequence[str]


@dataclass(frozen=True)
class _Prepared:
    """The samples of a batch on its way through the graph; keeps their arrays alive."""

    samples: Sequence[_Sample]

    def images(self) -> list[list[np.ndarray | Tensor]]:
        """A list a modality."""
        return [list(column) for column in zip(*(s.images for s in self.samples), strict=True)]

    def numbers(self) -> list[list[np.ndarray]]:
        """A list for each kind of number."""
        return [list(column) for column in zip(*(s.numbers for s in self.samples), strict=True)]


def _sample(
    row: Row | None,
    found: Sequence[tuple[np.ndarray | Tensor | None, str]],
    blank: np.ndarray | Tensor,
    numbers: tuple[np.ndarray, ...],
    crop: np.ndarray,
) -> _Sample:
    """A sample of what was found of each modality: an image, or nothing and perhaps a sentence."""
    return _Sample(
        row,
        present=np.array([image is not None for image, _ in found]),
        images=[blank if image is None else image for image, _ in found],
        numbers=numbers,
        crop=crop,
        problems=[sentence for _, sentence in found if sentence],
    )


def _encoded_sample(
    files: ImageFiles,
    row: Row | None,
    names: Sequence[str],
    crop: np.ndarray = WHOLE,
    numbers: tuple[np.ndarray, ...] = (),
) -> _Sample:
    """A sample whose images are read from files; of no row, one without images."""
    found = [files.read(row, name, crop) if row else (None, "") for name in names]
    return _sample(row, found, _PLACEHOLDER, numbers, crop)


class _Stream:
    """Batches step, step + 1, ... without end; built anew, at the same place, after a bad file.

    Args:
        graph: what becomes of the images.
        files: knows what to do with bad ones.
        prepare: number of a batch -> its samples.
        batch_size: most samples in a batch.
        step: number of the first batch.
        dtype: of the views.
    """

    def __init__(
        self,
        graph: PairGraph,
        files: ImageFiles,
        prepare: Callable[[int], _Prepared],
        batch_size: int,
        step: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._graph, self._files, self._prepare = graph, files, prepare
        self._batch_size, self._step, self._dtype = batch_size, step, dtype
        self._in_flight: dict[int, _Prepared] = {}
        self._pipeline: Any = None

    def __next__(self) -> PairBatch:
        while True:
            if self._pipeline is None:
                self._build()
            try:
                outputs = self._pipeline.run()
            except RuntimeError:
                # DALI cannot go on after an error.
                self._pipeline = None
                if not self._files.suspect(self._encoded_in_flight()):
                    raise
                continue
            views = [_to_torch(output, self._graph.device, self._dtype) for output in outputs]
            samples = self._in_flight.pop(self._step).samples
            self._files.skip(sentence for sample in samples for sentence in sample.problems)
            self._step += 1
            return _assemble(self._graph, samples, views)

    def _build(self) -> None:
        first = self._step
        self._in_flight.clear()

        def prepared(iteration: int) -> _Prepared:
            step = first + iteration
            if step not in self._in_flight:
                self._in_flight[step] = self._prepare(step)
            return self._in_flight[step]

        self._pipeline = self._graph.build(
            lambda iteration: prepared(iteration).images(),
            lambda iteration: prepared(iteration).numbers(),
            self._batch_size,
        )

    def _encoded_in_flight(self) -> Iterator[tuple[Row, str, np.ndarray]]:
        """The images that the graph may have stumbled on."""
        if self._graph.kept is not None:
            return
        for _, prepared in sorted(self._in_flight.items()):
            for sample in prepared.samples:
                for name, there in zip(self._graph.modalities, sample.present, strict=True):
                    if there and sample.row is not None:
                        yield sample.row, name, sample.crop


def _to_torch(output: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy that owns its memory; DALI reuses its own at the next run."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = output.as_tensor()
    images = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    # On the current stream, where the copy is ordered before both whatever reads the images and
    # DALI's reuse of its buffer.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(dense, images, cuda_stream=stream)
    return images.to(dtype)


def _assemble(graph: PairGraph, samples: Sequence[_Sample], images: Sequence[Tensor]) -> PairBatch:
    """Images as the graph gives them, weak views first, beside what is known of their rows."""

    def on_device(values: Tensor) -> Tensor:
        if graph.device.type == "cuda":
            return values.pin_memory().to(graph.device, non_blocking=True)
        return values

    names = graph.modalities
    kept = [k for k, sample in enumerate(samples) if sample.row and sample.present.any()]
    rows = [row for k in kept if (row := samples[k].row)]
    if len(kept) < len(samples):
        images = [view[kept] for view in images]
    present = torch.from_numpy(
        np.array([samples[k].present for k in kept], bool).reshape(len(kept), len(names))
    )
    for number, view in enumerate(images):
        there = present[:, number % len(names)]
        if not there.all():
            view *= on_device(there)[:, None, None, None]
    return PairBatch(
        views=dict(zip(names, images, strict=False)),
        strong=dict(zip(names, images[len(names) :], strict=True)) if graph.strong else None,
        present=on_device(present),
        label=on_device(torch.tensor([row.label for row in rows], dtype=torch.int64)),
        labelled=on_device(torch.tensor([row.labelled for row in rows], dtype=torch.bool)),
        sample_id=on_device(torch.tensor([row.index for row in rows], dtype=torch.int64)),
        group_id=on_device(torch.tensor([row.group for row in rows], dtype=torch.int64)),
    )
