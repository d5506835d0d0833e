"""Near-duplicates: frames that look alike, and must not lie on two sides of a split.

The perceptual hash of a frame is the signs of its low spatial frequencies: the 16 x 16 lowest
coefficients of the discrete cosine transform of its 64 x 64 grey version, without the mean, each
compared with their median. Copies that differ in size, JPEG quality or brightness differ in a few
of the 255 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_DISTANCE = 32
"""Bits in which near-duplicates differ at most. Of 877 Kvasir-SEG frames, no two that are listed as
unrelated differ in fewer than 42; a copy differs in up to 8 at JPEG quality 40, 12 at half size, 22
a fifth brighter, 34 (99 % of the frames) shifted by 1 % of its width and height."""

_SIDE, _FREQUENCIES = 64, 16
_COSINES = np.cos(np.pi / _SIDE * np.arange(_FREQUENCIES)[:, None] * (np.arange(_SIDE)[None] + 0.5))
_BLOCK = 4096  # rows compared at a time


@dataclass(frozen=True)
class NearDuplicate:
    """Two rows whose images look alike.

    Args:
        first, second: row numbers, the smaller one first.
        modality: of the images.
        distance: bits that differ.
    """

    first: int
    second: int
    modality: str
    distance: int


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """(255,) bool of an (H, W, 3) uint8 image."""
    grey = Image.fromarray(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    frequencies = (_COSINES @ np.asarray(grey, np.float64) @ _COSINES.T).ravel()[1:]
    return frequencies > np.median(frequencies)


def near_duplicates(hashes: Sequence[Mapping[str, np.ndarray]]) -> list[NearDuplicate]:
    """All pairs of rows that look alike in a modality, the closest first.

    Args:
        hashes: for each row, modality -> perceptual hash.
    """
    found = []
    for modality in sorted({name for row in hashes for name in row}):
        rows = [number for number, row in enumerate(hashes) if modality in row]
        bits = np.array([hashes[number][modality] for number in rows], np.float32) * 2 - 1
        for i, j, distance in _close(bits):
            found.append(NearDuplicate(rows[i], rows[j], modality, distance))
    return sorted(found, key=lambda pair: (pair.distance, pair.first, pair.second))


def _close(bits: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(i, j, distance) of rows i < j of a (N, 255) array of -1 and 1, a block at a time."""
    count, length = bits.shape
    for top in range(0, count, _BLOCK):
        for left in range(top, count, _BLOCK):
            distances = (length - bits[top : top + _BLOCK] @ bits[left : left + _BLOCK].T) / 2
            for i, j in np.argwhere(distances <= MAX_DISTANCE):
                if top + i < left + j:
                    yield int(top + i), int(left + j), int(distances[i, j])


def group_together(
    groups: Sequence[str], ids: Sequence[str], pairs: Sequence[NearDuplicate]
) -> list[str]:
    """Group names after the groups of near-duplicates have been united.

    Args:
        groups: name of each row's group, "" = a group of its own.
        ids: of the rows; the first of a united group names it.
        pairs: what belongs together.
    """
    leader = list(range(len(groups)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    def unite(a: int, b: int) -> None:
        low, high = sorted((find(a), find(b)))
        leader[high] = low

    first_of: dict[str, int] = {}
    for row, group in enumerate(groups):
        if group:
            unite(first_of.setdefault(group, row), row)
    for pair in pairs:
        unite(pair.first, pair.second)
    united = {find(row) for pair in pairs for row in (pair.first, pair.second)}
    return [
        f"like {ids[find(row)]}" if find(row) in united else group
        for row, group in enumerate(groups)
    ]
