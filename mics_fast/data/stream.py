"""Batches on their way through the DALI graph: what enters for each sample, and what leaves.

A stream is told by ``prepare`` what the samples of a batch are, keeps them while the graph works on
them, and gives the views beside what is known of the rows. It recovers from images that cannot be
decoded: the graph is built anew at the same batch, once it is known which they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mics_fast.data.files import WHOLE, ImageFiles
from mics_fast.data.graph import PairGraph, ShardIndices
from mics_fast.data.manifest import Row
from mics_fast.data.shards import Member, write_indices
from mics_fast.data.views import make_view

# What is decoded in the place of a missing image: a black netpbm file, large enough to be cropped.
_PLACEHOLDER = np.frombuffer(b"P6 32 32 255\n" + bytes(32 * 32 * 3), dtype=np.uint8)
_NOWHERE = Member(Path(), 0, 0)  # of a row that is replaced
_WINDOW = 64  # batches


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

    def split(self, parts: int) -> list[PairBatch]:
        """Equal parts of B / ``parts`` rows, in order; they share this batch's memory."""
        size = len(self.label) // parts
        if size * parts != len(self.label):
            raise ValueError(f"a batch of {len(self.label)} rows has no {parts} equal parts")
        if parts == 1:
            return [self]

        def rows(values: Any, at: slice) -> Any:
            if isinstance(values, dict):
                return {name: value[at] for name, value in values.items()}
            return None if values is None else values[at]

        return [
            PairBatch(
                **{n: rows(v, slice(k * size, (k + 1) * size)) for n, v in vars(self).items()}
            )
            for k in range(parts)
        ]


Image = np.ndarray | Tensor | Member
"""An encoded image, a kept frame, or where an encoded image lies in a shard."""


@dataclass(frozen=True)
class Sample:
    """What the graph reads of one sample, and whose it is.

    Args:
        row: of the manifest; None: none.
        present: (M,) bool, which modalities it has.
        images: of each modality, encoded, kept, or where it lies in a shard; where there is none,
            another image, whose view is made black.
        numbers: of its augmentation, as ``PairGraph.numbers`` gives them.
        crop: (4,) float32, what is decoded of the encoded images.
        colours: (M, 5) numbers of each view; none where nothing is augmented.
        problems: a sentence on each bad image that it goes without.
    """

    row: Row | None
    present: np.ndarray
    images: Sequence[Image]
    numbers: tuple[np.ndarray, ...]
    crop: np.ndarray
    colours: Sequence[np.ndarray]
    problems: Sequence[str]


@dataclass(frozen=True)
class Prepared:
    """The samples of a batch on its way through the graph."""

    samples: Sequence[Sample]

    def images(self) -> list[list[Image]]:
        """A list a modality."""
        return [list(column) for column in zip(*(s.images for s in self.samples), strict=True)]

    def numbers(self) -> list[list[np.ndarray]]:
        """A list for each kind of number."""
        return [list(column) for column in zip(*(s.numbers for s in self.samples), strict=True)]


def sample_of(
    row: Row | None,
    found: Sequence[tuple[Image | None, str]],
    blank: Image,
    numbers: tuple[np.ndarray, ...],
    crop: np.ndarray,
    colours: Sequence[np.ndarray],
) -> Sample:
    """A sample of what was found of each modality: an image, or nothing and perhaps a sentence."""
    return Sample(
        row,
        present=np.array([image is not None for image, _ in found]),
        images=[blank if image is None else image for image, _ in found],
        numbers=numbers,
        crop=crop,
        colours=colours,
        problems=[sentence for _, sentence in found if sentence],
    )


def encoded_sample(
    files: ImageFiles,
    row: Row | None,
    names: Sequence[str],
    numbers: tuple[np.ndarray, ...] = (),
    crop: np.ndarray = WHOLE,
    colours: Sequence[np.ndarray] = (),
) -> Sample:
    """A sample whose images are read from files; of no row, one without images."""
    found = [files.read(row, name, crop) if row else (None, "") for name in names]
    return sample_of(row, found, _PLACEHOLDER, numbers, crop, colours)


def located_sample(
    files: ImageFiles,
    row: Row,
    names: Sequence[str],
    numbers: tuple[np.ndarray, ...],
    crop: np.ndarray,
    colours: Sequence[np.ndarray],
) -> Sample:
    """A sample whose images DALI reads from a shard; in the place of one that is missing, another
    of the same row."""
    found = [files.locate(row, name, crop) for name in names]
    there = [member for member, _ in found if member is not None]
    return sample_of(row, found, there[0] if there else _NOWHERE, numbers, crop, colours)


