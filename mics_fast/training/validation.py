"""Scores of a stage during training; the ranks share the rows that are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from mics_fast.common.errors import NoUsableImage
from mics_fast.data.loaders import PairBatch
from mics_fast.engine.distributed import from_each

T = TypeVar("T")
Collect = Callable[[Iterable[PairBatch]], T]


def over_ranks(
    rows: int, batches: Iterable[PairBatch] | None, collect: Collect[T], *, shared: bool
) -> list[T]:
    """Collect results of rows, each rank from the batches of its own rows.

    Args:
        rows: number of rows of all ranks together.
        batches: of this rank's rows; None if it has none.
        collect: makes a result of at least one batch; it travels between processes, on the CPU.
        shared: False if every rank has all rows, as a sharded network needs: each part of it is
            asked for by all ranks at the same time.

    Returns:
        At least one result, in the order of the rows, equal on all ranks.

    Raises:
        NoUsableImage: no row of any rank has an image that can be used.
    """

    def own() -> T | None:
        try:
            return None if batches is None else collect(batches)
        except NoUsableImage:
            return None

    found = [part for part in (from_each(own) if shared else [own()]) if part is not None]
    if not found:
        raise NoUsableImage(f"none of {rows} rows has an image that can be used")
    return found
