"""The stream of batches through the DALI graph, and its recovery from bad images.

A stream asks ``prepare`` for the samples of a batch, keeps them while the graph works, and joins
them with the graph's output (``batch.py``). If an image cannot be decoded, the stream finds the
image and rebuilds the graph at the same batch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mics_fast.data.augmentation import Augmentation, View
from mics_fast.data.batch import FrameOrFile, PairBatch, Sample, batch_of
from mics_fast.data.decoding import WHOLE, PairGraph, consumer
from mics_fast.data.image_files import ImageFiles
from mics_fast.data.image_threads import image_workers
from mics_fast.data.manifest import Row

# Decoded in place of a missing image: a black BMP file, large enough to be cropped.
_SIDE = 32
_HEADER = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54 + 3 * _SIDE**2, 0, 0, 54,
                      40, _SIDE, _SIDE, 1, 24, 0, 3 * _SIDE**2, 0, 0, 0, 0)  # fmt: skip
_PLACEHOLDER = np.frombuffer(_HEADER + bytes(3 * _SIDE**2), dtype=np.uint8)
NOT_AUGMENTED: Mapping[View, Augmentation] = {}


@dataclass(frozen=True)
class Prepared:
    """The samples of a batch that is on its way through the graph."""

    samples: Sequence[Sample]

    def images(self) -> list[list[FrameOrFile]]:
        """Return one list per modality."""
        return [list(column) for column in zip(*(s.images for s in self.samples), strict=True)]

    def numbers(self) -> list[list[np.ndarray]]:
        """Return one list per kind of number."""
        return [list(column) for column in zip(*(s.numbers for s in self.samples), strict=True)]


def sample_of(
    row: Row | None,
    found: Sequence[tuple[FrameOrFile | None, str]],
    blank: FrameOrFile,
    numbers: tuple[np.ndarray, ...],
    crop: np.ndarray,
    drawn: Mapping[View, Augmentation],
) -> Sample:
    """Make a sample from the image, or None and perhaps a sentence, found for each modality."""
    return Sample(
        row,
        present=np.array([image is not None for image, _ in found]),
        images=[blank if image is None else image for image, _ in found],
        numbers=numbers,
        crop=crop,
        drawn=drawn,
        problems=[sentence for _, sentence in found if sentence],
    )


def encoded_sample(
    files: ImageFiles,
    row: Row | None,
    names: Sequence[str],
    numbers: tuple[np.ndarray, ...] = (),
    crop: np.ndarray = WHOLE,
    drawn: Mapping[View, Augmentation] = NOT_AUGMENTED,
) -> Sample:
    """Make a sample whose images are read from files; without a row, it has no images."""
    found = [files.read(row, name, crop) if row else (None, "") for name in names]
    return sample_of(row, found, _PLACEHOLDER, numbers, crop, drawn)


class Stream:
    """Endless batches step, step + 1, ...; after a bad file the graph is rebuilt at the same batch.

    Args:
        graph: the steps from images to views.
        files: reader of the images, with the policy for bad ones.
        prepare: batch number -> its samples.
        batch_size: largest number of samples in a batch.
        step: number of the first batch.
        dtype: of the views.
    """

    def __init__(
        self,
        graph: PairGraph,
        files: ImageFiles,
        prepare: Callable[[int], Prepared],
        batch_size: int,
        step: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._graph, self._files, self._prepare = graph, files, prepare
        self._batch_size, self._step, self._dtype = batch_size, step, dtype
        self._in_flight: dict[int, Prepared] = {}
        self._pipeline: Any = None
        self._workers = image_workers(graph.data.threads)

    def __next__(self) -> PairBatch:
        samples, outputs = self._run() if self._graph.runs else self._kept()
        self._files.skip(sentence for sample in samples for sentence in sample.problems)
        self._step += 1
        return batch_of(self._graph, samples, outputs, self._dtype, self._workers)

    def _kept(self) -> tuple[Sequence[Sample], Sequence[Any]]:
        """Return the samples of the batch and their cached frames."""
        prepared = self._prepare(self._step)
        return prepared.samples, prepared.images()

    def _run(self) -> tuple[Sequence[Sample], Sequence[Any]]:
        """Return the samples of the batch and the graph's outputs, valid until its next run."""
        while True:
            if self._pipeline is None:
                self._build()
            try:
                outputs = self._pipeline.run(consumer(self._graph.device))
            except RuntimeError:
                # DALI cannot continue after an error.
                self._pipeline = None
                if not self._files.suspect(self._encoded_in_flight()):
                    raise
                continue
            return self._in_flight.pop(self._step).samples, outputs

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

        self._pipeline = self._graph.build(images, numbers, self._batch_size)

    def _encoded_in_flight(self) -> Iterator[tuple[Row, str, np.ndarray]]:
        """Yield the images that may have made the graph fail."""
        if self._graph.kept is not None:
            return
        ahead = self._graph.data.prefetch + 1
        for step in sorted(self._in_flight)[:ahead]:
            for sample in self._in_flight[step].samples:
                for name, there in zip(self._graph.modalities, sample.present, strict=True):
                    if there and sample.row is not None:
                        yield sample.row, name, sample.crop
