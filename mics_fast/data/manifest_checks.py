"""Checks of a training manifest: labels, groups and splits that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import SPLITS, Manifest


def check_manifest(manifest: Manifest) -> list[str]:
    """Check the rows of a manifest before training.

    Returns:
        A warning for each class without train, val or test rows and for each empty split.

    Raises:
        InputError: two labels differ only in case or blanks, or a group lies in several splits.
    """
    rows, where = manifest.rows, str(manifest.path)
    check_labels(where, manifest.classes)
    pair = _divided(rows.group, rows.split)
    if pair:
        raise InputError(_of_one_group(where, *((rows[k].id, rows[k].split) for k in pair)))
    return _warnings(where, manifest.classes, rows.label, rows.split)


def check_rows(
    where: str,
    ids: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[str],
    splits: Sequence[str],
) -> list[str]:
    """Check columns as ``check_manifest`` does.

    Args:
        where: their source, for messages.
        ids, labels, groups, splits: one per row; "" is an unknown label, or a group of its own.
    """
    check_labels(where, labels)
    numbers: dict[str, int] = {}
    group = [numbers.setdefault(own or f"\0{row}", len(numbers)) for row, own in enumerate(groups)]
    split = np.array([SPLITS.index(own) for own in splits], np.int8)
    pair = _divided(np.array(group, np.int64), split)
    if pair:
        raise InputError(_of_one_group(where, *((ids[k], splits[k]) for k in pair)))
    classes = sorted(set(labels) - {""})
    number_of = {name: number for number, name in enumerate(classes)} | {"": -1}
    return _warnings(where, classes, np.array([number_of[own] for own in labels]), split)


def _divided(group: np.ndarray, split: np.ndarray) -> tuple[int, int] | None:
    """Find the first row whose group began in another split, and the row it began with.

    Args:
        group: numbered from 0 in the order of first appearance, (R,).
        split: (R,).
    """
    if not len(group):
        return None
    first = np.empty(int(group.max()) + 1, np.int64)
    first[group[::-1]] = np.arange(len(group))[::-1]  # the last value given to a group stays
    moved = split != split[first[group]]
    row = int(moved.argmax())
    return (int(first[group[row]]), row) if moved[row] else None


def _of_one_group(where: str, first: tuple[str, str], second: tuple[str, str]) -> str:
    """Describe two rows, each an id and a split, of a group that lies in several splits."""
    (one, here), (other, there) = first, second
    return (
        f"{where}: {one!r} ({here}) and {other!r} ({there}) are of one group, wanted each group in "
        "one split"
    )


def _warnings(
    where: str, classes: Sequence[str], label: np.ndarray, split: np.ndarray
) -> list[str]:
    """Warn about empty splits, and about classes without rows in one.

    Args:
        where: source of the rows.
        classes: sorted names.
        label: index into the classes, or -1, (R,).
        split: index into ``SPLITS``, (R,).
    """
    warnings = []
    for number, split_name in enumerate(SPLITS):
        labels = label[split == number]
        there = np.bincount(labels[labels >= 0], minlength=len(classes))
        missing = [name for name, count in zip(classes, there, strict=True) if not count]
        if not len(labels):
            warnings.append(f"no row is in the split {split_name}")
        elif missing:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            warnings.append(f"no {split_name} row of {shown}")
    return [f"{where}: {warning}" for warning in warnings]


def check_labels(where: str, labels: Sequence[str]) -> None:
    """Refuse labels that differ only in case or blanks, such as "polyp" and "Polyp".

    Raises:
        InputError: names two such labels.
    """
    seen: dict[str, str] = {}
    for label in sorted(set(labels)):
        other = seen.setdefault("".join(label.split()).casefold(), label)
        if other != label:
            raise InputError(
                f"{where}: labels {other!r} and {label!r} differ only in case or blanks, wanted "
                "one spelling per class"
            )
