"""The manifest: a CSV with one row per sample and one column per modality.

Spreadsheets may open it: a cell that begins like a formula (``=``, ``+``, ``-``, ``@``) is written
with a leading apostrophe, which reading removes. Cells are stripped, so a trailing blank does not
make a new class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mics_fast.common.errors import InputError
from mics_fast.common.files import restored_cell, write_csv
from mics_fast.data.shards import image_exists
from mics_fast.data.tables import read_table

RESERVED = ("id", "label", "labelled", "group", "split", "virtual")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Row:
    """One sample.

    Args:
        index: 0-based row number in the manifest, used as sample id everywhere.
        id: unique text.
        label: index into ``Manifest.classes``; -1 for an empty cell.
        labelled: True if training may use the label.
        group: index of the group, the contrastive id; a row with an empty cell gets its own group.
        split: train, val or test.
        virtual: modalities that were derived from another one.
        files: modality -> absolute path of its image, None if missing.
    """

    index: int
    id: str
    label: int
    labelled: bool
    group: int
    split: str
    virtual: tuple[str, ...]
    files: dict[str, Path | None]


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
    rows: tuple[Row, ...]

    def select(self, split: str | None = None, labelled: bool | None = None) -> list[Row]:
        """Return the rows of a split, with or without a usable label; None selects any."""
        return [
            row
            for row in self.rows
            if split in (None, row.split) and labelled in (None, row.labelled)
        ]

    def digest(self) -> dict[str, str]:
        """Hash the fields that training depends on: one SHA-256 per field, and the row count.

        Two manifests with equal digests have the same ids, labels, groups and splits in the same
        order; paths of images and names of groups may differ. See ``digest_difference``.
        """
        names = [*self.classes, ""]  # label -1 indexes the last one
        fields = {
            "id": [row.id for row in self.rows],
            "label": [names[row.label] for row in self.rows],
            "labelled": [str(int(row.labelled)) for row in self.rows],
            "group": [str(row.group) for row in self.rows],
            "split": [row.split for row in self.rows],
        }
        hashes = {name: _sha256(values) for name, values in fields.items()}
        return {"rows": str(len(self.rows)), **hashes}


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
    folder = path.parent.absolute()
    table = read_table(path, f"manifest {path}")
    columns = tuple(map(restored_cell, table.columns))
    for column in RESERVED:
        if column not in columns:
            raise InputError(
                f"manifest {path} has no column {column}, wanted {', '.join(RESERVED)} and one for "
                f"each modality, {table.found}"
            )
    if len(set(columns)) < len(columns):
        raise InputError(f"manifest {path} has two columns of one name, wanted different names")
    records = [
        (line, {restored_cell(name): restored_cell(cell) for name, cell in record.items()})
        for line, record in table.lines
    ]
    available = tuple(name for name in columns if name not in RESERVED)
    chosen = available if modalities is None else tuple(modalities)
    for name in chosen:
        if name not in available:
            raise InputError(f"manifest {path} has no modality {name}, only {', '.join(available)}")
    if not chosen:
        raise InputError(f"manifest {path} has no modality: no column beside {', '.join(RESERVED)}")
    if not records:
        raise InputError(f"manifest {path} has no row")
    classes = tuple(sorted({record["label"] for _, record in records if record["label"]}))
    groups: dict[str, int] = {}
    seen: set[str] = set()
    rows = []
    for index, (line, record) in enumerate(records):
        where = f"manifest {path}, line {line}"
        _check(record, where, seen)
        if not any(record[name] for name in available):
            raise InputError(f"{where}: no image in any of {', '.join(available)}")
        if not any(record[name] for name in chosen):
            continue  # it has none of the requested modalities
        # A unique name that no group can have: rows with an empty cell must not share a group.
        group = record["group"] or f"\0{index}"
        rows.append(
            Row(
                index=index,
                id=record["id"],
                label=classes.index(record["label"]) if record["label"] else -1,
                labelled=record["labelled"] == "1",
                group=groups.setdefault(group, len(groups)),
                split=record["split"],
                virtual=tuple(record["virtual"].split()),
                files={
                    name: _file(record[name], folder, name, where, files_exist) for name in chosen
                },
            )
        )
    return Manifest(path, chosen, classes, tuple(rows))


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


def _check(record: Mapping[str, str], where: str, seen: set[str]) -> None:
    """Refuse a row with invalid reserved columns."""
    name = record["id"]
    if not name or name in seen:
        raise InputError(f"{where}: id {name!r} is {'used twice' if name else 'empty'}")
    seen.add(name)
    if record["split"] not in SPLITS:
        wanted = f"wanted one of {', '.join(SPLITS)}"
        raise InputError(f"{where}: split is {record['split']!r}, {wanted}")
    if record["labelled"] not in ("0", "1"):
        raise InputError(f"{where}: labelled is {record['labelled']!r}, wanted 0 or 1")
    if record["labelled"] == "1" and not record["label"]:
        raise InputError(f"{where}: labelled is 1, but the label is empty")


def _file(cell: str, folder: Path, modality: str, where: str, exists: bool) -> Path | None:
    """Return the path of an image, None for an empty cell."""
    if not cell:
        return None
    path = folder / cell
    if exists and not image_exists(path):
        raise InputError(f"{where}: the {modality} image {path} does not exist")
    return path


def _sha256(values: Sequence[str]) -> str:
    """Hash a list of texts; JSON keeps them apart whatever they contain."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
