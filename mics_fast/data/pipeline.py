"""From rows of the manifest to batches of image pairs on the training device, by NVIDIA DALI.

Which row a sample is and how it is changed are functions of its number in the training stream
(``augment.py``), so a batch is the same on any number of ranks and threads and after a resume. What
happens to the pixels is in ``graph.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mics_fast.config import AugmentConfig, DataConfig
from mics_fast.data.augment import draw_augmentation, epoch_order
from mics_fast.data.graph import PREFETCH, PairGraph
from mics_fast.data.manifest import Row
from mics_fast.errors import InputError

# What is decoded in the place of a missing image: a black netpbm file, large enough to be cropped.
_PLACEHOLDER = np.frombuffer(b"P6 32 32 255\n" + bytes(32 * 32 * 3), dtype=np.uint8)


@dataclass
class PairBatch:
    """B rows of the manifest on the training device.

    Args:
        views: modality -> (B, 3, H, W) float32, normalised: the weak or the evaluation view; 0
            where the image is missing.
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

    Args:
        rows: what to train on, at least one.
        modalities: names, in the order of ``PairBatch.present``.
        data: normalisation and threads.
        augment: how pairs are changed.
        image_size: side of the views, pixels.
        batch_size: pairs a step over all ranks; a multiple of ``world_size``.
        seed: of order and augmentation.
        step: number of the first batch.
        strong: also make the strong view.
        device: where decoding, augmentation and batches live.
        rank: of this process.
        world_size: processes that share each batch.

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
    ) -> None:
        if not rows:
            raise InputError("there are no rows to train on, wanted at least one")
        if batch_size % world_size:
            raise InputError(
                f"a batch of {batch_size} cannot be shared by {world_size} processes, wanted a "
                f"multiple of {world_size}"
            )
        self.rows, self.batch_size, self.seed, self.step = rows, batch_size, seed, step
        self._graph = PairGraph(modalities, data, image_size, device, augment, strong)
        self._share = batch_size // world_size
        self._offset = rank * self._share
        self._batches: Iterator[PairBatch] | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> PairBatch:
        if self._batches is None:
            self._batches = _batches(self._graph, self._draw, self._share, self.seed, self.step)
        batch = next(self._batches)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch, and what the stream is made of."""
        return {"step": self.step, **self._identity()}

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
        self._batches = None

    def _identity(self) -> dict[str, int]:
        names = "\n".join(f"{row.index} {row.id}" for row in self.rows)
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": len(self.rows),
            "rows_checksum": zlib.crc32(names.encode()),
        }

    def _draw(self, step: int, position: int) -> tuple[Row, int]:
        """Row and epoch of a sample of this rank."""
        count = len(self.rows)
        epoch, place = divmod(step * self.batch_size + self._offset + position, count)
        return self.rows[epoch_order(self.seed, epoch, count)[place]], epoch


class EvalLoader:
    """One pass over the rows in their order, whole frames, the last batch smaller.

    Args:
        rows: what to evaluate; may be empty.
        modalities: names, in the order of ``PairBatch.present``.
        data: normalisation and threads.
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

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[PairBatch]:
        batches = _batches(self._graph, self._draw, self.batch_size, seed=0, step=0)
        for _ in range(len(self)):
            yield next(batches)

    def _draw(self, step: int, position: int) -> tuple[Row, int] | None:
        place = step * self.batch_size + position
        return (self.rows[place], 0) if place < len(self.rows) else None


Draw = Callable[[int, int], tuple[Row, int] | None]
"""(batch number, position in it) -> row and epoch; None past the end, after the last row."""


def _batches(
    graph: PairGraph, draw: Draw, batch_size: int, seed: int, step: int
) -> Iterator[PairBatch]:
    """Batches step, step + 1, ... without end."""
    first = step

    def source(info: Any) -> tuple[np.ndarray, ...]:
        return _sample(graph, draw(first + info.iteration, info.idx_in_batch), seed)

    pipeline = graph.build(source, batch_size)
    while True:
        try:
            outputs = pipeline.run()
        except RuntimeError:
            for in_flight in range(step, step + PREFETCH + 1):
                _name_undecodable(graph, _rows(draw, in_flight, batch_size))
            raise
        rows = _rows(draw, step, batch_size)
        yield _assemble(graph, rows, [_to_torch(x, graph.device)[: len(rows)] for x in outputs])
        step += 1


def _sample(graph: PairGraph, drawn: tuple[Row, int] | None, seed: int) -> tuple[np.ndarray, ...]:
    """What the graph reads of one sample: files and, where it augments, how."""
    row, epoch = drawn or (None, 0)
    files = tuple(_read(row, name) for name in graph.modalities)
    if graph.augment is None:
        return files
    numbers = draw_augmentation(
        graph.augment,
        seed=seed,
        epoch=epoch,
        sample_id=0 if row is None else row.index,
        modalities=len(graph.modalities),
    )
    colours = (numbers.weak, numbers.strong) if graph.strong else (numbers.weak,)
    return (*files, numbers.anchor, numbers.shape, numbers.flip, *colours)


def _read(row: Row | None, modality: str) -> np.ndarray:
    """The bytes of an image file; the placeholder's where there is none."""
    path = None if row is None else row.files[modality]
    if row is None or path is None:
        return _PLACEHOLDER
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}), wanted the {modality} image of manifest "
            f"row {row.id!r}"
        ) from None


def _rows(draw: Draw, step: int, batch_size: int) -> list[Row]:
    drawn = (draw(step, position) for position in range(batch_size))
    return [sample[0] for sample in drawn if sample is not None]


def _name_undecodable(graph: PairGraph, rows: Sequence[Row]) -> None:
    """Raise an ``InputError`` for the first image of the rows that cannot be decoded, if any."""
    images = [(row, name) for row in rows for name in graph.modalities]
    culprit = graph.first_undecodable(_read(*image) for image in images)
    if culprit is not None:
        row, name = images[culprit]
        raise InputError(
            f"{row.files[name]} cannot be decoded, wanted the {name} image of manifest row "
            f"{row.id!r}"
        ) from None


def _to_torch(output: Any, device: torch.device) -> Tensor:
    """A copy that owns its memory; DALI reuses its own at the next run."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = output.as_tensor()
    images = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    # On the current stream, where the copy is ordered before both whatever reads the images and
    # DALI's reuse of its buffer.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(dense, images, cuda_stream=stream)
    return images


def _assemble(graph: PairGraph, rows: Sequence[Row], images: Sequence[Tensor]) -> PairBatch:
    """Images as the graph gives them, weak views first, beside what is known of their rows."""

    def on_device(values: Tensor) -> Tensor:
        if graph.device.type == "cuda":
            return values.pin_memory().to(graph.device, non_blocking=True)
        return values

    names = graph.modalities
    present = torch.tensor([[row.files[name] is not None for name in names] for row in rows])
    for number, view in enumerate(images):
        there = present[:, number % len(names)]
        if not there.all():
            view *= on_device(there)[:, None, None, None]
    return PairBatch(
        views=dict(zip(names, images, strict=False)),
        strong=dict(zip(names, images[len(names) :], strict=True)) if graph.strong else None,
        present=on_device(present),
        label=on_device(torch.tensor([row.label for row in rows])),
        labelled=on_device(torch.tensor([row.labelled for row in rows])),
        sample_id=on_device(torch.tensor([row.index for row in rows])),
        group_id=on_device(torch.tensor([row.group for row in rows])),
    )