class Stream:
    """Batches step, step + 1, ... without end; built anew, at the same place, after a bad file.

    Of samples in shards the graph is told ``_WINDOW`` batches at a time, and then built anew.

    Args:
        graph: what becomes of the images.
        files: knows what to do with bad ones.
        prepare: number of a batch -> its samples.
        batch_size: most samples in a batch.
        step: number of the first batch.
        dtype: of the views.
        sharded: the images of the samples are members of shards.
    """

    def __init__(
        self,
        graph: PairGraph,
        files: ImageFiles,
        prepare: Callable[[int], Prepared],
        batch_size: int,
        step: int,
        dtype: torch.dtype = torch.float32,
        *,
        sharded: bool = False,
    ) -> None:
        self._graph, self._files, self._prepare = graph, files, prepare
        self._batch_size, self._step, self._dtype = batch_size, step, dtype
        self._sharded, self._end = sharded, step
        self._in_flight: dict[int, Prepared] = {}
        self._pipeline: Any = None

    def __next__(self) -> PairBatch:
        while True:
            if self._pipeline is None or (self._sharded and self._step == self._end):
                self._build()
            try:
                outputs = self._pipeline.run()
            except RuntimeError:
                # DALI cannot go on after an error.
                self._pipeline = None
                if not self._files.suspect(self._encoded_in_flight()):
                    raise
                continue
            frames = [_to_torch(output, self._graph.device) for output in outputs]
            samples = self._in_flight.pop(self._step).samples
            self._files.skip(sentence for sample in samples for sentence in sample.problems)
            self._step += 1
            return _assemble(self._graph, samples, frames, self._dtype)

    def _build(self) -> None:
        first = self._step
        self._in_flight.clear()

        def prepared(iteration: int) -> Prepared:
            step = first + iteration
            if step not in self._in_flight:
                self._in_flight[step] = self._prepare(step)
            return self._in_flight[step]

        def images(iteration: int) -> list[list[Any]]:
            return prepared(iteration).images()

        def numbers(iteration: int) -> list[list[np.ndarray]]:
            return prepared(iteration).numbers()

        if not self._sharded:
            self._pipeline = self._graph.build(images, numbers, self._batch_size)
            return
        self._end = first + _WINDOW
        samples: list[Any] = [s.images for k in range(_WINDOW) for s in prepared(k).samples]
        with tempfile.TemporaryDirectory() as folder:
            written = write_indices(samples, self._graph.modalities, Path(folder))
            indices = ShardIndices(*written)
            self._pipeline = self._graph.build(indices, numbers, self._batch_size)

    def _encoded_in_flight(self) -> Iterator[tuple[Row, str, np.ndarray]]:
        """The images that the graph may have stumbled on."""
        if self._graph.kept is not None:
            return
        ahead = self._graph.data.prefetch + 1
        for step in sorted(self._in_flight)[:ahead]:
            for sample in self._in_flight[step].samples:
                for name, there in zip(self._graph.modalities, sample.present, strict=True):
                    if there and sample.row is not None:
                        yield sample.row, name, sample.crop


def _to_torch(output: Any, device: torch.device) -> Tensor:
    """A copy that owns its memory; DALI reuses its own at the next run."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = output.as_tensor()
    frames = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
    # On the current stream, where the copy is ordered before both whatever reads the frames and
    # DALI's reuse of its buffer.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(dense, frames, cuda_stream=stream)
    return frames


def _assemble(
    graph: PairGraph, samples: Sequence[Sample], frames: Sequence[Tensor], dtype: torch.dtype
) -> PairBatch:
    """The views, made of the graph's frames, beside what is known of their rows."""

    def on_device(values: Tensor) -> Tensor:
        if graph.device.type == "cuda":
            return values.pin_memory().to(graph.device, non_blocking=True)
        return values

    kept = [k for k, sample in enumerate(samples) if sample.row and sample.present.any()]
    rows = [row for k in kept if (row := samples[k].row)]
    if len(kept) < len(samples):
        frames = [of[kept] for of in frames]
    samples = [samples[k] for k in kept]
    present = torch.from_numpy(
        np.array([s.present for s in samples], bool).reshape(len(kept), len(graph.modalities))
    )
    views: list[dict[str, Tensor]] = []
    for number, own in enumerate(graph.frames_of(frames)):
        views.append({})
        for column, name in enumerate(graph.modalities):
            colours = None
            if graph.augment is not None:
                colours = np.array([sample.colours[number][column] for sample in samples])
            view = make_view(own[column], name, graph.data, colours)
            there = present[:, column]
            if not there.all():
                view *= on_device(there)[:, None, None, None]
            views[-1][name] = view.to(dtype)
    return PairBatch(
        views=views[0],
        strong=views[1] if graph.strong else None,
        present=on_device(present),
        label=on_device(torch.tensor([row.label for row in rows], dtype=torch.int64)),
        labelled=on_device(torch.tensor([row.labelled for row in rows], dtype=torch.bool)),
        sample_id=on_device(torch.tensor([row.index for row in rows], dtype=torch.int64)),
        group_id=on_device(torch.tensor([row.group for row in rows], dtype=torch.int64)),
    )
