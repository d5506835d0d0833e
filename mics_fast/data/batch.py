"""Batches: decoded samples become views on the training device.

On a GPU the DALI graph has already resized and blurred whole batches of squares. On a CPU it has
only decoded frames of different sizes, or the frames come from the cache; then threads resize,
blur, colour and normalise here, sample by sample, while DALI decodes the next batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mics_fast.data.augmentation import BLUR, Augmentation, View
from mics_fast.data.decoding import WHOLE, PairGraph, to_torch
from mics_fast.data.manifest import Row
from mics_fast.data.resize import blurred, resized_square
from mics_fast.data.views import Changes, colours_of, make_view


@dataclass
class PairBatch:
    """B rows of the manifest on the training device.

    Args:
        views: modality -> (B, 3, H, W) float32 or bfloat16, normalised: the weak or evaluation
            view; 0 if the image is missing.
        strong: the strong view of the same crops, if requested.
        present: (B, M) bool, columns in the order of ``views``.
        label: (B,) int64 class, -1 = unknown.
        labelled: (B,) bool, True if training may use the label.
        sample_id: (B,) int64 manifest row.
        group_id: (B,) int64 contrastive id.
        teacher: a weak view of other crops for the teacher of pre-training, if requested.
    """

    views: dict[str, Tensor]
    strong: dict[str, Tensor] | None
    present: Tensor
    label: Tensor
    labelled: Tensor
    sample_id: Tensor
    group_id: Tensor
    teacher: dict[str, Tensor] | None = None

    def split(self, parts: int) -> list[PairBatch]:
        """Split into parts of B / ``parts`` rows, in order; they share this batch's memory."""
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


FrameOrFile = np.ndarray | Tensor
"""An encoded image or a cached frame."""


@dataclass(frozen=True)
class Sample:
    """Input of the graph for one sample, with its row.

    Args:
        row: of the manifest; None for padding.
        present: (M,) bool, True for each modality that the sample has.
        images: one per modality, encoded or cached; a missing one is replaced by another image,
            whose view is set to 0.
        numbers: of its augmentation, from ``PairGraph.numbers``.
        crop: (4,) float32, region of the encoded images to decode.
        drawn: augmentation of each view; empty if there is none.
        problems: a sentence for each bad image that was skipped.
    """

    row: Row | None
    present: np.ndarray
    images: Sequence[FrameOrFile]
    numbers: tuple[np.ndarray, ...]
    crop: np.ndarray
    drawn: Mapping[View, Augmentation]
    problems: Sequence[str]


Views = dict[View, dict[str, Tensor]]
"""View -> modality -> (B, 3, H, W)."""


def batch_of(
    graph: PairGraph,
    samples: Sequence[Sample],
    outputs: Sequence[Any],
    dtype: torch.dtype,
    workers: Executor,
) -> PairBatch:
    """Make a batch of views and labels.

    Samples without any image are dropped.

    Args:
        graph: the steps from images to views.
        samples: of the batch.
        outputs: of the graph; if it does not run, the cached frames, one list per modality.
        dtype: of the views.
        workers: process the samples if the graph does not resize.
    """
    kept = [k for k, sample in enumerate(samples) if sample.row and sample.present.any()]
    rows = [row for k in kept if (row := samples[k].row)]
    those = [samples[k] for k in kept]
    present = np.array([s.present for s in those], bool).reshape(len(kept), len(graph.modalities))
    if graph.resizes:
        squares = [to_torch(output, graph.device) for output in outputs]
        if len(kept) < len(samples):
            there = _on_device(torch.tensor(kept, dtype=torch.int64), graph.device)
            squares = [of.index_select(0, there) for of in squares]
        views = _of_squares(graph, those, squares, dtype)
    else:
        frames = [[of[k] for k in kept] for of in outputs]
        views = _of_frames(graph, those, frames, dtype, workers)

    def on_device(values: Tensor) -> Tensor:
        return _on_device(values, graph.device)

    return PairBatch(
        views=views["weak"],
        strong=views.get("strong"),
        teacher=views.get("teacher"),
        present=on_device(torch.from_numpy(present)),
        label=on_device(torch.tensor([row.label for row in rows], dtype=torch.int64)),
        labelled=on_device(torch.tensor([row.labelled for row in rows], dtype=torch.bool)),
        sample_id=on_device(torch.tensor([row.index for row in rows], dtype=torch.int64)),
        group_id=on_device(torch.tensor([row.group for row in rows], dtype=torch.int64)),
    )


