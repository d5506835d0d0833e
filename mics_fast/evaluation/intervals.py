"""Bootstrap: how much a metric would vary had other lesions been looked at.

Groups are drawn, not rows: frames of one lesion resemble each other, and intervals that took them
for independent would be too narrow. Where every row is a group of its own, this is the ordinary
bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mics_fast.evaluation.opinions import View

LEVEL = 0.95
RESAMPLES = 1000

Statistics = Callable[[View], dict[str, float]]


def resamples(group: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of each resample: as many groups as there are, drawn with replacement.

    Args:
        group: (N,) int64, the group of each row.
        count: number of resamples.
        seed: the same seed and groups give the same resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    _, member, size = group.unique(return_inverse=True, return_counts=True)
    rows_of = member.argsort(stable=True).split(size.tolist())
    for _ in range(count):
        drawn = torch.randint(len(rows_of), (len(rows_of),), generator=generator)
        yield torch.cat([rows_of[number] for number in drawn.tolist()])


def bootstrap(
    view: View, statistics: Statistics, *, count: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float]]:
    """Percentile intervals [low, high] of every statistic of a view.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    drawn = [statistics(view.take(rows)) for rows in resamples(view.group, count, seed)]
    return percentile_intervals(drawn)


def extreme_interval(value: float, group: Tensor) -> list[float]:
    """The exact interval of a share of 0 or 1, which every resample repeats.

    Args:
        value: 0.0 or 1.0.
        group: (n,) the groups of the rows counted, n >= 1; each group counts once.

    Source: Clopper and Pearson, Biometrika 1934, at its ends.
    """
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / len(group.unique()))
    return [0.0, reach] if value == 0 else [1 - reach, 1.0]


def paired_bootstrap(
    view: View, other: View, statistics: Statistics, *, count: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Differences view - other on the same rows, with intervals from the same resamples.

    Args:
        view, other: the same rows in the same order.
        statistics: see ``bootstrap``.

    Returns:
        For each statistic its "difference" and the "interval" of that.
    """

    def difference(first: View, second: View) -> dict[str, float]:
        values, others = statistics(first), statistics(second)
        return {name: value - others[name] for name, value in values.items()}

    drawn = [
        difference(view.take(rows), other.take(rows)) for rows in resamples(view.group, count, seed)
    ]
    intervals = percentile_intervals(drawn)
    return {
        name: {"difference": value, "interval": intervals[name]}
        for name, value in difference(view, other).items()
    }


def percentile_intervals(drawn: list[dict[str, float]]) -> dict[str, list[float]]:
    """The middle 95 % of each statistic; resamples in which it is not defined are left out."""
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return {
        name: torch.tensor([values[name] for values in drawn], dtype=torch.float64)
        .nanquantile(tails)
        .tolist()
        for name in drawn[0]
    }
