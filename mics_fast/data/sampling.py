"""Class-balanced sampling: every class equally often, whatever its number of rows.

The stream is cut into blocks of one sample of each of the C classes, in an order drawn for each
block. The b-th block so holds the b-th sample of every class, and a class goes through its rows,
each once, in an order drawn for each pass. Like the plain order (``augment.py``), all of it is a
function of (seed, number of the sample): of no worker, rank or resume point.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mics_fast.data.augmentation import CLASS_ORDER, CLASS_ROWS, draw_order

_order = lru_cache(maxsize=1024)(draw_order)  # of the blocks and passes that a few batches touch


class BalancedOrder:
    """Which row each sample of the stream is.

    Args:
        seed: of the run.
        labels: class of each row, as large as the manifest's; classes without a row are left out.
    """

    def __init__(self, seed: int, labels: Sequence[int]) -> None:
        self._seed = seed
        found = np.asarray(labels)
        self._rows = [np.flatnonzero(found == label) for label in np.unique(found)]

    def row(self, number: int) -> tuple[int, int]:
        """Position of the row of a sample, and how often that row has come before."""
        block, place = divmod(number, len(self._rows))
        turn = int(_order(self._seed, CLASS_ORDER, block, 0, len(self._rows))[place])
        own = self._rows[turn]
        before, place = divmod(block, len(own))
        return int(own[_order(self._seed, CLASS_ROWS, before, turn, len(own))[place]]), before
