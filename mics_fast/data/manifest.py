"""The manifest: a CSV with one row per sample and one column per modality.

Spreadsheets may open it: a cell that begins like a formula (``=``, ``+``, ``-``, ``@``) is written
with a leading apostrophe, which reading removes. Cells are stripped, so a trailing blank does not
make a new class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mics_fast.common.files import write_csv
from mics_fast.data.manifest_csv import RESERVED, chosen_modalities
from mics_fast.data.manifest_index import read_contents
from mics_fast.data.rows import SPLITS, Columns, Row, Rows

__all__ = [
    "RESERVED",
    "SPLITS",
    "Manifest",
    "Row",
    "Rows",
    "digest_difference",
    "read_manifest",
    "write_manifest",
]

_PART = 1 << 16  # rows of the CSV that are hashed at once


@dataclass(frozen=True)
class Manifest:
    """All samples.

    Args:
        path: of the CSV file.
        modalities: in the order of the columns.
        classes: sorted names.
        rows: in the order of the file.
    """

    path: Path
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    rows: Rows

    def select(self, split: str | None = None, labelled: bool | None = None) -> Rows:
        """Return the rows of a split, with or without a usable label; None selects any."""
        rows = self.rows
        if split is not None:
            rows = rows.where(rows.split == SPLITS.index(split))
        return rows if labelled is None else rows.where(rows.labelled == labelled)

    def digest(self) -> dict[str, str]:
        """Hash the fields that training depends on: one SHA-256 per field, and the row count.

        Two manifests with equal digests have the same ids, labels, groups and splits in the same
        order; paths of images and names of groups may differ. See ``digest_difference``.
        """
        return dict(self._digest)

    @cached_property
    def _digest(self) -> dict[str, str]:
        whole, index = self.rows.columns, self.rows.indices
        cuts = np.searchsorted(index, np.arange(_PART, len(whole.label), _PART))
        parts = [Rows(whole, own) for own in np.split(index, cuts) if len(own)]
        label = np.array([*self.classes, ""], object)  # label -1 indexes the last one
        labelled, split = np.array(["0", "1"], object), np.array(SPLITS, object)
        return {
            "rows": str(len(self.rows)),
            "id": _sha256(map(_ids, parts)),
            "label": _sha256(label[part.label].tolist() for part in parts),
            "labelled": _sha256(labelled[part.labelled.astype(int)].tolist() for part in parts),
            "group": _sha256(list(map(str, part.group.tolist())) for part in parts),
            "split": _sha256(split[part.split].tolist() for part in parts),
        }


def digest_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Describe the difference between two digests in words; "" if they are equal.

    Args:
        before, now: from ``Manifest.digest``.

    Examples:
        >>> digest_difference({"rows": "60", "id": "a"}, {"rows": "40", "id": "b"})
        '40 rows instead of 60'
        >>> digest_difference({"rows": "60", "split": "a"}, {"rows": "60", "split": "b"})
        'the column split differs'
    """
    if before["rows"] != now["rows"]:
        return f"{now['rows']} rows instead of {before['rows']}"
    changed = [name for name in now if before.get(name) != now[name]]
    if "id" in changed:
        return "other ids, or the same ids in another order"
    if len(changed) > 1:
        return f"the columns {', '.join(changed[:-1])} and {changed[-1]} differ"
    return f"the column {changed[0]} differs" if changed else ""


def read_manifest(
    path: Path, modalities: Sequence[str] | None = None, *, files_exist: bool = True
) -> Manifest:
    """Read and check a manifest.

    Args:
        path: of the CSV file; the paths in it are relative to its folder.
        modalities: columns to use; default: every column that is not reserved. A row with images
            in other modalities only is dropped.
        files_exist: refuse a row with a missing file; False: leave that to the loaders.

    Raises:
        InputError: names file and line; the file is missing, has no row, lacks a column, or has
            an invalid row.
    """
    path = Path(path)
    contents = read_contents(path, modalities, files_exist)
    chosen = chosen_modalities(path, contents.columns.files, modalities)
    files = {name: contents.columns.files[name] for name in chosen}
    return Manifest(
        path, chosen, contents.classes, _with_images(replace(contents.columns, files=files))
    )


def _with_images(columns: Columns) -> Rows:
    """Return the rows that have an image; their groups are numbered by first appearance."""
    absent = np.logical_and.reduce([texts.empty() for texts in columns.files.values()])
    index = np.flatnonzero(~absent)
    if absent.any():
        _, first, own = np.unique(columns.group[index], return_index=True, return_inverse=True)
        group = columns.group.copy()
        group[index] = np.argsort(np.argsort(first))[own]
        columns = replace(columns, group=group)
    return Rows(columns, index)


def write_manifest(
    path: Path, records: Sequence[Mapping[str, str]], modalities: Sequence[str]
) -> None:
    """Write a manifest atomically.

    Args:
        path: of the CSV file.
        records: for each row the reserved columns and one path per modality, "" where missing.
        modalities: names of the further columns.

    Raises:
        InputError: the file cannot be written.
    """
    write_csv(path, records, [*RESERVED, *modalities], exact=True)


def _ids(rows: Rows) -> list[str]:
    """Return the id of each row; the rows are in the order of the file."""
    first, last = int(rows.indices[0]), int(rows.indices[-1])
    ids = rows.columns.id.part(first, last + 1)
    return [ids[number] for number in (rows.indices - first).tolist()]


def _sha256(parts: Iterable[Sequence[str]]) -> str:
    """Hash a list of texts, given in parts; JSON keeps them apart whatever they contain."""
    whole, before = hashlib.sha256(b"["), ""
    for part in parts:
        whole.update((before + json.dumps(part)[1:-1]).encode())
        before = ", "
    whole.update(b"]")
    return whole.hexdigest()
