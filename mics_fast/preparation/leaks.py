"""Near-duplicates: frames that look alike, which must not lie in different splits.

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
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Hashes = Sequence[Mapping[str, np.ndarray]]
"""One mapping per row: modality -> perceptual hash."""

MAX_DISTANCE = 32
"""Largest distance, in bits, of near-duplicates. Among 877 Kvasir-SEG frames, no two that are
listed as unrelated differ in fewer than 42. A copy differs in up to 8 at JPEG quality 40, 12 at
half size, 22 a fifth brighter, 34 (99 % of the frames) shifted by 1 % of its width and height."""

_SIDE, _FREQUENCIES = 64, 16
_COSINES = np.cos(np.pi / _SIDE * np.arange(_FREQUENCIES)[:, None] * (np.arange(_SIDE)[None] + 0.5))
_BLOCK = 2048  # rows compared at once
_MOST = 1000  # pairs listed


@dataclass(frozen=True)
class NearDuplicate:
    """Two rows whose images look alike.

    Args:
        first, second: row numbers, the smaller one first.
        modality: of the images.
        distance: number of different bits.
    """

    first: int
    second: int
    modality: str
    distance: int


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Return the hash, (255,) bool, of an (H, W, 3) uint8 image."""
    grey = Image.fromarray(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    frequencies = (_COSINES @ np.asarray(grey, np.float64) @ _COSINES.T).ravel()[1:]
    return frequencies > np.median(frequencies)


def near_duplicates(hashes: Hashes, splits: Sequence[str]) -> tuple[list[NearDuplicate], int]:
    """Find pairs of rows in different splits that look alike in a modality.

    Frames of one video may all look alike, so pairs are counted block by block and only the
    closest ``_MOST`` are kept.

    Args:
        hashes: of each row.
        splits: of each row.

    Returns:
        The closest pairs, closest first, and the total number of pairs.
    """
    codes = np.unique(np.asarray(splits, str), return_inverse=True)[1]
    kept, count = np.empty((0, 4), np.int64), 0  # distance, first, second, index of the modality
    modalities = _modalities(hashes)
    for number, modality in enumerate(modalities):
        for first, second, distance in _close(hashes, modality):
            apart = codes[first] != codes[second]
            if len(kept) == _MOST:
                count += int((apart & (distance >= kept[-1, 0])).sum())
                apart &= distance < kept[-1, 0]
            count += int(apart.sum())
            columns = (distance, first, second, np.full(len(first), number))
            found = np.stack([column[apart] for column in columns], axis=1)
            every = np.concatenate([kept, found])
            kept = every[np.lexsort(every.T[2::-1])][:_MOST]
    return [
        NearDuplicate(int(first), int(second), modalities[number], int(distance))
        for distance, first, second, number in kept
    ], count


def group_together(groups: Sequence[str], ids: Sequence[str], hashes: Hashes) -> list[str]:
    """Merge groups whose rows look alike, directly or through a chain of other rows.

    Args:
        groups: name of each row's group, "" = a group of its own.
        ids: of the rows; a merged group is named after its first row.
        hashes: of each row.
    """
    count = len(groups)
    named = np.unique(np.asarray(groups, str), return_index=True, return_inverse=True)
    component = np.where(np.asarray(groups, str) == "", np.arange(count), named[1][named[2]])
    alike = np.zeros(count, bool)
    for modality in _modalities(hashes):
        for first, second, _ in _close(hashes, modality):
            alike[first] = alike[second] = True
            a, b = component[first], component[second]
            if (new := a != b).any():
                edges = coo_matrix((np.ones(new.sum()), (a[new], b[new])), (count, count))
                component = connected_components(edges, directed=False)[1][component]
    _, leader, of = np.unique(component, return_index=True, return_inverse=True)
    united = np.zeros(len(leader), bool)
    united[of[alike]] = True
    return [
        f"like {ids[leader[of[row]]]}" if united[of[row]] else group
        for row, group in enumerate(groups)
    ]


def _modalities(hashes: Hashes) -> list[str]:
    return sorted({name for row in hashes for name in row})


def _close(hashes: Hashes, modality: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield first row, second row and distance of similar pairs, block by block."""
    rows = np.array([number for number, row in enumerate(hashes) if modality in row])
    bits = np.array([hashes[number][modality] for number in rows], np.float32) * 2 - 1
    count, length = bits.shape
    for top in range(0, count, _BLOCK):
        for left in range(top, count, _BLOCK):
            agree = bits[top : top + _BLOCK] @ bits[left : left + _BLOCK].T  # equal - different
            close = agree >= length - 2 * MAX_DISTANCE
            first, second = np.nonzero(np.triu(close, 1) if left == top else close)
            distance = (length - agree[first, second]) / 2
            yield rows[top + first], rows[left + second], distance.astype(np.int64)
