"""Bootstrap intervals: the variation of a metric over other samples of lesions.

Groups are resampled, not rows: frames of one lesion resemble each other, and intervals that treated
them as independent would be too narrow. If every row is its own group, this is the ordinary
bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypedDict

import torch
from torch import Tensor

from mics_fast.evaluation import RESAMPLES
from mics_fast.evaluation.opinions import Predictions

LEVEL = 0.95

Interval = list[float]
"""Lower and upper end."""

Statistics = Callable[[Predictions], dict[str, Tensor]]
"""Named statistics: scalars () or one value per class (C,)."""


class Difference(TypedDict):
    """Difference of a metric between two runs, and its interval."""

    difference: float
    interval: Interval


def resamples(group: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Draw as many groups as there are, with replacement, and yield their row numbers.

    Args:
        group: Group of each row, (N,) int64.
        count: Number of resamples.
        seed: The same seed and groups give the same resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    _, member, size = group.unique(return_inverse=True, return_counts=True)
    rows_of = member.argsort(stable=True).split(size.tolist())
    for _ in range(count):
        drawn = torch.randint(len(rows_of), (len(rows_of),), generator=generator)
        yield torch.cat([rows_of[number] for number in drawn.tolist()])


def bootstrap(
    predictions: Predictions, statistics: Statistics, *, count: int = RESAMPLES, seed: int = 0
) -> dict[str, Tensor]:
    """Compute percentile intervals of statistics: (2,) each, or (2, C) for one value per class.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    drawn = [
        statistics(predictions.take(rows)) for rows in resamples(predictions.group, count, seed)
    ]
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
        statistics: See ``bootstrap``; scalars only.
        count: Number of resamples.
        seed: As in ``resamples``.
    """

    def difference(one: Predictions, other: Predictions) -> dict[str, Tensor]:
        values, others = statistics(one), statistics(other)
        return {name: value - others[name] for name, value in values.items()}

    drawn = [
        difference(first.take(rows), second.take(rows))
        for rows in resamples(first.group, count, seed)
    ]
    intervals = percentile_intervals(drawn)
    return {
        name: {"difference": value.item(), "interval": intervals[name].tolist()}
        for name, value in difference(first, second).items()
    }


def percentile_intervals(drawn: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Take the middle 95 % of each statistic, ignoring resamples where it is undefined."""
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return {
        name: torch.stack([values[name].double() for values in drawn]).nanquantile(tails, dim=0)
        for name in drawn[0]
    }
