"""Bootstrap intervals: the variation of a metric over other samples of lesions.

Groups are resampled, not rows: frames of one lesion resemble each other, and intervals that treated
them as independent would be too narrow. If every row is its own group, this is the ordinary
bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from mics_fast.evaluation import RESAMPLES
from mics_fast.evaluation.counted import each_once
from mics_fast.evaluation.opinions import Predictions

LEVEL = 0.95

Interval = list[float]
"""Lower and upper end."""

Statistics = Callable[[Predictions, Tensor], dict[str, Tensor]]
"""Named statistics of N rows and R resamples of them, given as counts (R, N) float64 (see
``counted``): one value per resample (R,), or one per class (R, C)."""

_CELLS = 2**16  # counts in memory at a time: 512 KiB, which fit a cache


class Difference(TypedDict):
    """Difference of a metric between two runs, and its interval."""

    difference: float
    interval: Interval


def resamples(group: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Draw as many groups as there are, with replacement, and count how often each row is drawn.

    Args:
        group: Group of each row, (N,) int64.
        count: Number of resamples.
        seed: The same seed and groups give the same resamples.

    Yields:
        Counts of some of the resamples, (R, N) float64; ``count`` rows in all.
    """
    generator = torch.Generator().manual_seed(seed)
    names, member = group.unique(return_inverse=True)
    for part in torch.arange(count).split(max(1, _CELLS // len(group))):
        drawn = torch.randint(len(names), (len(part), len(names)), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)
        yield times.scatter_add_(1, drawn, torch.ones_like(times))[:, member]


def bootstrap(
    predictions: Predictions, statistics: Statistics, *, count: int = RESAMPLES, seed: int = 0
) -> dict[str, Tensor]:
    """Compute percentile intervals of statistics: (2,) each, or (2, C) for one value per class.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    drawn = [statistics(predictions, own) for own in resamples(predictions.group, count, seed)]
    return percentile_intervals(drawn)


def extreme_interval(value: float, group: Tensor) -> Interval:
    """Compute the exact interval of a share of 0 or 1, for which bootstrap intervals collapse.

    Args:
        value: 0.0 or 1.0.
        group: Groups of the rows counted, (n,), n >= 1; each group counts once.

    Source: Clopper and Pearson, Biometrika 1934, at its ends.
    """
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / len(group.unique()))
    return [0.0, reach] if value == 0 else [1 - reach, 1.0]


def paired_bootstrap(
    first: Predictions,
    second: Predictions,
    statistics: Statistics,
    *,
    count: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare two runs: first - second per scalar statistic, with paired bootstrap intervals.

    Args:
        first, second: Predictions for the same rows in the same order.
        statistics: One value per resample each.
        count: Number of resamples.
        seed: As in ``resamples``.
    """

    def differences(counts: Tensor) -> dict[str, Tensor]:
        values, others = statistics(first, counts), statistics(second, counts)
        return {name: value - others[name] for name, value in values.items()}

    drawn = [differences(own) for own in resamples(first.group, count, seed)]
    intervals = percentile_intervals(drawn)
    return {
        name: {"difference": value.item(), "interval": intervals[name].tolist()}
        for name, value in differences(each_once(first)).items()
    }


def percentile_intervals(drawn: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Take the middle 95 % of each statistic, ignoring resamples where it is undefined."""
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return {
        name: torch.cat([values[name] for values in drawn]).nanquantile(tails, dim=0)
        for name in drawn[0]
    }
