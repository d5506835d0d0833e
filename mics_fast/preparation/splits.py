"""Splits: draw train, val and test rows, and the train rows that keep their label.

Every draw is a function of the seed alone: raw words of numpy's PCG64, the same on any machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mics_fast.data.manifest import SPLITS


def split_rows(
    labels: Sequence[str], groups: Sequence[str], fractions: Sequence[float], seed: int
) -> list[str]:
    """Assign whole groups to train, val and test, class by class.

    A group belongs to the class of its first row. Each group, in random order, goes to the split
    that is furthest behind its share of the class. Every split with a fraction above 0 gets a row
    of each class that has enough groups.

    Args:
        labels: class name of each row.
        groups: group name of each row; "" = a group of its own.
        fractions: of train, val and test; they sum to 1.
        seed: of the draw.

    Returns:
        "train", "val" or "test" for each row.
    """
    split = [""] * len(labels)
    for members in _shuffled_groups(labels, groups, seed, purpose=0).values():
        rows = sum(len(group) for group in members)
        counts = np.zeros(3)
        for group in members:
            # Empty splits first, test before val, so that a class with few groups is still tested.
            empty = [k for k in (0, 2, 1) if counts[k] == 0 and fractions[k] > 0]
            behind = np.array(fractions) * rows - counts
            chosen = empty[0] if empty else int(np.argmax(behind))
            counts[chosen] += len(group)
            for row in group:
                split[row] = SPLITS[chosen]
    return split


def fold_rows(labels: Sequence[str], groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """Assign whole groups to folds of equal shares, class by class.

    Args:
        labels: class name of each row.
        groups: as ``split_rows``.
        folds: number of folds.
        seed: of the draw.

    Returns:
        The fold of each row, 0 to folds - 1.
    """
    fold = [0] * len(labels)
    shuffled = _shuffled_groups(labels, groups, seed, purpose=2)
    for number, members in enumerate(shuffled.values()):
        # Classes start at different folds, so that the first fold does not get every odd row.
        order = np.roll(np.arange(folds), -number)
        counts = np.zeros(folds)
        for group in members:
            chosen = int(order[np.argmin(counts[order])])
            counts[chosen] += len(group)
            for row in group:
                fold[row] = chosen
    return fold


def split_fold(
    labels: Sequence[str],
    groups: Sequence[str],
    fold: Sequence[int],
    tested: int,
    val_share: float,
    seed: int,
) -> list[str]:
    """Split the rows for one round of cross-validation: one test fold, a val share of the rest.

    Args:
        labels: class name of each row.
        groups: as ``split_rows``.
        fold: of each row, from ``fold_rows``.
        tested: index of the test fold.
        val_share: share of the other rows, in [0, 1).
        seed: of the draw of val rows.
    """
    split = ["test"] * len(labels)
    rest = [row for row, own in enumerate(fold) if own != tested]
    shares = (1 - val_share, val_share, 0.0)
    others = split_rows([labels[r] for r in rest], [groups[r] for r in rest], shares, seed)
    for row, own in zip(rest, others, strict=True):
        split[row] = own
    return split


def label_rows(
    labels: Sequence[str],
    groups: Sequence[str],
    fraction: float,
    seed: int,
    *,
    count: int | None = None,
) -> list[bool]:
    """Choose whole groups of train rows that keep their label.

    Args:
        labels: class name of each train row; "" = unknown, never labelled.
        groups: as ``split_rows``.
        fraction: of the rows of each class; max(1, round(fraction * n)) rows, rounded up to whole
            groups.
        seed: of the draw.
        count: rows of each class to label, instead of a fraction.

    Returns:
        True for each row whose label training may use.
    """
    labelled = [False] * len(labels)
    for label, members in _shuffled_groups(labels, groups, seed, purpose=1).items():
        share = max(1, round(fraction * sum(len(group) for group in members)))
        wanted = (count or share) if label else 0
        for group in members:
            if wanted <= 0:
                break
            wanted -= len(group)
            for row in group:
                labelled[row] = bool(labels[row])
    return labelled


def _shuffled_groups(
    labels: Sequence[str], groups: Sequence[str], seed: int, purpose: int
) -> dict[str, list[list[int]]]:
    """Map each class, in sorted order, to its shuffled groups (lists of row numbers)."""
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[f"group {group}" if group else f"row {row}"].append(row)
    by_class: dict[str, list[list[int]]] = defaultdict(list)
    for rows in members.values():
        by_class[labels[rows[0]]].append(rows)
    generator = np.random.PCG64([seed, purpose])
    shuffled = {}
    for label in sorted(by_class):
        order = np.argsort(generator.random_raw(len(by_class[label])), kind="stable")
        shuffled[label] = [by_class[label][k] for k in order]
    return shuffled
