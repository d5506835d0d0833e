"""Checks of a training manifest: labels, groups and splits that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import SPLITS, Manifest


def check_manifest(manifest: Manifest) -> list[str]:
    """Check the rows of a manifest before training.

    Returns:
        A warning for each class without train, val or test rows and for each empty split.

    Raises:
        InputError: two labels differ only in case or blanks, or a group lies in several splits.
    """
    names = [*manifest.classes, ""]  # label -1 indexes the last one
    rows = manifest.rows
    return check_rows(
        str(manifest.path),
        [row.id for row in rows],
        [names[row.label] for row in rows],
        [str(row.group) for row in rows],
        [row.split for row in rows],
    )


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
    first: dict[str, int] = {}
    for row, group in enumerate(groups):
        other = first.setdefault(group, row) if group else row
        if splits[row] != splits[other]:
            raise InputError(
                f"{where}: {ids[other]!r} ({splits[other]}) and {ids[row]!r} ({splits[row]}) are "
                "of one group, wanted each group in one split"
            )
    rows = Counter(zip(splits, labels, strict=True))
    classes = sorted(set(labels) - {""})
    warnings = []
    for split in SPLITS:
        missing = [name for name in classes if not rows[split, name]]
        if split not in splits:
            warnings.append(f"no row is in the split {split}")
        elif missing:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            warnings.append(f"no {split} row of {shown}")
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