def _of_squares(
    graph: PairGraph, samples: Sequence[Sample], squares: Sequence[Tensor], dtype: torch.dtype
) -> Views:
    """Make views of the graph's (B, side, side, 3) uint8 squares."""
    views: Views = {}
    for kind, own in graph.frames_of(squares).items():
        views[kind] = {}
        for column, name in enumerate(graph.modalities):
            planes = own[column].permute(0, 3, 1, 2)
            planes = planes.to(torch.float32, memory_format=torch.contiguous_format)
            changes = _changes(graph, samples, kind, column)
            view = make_view(planes, name, graph.data, changes)
            there = np.array([sample.present[column] for sample in samples], bool)
            if not there.all():
                view *= _on_device(torch.from_numpy(there), graph.device)[:, None, None, None]
            views[kind][name] = view.to(dtype)
    return views


def _of_frames(
    graph: PairGraph,
    samples: Sequence[Sample],
    frames: Sequence[Sequence[Any]],
    dtype: torch.dtype,
    workers: Executor,
) -> Views:
    """Make views of (H, W, 3) uint8 frames, decoded or cached, one list per modality."""
    shape = (len(samples), 3, graph.image_size, graph.image_size)
    views: Views = {
        kind: {name: torch.empty(shape, dtype=dtype) for name in graph.modalities}
        for kind in graph.views
    }
    changes = {
        kind: [_changes(graph, samples, kind, column) for column in range(len(graph.modalities))]
        for kind in graph.views
    }

    def make(k: int) -> None:
        """Make all views of a sample."""
        sample = samples[k]
        for column, name in enumerate(graph.modalities):
            if not sample.present[column]:
                for view in views.values():
                    view[name][k] = 0
                continue
            frame = torch.from_numpy(np.asarray(frames[column][k]))
            for kind, view in views.items():
                if kind in graph.crops:  # otherwise it shares the square of the previous view
                    drawn = sample.drawn.get(kind)
                    region = WHOLE if drawn is None else graph.region(drawn, sample.crop)
                    square = resized_square(frame, graph.image_size, region)
                own = square
                if kind in graph.blurred:
                    own = blurred(square, float(sample.drawn[kind].colours(kind)[column, BLUR]))
                of = changes[kind][column]
                change = None if of is None else of.of_sample(k)
                view[name][k] = make_view(own.contiguous()[None], name, graph.data, change)[0]

    for _ in workers.map(make, range(len(samples))):
        pass
    return views


def _changes(
    graph: PairGraph, samples: Sequence[Sample], view: View, column: int
) -> Changes | None:
    """Collect the changes of one view of one modality; None without augmentation."""
    drawn = [sample.drawn[view] for sample in samples if sample.drawn]
    if graph.augment is None or not drawn:
        return None

    def on_device(values: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        return _on_device(torch.from_numpy(np.array(values)), graph.device)

    matrix, offset = colours_of(np.array([own.colours(view)[column] for own in drawn]))
    distorts = view == "strong" and bool(graph.augment.rotation or graph.augment.shear)
    erases = view == "strong" and graph.augment.erasing > 0
    return Changes(
        on_device(matrix),
        on_device(offset),
        on_device([own.affine for own in drawn]) if distorts else None,
        on_device([own.boxes[column] for own in drawn]) if erases else None,
    )


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without a host sync, which would wait for all queued GPU work."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values
