"""The regression gate: compares the ratios of two runs.

Absolute times depend on the machine and its load. The ratio of a rival's time to ours in the same
run depends on the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.rows import Row

ALLOWED = 0.8
"""Share of its former ratio below which an operator counts as slower."""


class Key(NamedTuple):
    """The columns that identify a ratio."""

    subject: str
    operator: str
    shape: str
    threads: int
    implementation: str


def ratios(rows: Iterable[Row]) -> dict[Key, float]:
    """Return the ratio of each rival."""
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
    """Return one sentence per ratio that fell by over a fifth, or one if none is comparable."""
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
