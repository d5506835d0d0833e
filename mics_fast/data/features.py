"""Kept features of frozen encoders, and batches of them in the order of the training stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mics_fast.common.errors import InputError
from mics_fast.data.batch import PairBatch
from mics_fast.data.manifest import Row
from mics_fast.data.sampling import RowOrder, samples_of


@dataclass(frozen=True)
class Features:
    """Features of R rows, in their order.

    Args:
        rows: of the manifest.
        present: (R, M) bool, columns in the order of the modalities.
        plain: modality -> (R, D) float32, of the whole frame.
        augmented: modality -> (R * K, D), those of a row beside each other; K = 0: none.
    """

    rows: Sequence[Row]
    present: Tensor
    plain: Mapping[str, Tensor]
    augmented: Mapping[str, Tensor]

    @property
    def views(self) -> int:
        """Return the number K of augmented views."""
        return len(next(iter(self.augmented.values()))) // max(1, len(self.rows))

    def to(self, device: torch.device) -> Features:
        """Move all features to a device."""
        moved = [
            {n: own.to(device) for n, own in of.items()} for of in (self.plain, self.augmented)
        ]
        return Features(self.rows, self.present.to(device), *moved)


class FeatureRows:
    """Batches of kept features.

    Args:
        features: of at least these rows.
        rows: those that batches are made of.
        device: where batches live.

    Raises:
        InputError: no row has features.
    """

    def __init__(self, features: Features, rows: Sequence[Row], device: torch.device) -> None:
        place = {row.index: number for number, row in enumerate(features.rows)}
        self.rows = [row for row in rows if row.index in place]
        if not self.rows:
            raise InputError(f"none of {len(rows)} rows has an image that can be used")
        self._features, self._device = features.to(device), device
        facts = [
            [place[row.index], row.label, row.index, row.group, row.labelled] for row in self.rows
        ]
        self._facts = torch.tensor(facts, dtype=torch.int64).T.contiguous().to(device)

    def batch(self, at: np.ndarray, augmented: np.ndarray | None = None) -> PairBatch:
        """Return the batch of some of the rows.

        Args:
            at: their positions in ``rows``, (B,) int64.
            augmented: number of the augmented view of each, any whole number, (B,) int64; None: no
                strong view.
        """
        index = torch.from_numpy(at).to(self._device)
        place, label, sample, group, labelled = self._facts.index_select(1, index).unbind()
        own = self._features
        strong = None
        if augmented is not None and own.views:
            view = torch.from_numpy(augmented % own.views).to(self._device)
            strong = picked(own.augmented, place * own.views + view)
        elif augmented is not None:
            strong = picked(own.plain, place)
        return PairBatch(
            views=picked(own.plain, place),
            strong=strong,
            present=own.present.index_select(0, place),
            label=label,
            labelled=labelled.bool(),
            sample_id=sample,
            group_id=group,
        )


def picked(features: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return some rows of each modality's features."""
    return {name: own.index_select(0, rows) for name, own in features.items()}


class FeatureLoader:
    """The training stream of ``TrainLoader`` on kept features: the same rows in the same order.

    The weak view is the plain one; the strong view of a row's e-th epoch is the augmented one
    number e modulo K.

    Args:
        source: rows and their features.
        batch_size, seed, step, strong, balanced, rank, world_size, parts: as ``TrainLoader``.
    """

    def __init__(
        self,
        source: FeatureRows,
        batch_size: int,
        *,
        seed: int,
        step: int = 0,
        strong: bool = False,
        balanced: bool = False,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ) -> None:
        self._source, self._strong, self.step = source, strong, step
        self._order = RowOrder(source.rows, seed, balanced=balanced)
        self._batch, self._parts = batch_size, parts
        self._rank, self._share = rank, batch_size // world_size

    def __iter__(self) -> Iterator[PairBatch]:
        return self

    def __next__(self) -> PairBatch:
        numbers = samples_of(self.step, self._batch, self._share, self._rank, self._parts)
        self.step += 1
        places, epochs = self._order.places(numbers)
        return self._source.batch(places, epochs if self._strong else None)


class FeaturePass:
    """One pass over rows of kept features in their order, the last batch smaller.

    Args:
        source: rows and their features.
        batch_size: rows of a batch.
    """

    def __init__(self, source: FeatureRows, batch_size: int) -> None:
        self._source, self._size = source, batch_size

    def __iter__(self) -> Iterator[PairBatch]:
        count = len(self._source.rows)
        for start in range(0, count, self._size):
            yield self._source.batch(np.arange(start, min(start + self._size, count)))
