"""The regression gate: the ratios of one run against those of another.

Absolute times depend on the machine and its load. How many times as long as ours a rival takes in
the same run depends on the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.rows import Row

ALLOWED = 0.8
"""Share of its former ratio below which an operator has lost ground."""


class Key(NamedTuple):
    """The columns that identify a ratio."""

    subject: str
    operator: str
    shape: str
    threads: int
    implementation: str


def ratios(rows: Iterable[Row]) -> dict[Key, float]:
    """The ratio of each rival."""
    found = {}
    for row in rows:
        ratio = row.get("ratio")
        if ratio and not row["ours"]:
            key = Key(
                row["subject"], row["operator"], row["shape"], row["threads"], row["implementation"]
            )
            found[key] = ratio
    return found


def lost_ground(rows: Iterable[Row], base: Iterable[Row]) -> list[str]:
    """One sentence per ratio that fell by more than a fifth, or one if nothing can be compared."""
    now, before = ratios(rows), ratios(base)
    both = [key for key in now if key in before]
    if not both:
        return ["nothing was measured that the base holds too"]
    return [
        f"{key.operator} ({key.shape}, {key.threads} threads): {key.implementation} takes "
        f"{now[key]:.2f} times as long as ours, and took {before[key]:.2f} times as long"
        for key in both
        if now[key] < ALLOWED * before[key]
    ]
