"""Class-balanced sampling: every class equally often, whatever its number of rows.

The stream is cut into blocks with one sample of each of the C classes, in an order drawn per block.
So the b-th block holds the b-th sample of every class, and a class goes through its rows once per
pass, in an order drawn per pass. Like the plain order (``augmentation.py``), it is a function of
(seed, sample number), independent of workers, ranks and resume points.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mics_fast.data.augmentation import CLASS_ORDER, CLASS_ROWS, draw_order

_order = lru_cache(maxsize=1024)(draw_order)  # enough for the blocks and passes of a few batches


class BalancedOrder:
    """Maps sample numbers of the stream to rows.

    Args:
        seed: of the run.
        labels: class of each row, as in the manifest; classes without rows are skipped.
    """

    def __init__(self, seed: int, labels: Sequence[int]) -> None:
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
