"""The regression gate: ratios between implementations of one run, against those of another run.

Absolute times tell machines apart, and loads; how many times as long as ours a baseline takes in
the same run tells the code apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ALLOWED = 0.8
"""Share of its former ratio below which an operator has lost ground."""

Key = tuple[str, str, str, int, str]


def ratios(rows: Iterable[dict[str, Any]]) -> dict[Key, float]:
    """Ratio of each baseline, by subject, operator, shape, threads and implementation."""
    names = ("subject", "operator", "shape", "threads", "implementation")
    baselines = [row for row in rows if row.get("ratio") and not row["ours"]]
    return {tuple(row[name] for name in names): row["ratio"] for row in baselines}


def lost_ground(rows: Iterable[dict[str, Any]], base: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence for each ratio that fell by more than a fifth, and one where nothing compares."""
    now, before = ratios(rows), ratios(base)
    both = [key for key in now if key in before]
    if not both:
        return ["nothing was measured that the base holds too"]
    return [
        f"{key[1]} ({key[2]}, {key[3]} threads): {key[4]} takes {now[key]:.2f} times as long as "
        f"ours, and took {before[key]:.2f} times as long"
        for key in both
        if now[key] < ALLOWED * before[key]
    ]
