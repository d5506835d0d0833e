"""The order of rows in the training stream: shuffled per epoch, or class-balanced.

A balanced stream draws every class equally often, whatever its number of rows. It is cut into
blocks with one sample of each of the C classes, in an order drawn per block. So the b-th block
holds the b-th sample of every class, and a class goes through its rows once per pass, in an order
drawn per pass. Either order is a function of (seed, sample number), independent of workers, ranks
and resume points.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from mics_fast.data.augmentation import CLASS_ORDER, CLASS_ROWS, draw_order, epoch_order
from mics_fast.data.rows import Row, labels_of
from mics_fast.data.shards import shard_of, shard_order

_order = lru_cache(maxsize=1024)(draw_order)  # enough for the blocks and passes of a few batches


class BalancedOrder:
    """Maps sample numbers of the stream to rows.

    Args:
        seed: of the run.
        labels: class of each row, as in the manifest; classes without rows are skipped.
    """

    def __init__(self, seed: int, labels: Sequence[int] | np.ndarray) -> None:
        self._seed = seed
        found = np.asarray(labels)
        self._rows = [np.flatnonzero(found == label) for label in np.unique(found)]

    def row(self, number: int) -> tuple[int, int]:
        """Return the position of a sample's row, and the number of its earlier draws."""
        block, place = divmod(number, len(self._rows))
        turn = int(_order(self._seed, CLASS_ORDER, block, 0, len(self._rows))[place])
        own = self._rows[turn]
        before, place = divmod(block, len(own))
        return int(own[_order(self._seed, CLASS_ROWS, before, turn, len(own))[place]]), before


class RowOrder:
    """The row of each sample of the stream, and the number of its earlier draws.

    Args:
        rows: at least one.
        seed: of the run.
        balanced: every class equally often; the rows are labelled then.
    """

    def __init__(self, rows: Sequence[Row], seed: int, *, balanced: bool = False) -> None:
        self._seed, self._count = seed, len(rows)
        self._shards = shards_of(rows)
        self._orders: dict[int, np.ndarray] = {}
        self._balanced = BalancedOrder(seed, labels_of(rows)) if balanced else None

    def place(self, number: int, later: int = 0) -> tuple[int, int]:
        """Return the position of a sample's row, or of one ``later`` in its epoch, and the number
        of earlier draws of that row."""
        if self._balanced is not None:
            return self._balanced.row(number + later)
        epoch, place = divmod(number, self._count)
        return int(self._order(epoch)[(place + later) % self._count]), epoch

    def places(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the same as ``place`` for several samples, at once: two arrays of int64."""
        if self._balanced is not None:
            found = np.array([self._balanced.row(number) for number in numbers], np.int64)
            return found[:, 0], found[:, 1]
        epochs, rows = np.divmod(np.asarray(numbers, np.int64), self._count)
        for epoch in range(epochs.min(), epochs.max() + 1):
            own = epochs == epoch
            rows[own] = self._order(epoch)[rows[own]]
        return rows, epochs

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of the rows in an epoch, (R,); the last epoch's is kept, too."""
        if epoch not in self._orders:
            self._orders = {own: o for own, o in self._orders.items() if own == epoch - 1}
            self._orders[epoch] = (
                shard_order(self._seed, epoch, self._shards)
                if self._shards is not None
                else epoch_order(self._seed, epoch, self._count)
            )
        return self._orders[epoch]


def samples_of(step: int, batch_size: int, share: int, rank: int, parts: int) -> list[int]:
    """Return the stream numbers of a rank's samples in a step.

    Args:
        step: number of the batch.
        batch_size: samples of all ranks.
        share: samples of one rank.
        rank: of the process.
        parts: equal parts of a batch, of each of which a rank takes its slice.
    """
    part, own = batch_size // parts, share // parts
    first = step * batch_size + rank * own
    starts = range(first, first + batch_size, part)
    return [start + number for start in starts for number in range(own)]


def shards_of(rows: Sequence[Row]) -> np.ndarray | None:
    """Return the shard of each row, (R,) int64, numbered in the order of their paths; None unless
    every row lies in a shard."""
    found, numbers = np.empty(len(rows), np.int64), dict[Path, int]()
    for place, row in enumerate(rows):
        shards = {shard_of(path) for path in row.files.values() if path is not None}
        shard = shards.pop() if len(shards) == 1 else None
        if shard is None:
            return None
        found[place] = numbers.setdefault(shard, len(numbers))
    order = [numbers[shard] for shard in sorted(numbers)]
    return np.argsort(order)[found]
