"""The columns of a manifest, read from its CSV.

Rows are read and checked many at a time. If one breaks a rule, the CSV is read again row by row,
to name the first such line and what is wrong with it.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from mics_fast.common.errors import InputError
from mics_fast.common.files import restored_cell
from mics_fast.data.file_lookup import FileLookup, file_exists
from mics_fast.data.rows import SPLITS, Columns, Texts
from mics_fast.data.tables import RefusedTable, Table, open_table

RESERVED = ("id", "label", "labelled", "group", "split", "virtual")
_LARGEST = 1 << 34  # bytes of a CSV
_PART = 1 << 16  # rows that are worked on at once, after reading
_LABELLED = {"0": False, "1": True}
_SPLITS = {name: number for number, name in enumerate(SPLITS)}


@dataclass(frozen=True)
class Contents:
    """A manifest with all of its rows and modalities.

    Args:
        classes: sorted names.
        columns: of all rows.
        found: modalities whose files have been seen to exist.
    """

    classes: tuple[str, ...]
    columns: Columns
    found: frozenset[str]


def chosen_modalities(
    path: Path, available: Collection[str], modalities: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the modalities to use, by default all that are available.

    Raises:
        InputError: there is none, or one is not available.
    """
    chosen = tuple(available if modalities is None else modalities)
    for name in chosen:
        if name not in available:
            raise InputError(f"manifest {path} has no modality {name}, only {', '.join(available)}")
    if not chosen:
        raise InputError(f"manifest {path} has no modality: no column beside {', '.join(RESERVED)}")
    return chosen


def read_csv(path: Path, modalities: Sequence[str] | None, files_exist: bool) -> Contents:
    """Read and check a manifest.

    Args:
        path, modalities, files_exist: as ``read_manifest``.

    Raises:
        InputError: as ``read_manifest``.
    """
    what = f"manifest {path}"
    with open_table(path, what, _LARGEST) as table:
        names = _checked_names(table, what)
        chosen = chosen_modalities(path, _modalities_of(names), modalities)
        try:
            classes, columns = _read(table, names, path.parent.absolute())
        except RefusedTable:
            raise _first_problem(path, chosen if files_exist else ()) from None
    if not len(columns.label):
        raise InputError(f"{what} has no row")
    contents = Contents(classes, columns, frozenset())
    return with_files(contents, path, chosen) if files_exist else contents


def with_files(contents: Contents, path: Path, modalities: Sequence[str]) -> Contents:
    """Look for the files of some modalities, except those that have been found before.

    Raises:
        InputError: one does not exist.
    """
    looked_for = [name for name in modalities if name not in contents.found]
    files, count = contents.columns.files, len(contents.columns.label)
    lookup = FileLookup(str(contents.columns.folder), count * len(looked_for))
    for start, name in itertools.product(range(0, count, _PART), looked_for):
        if not lookup.all_exist(list(filter(None, files[name].part(start, start + _PART)))):
            raise _first_problem(path, looked_for)
    return Contents(contents.classes, contents.columns, contents.found.union(looked_for))


def _modalities_of(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in RESERVED]


def _checked_names(table: Table[list[str]], what: str) -> tuple[str, ...]:
    """Return the names of the columns.

    Raises:
        InputError: a reserved one is missing, or two are equal.
    """
    names = tuple(map(restored_cell, table.columns))
    for name in RESERVED:
        if name not in names:
            raise InputError(
                f"{what} has no column {name}, wanted {', '.join(RESERVED)} and one for each "
                f"modality, {table.found}"
            )
    if len(set(names)) < len(names):
        raise InputError(f"{what} has two columns of one name, wanted different names")
    return names


# Many rows at a time


class _Texts:
    """A column of texts that grows."""

    def __init__(self) -> None:
        self.text, self.lengths = bytearray(), array("i")

    def extend(self, cells: Sequence[str]) -> None:
        text = "".join(cells)
        self.text += text.encode()
        self.lengths.extend(map(len, cells if text.isascii() else map(str.encode, cells)))

    def done(self) -> Texts:
        bounds = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(np.frombuffer(self.lengths, np.int32), out=bounds[1:])
        return Texts(np.frombuffer(self.text, np.uint8), bounds)


class _Names(_Texts):
    """A column of texts that are compared with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.hashes = array("q")

    def extend(self, cells: Sequence[str]) -> None:
        super().extend(cells)
        self.hashes.extend(map(hash, cells))

    def first_rows(self, texts: Texts) -> np.ndarray:
        """Return for each text the first row that has it, (n,) int64."""
        hashes = np.frombuffer(self.hashes, np.int64)
        _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
        first = first[number]
        again = np.flatnonzero(first != np.arange(len(first)))
        parts = (again[start : start + _PART] for start in range(0, len(again), _PART))
        if all(texts.equal(part, first[part]) for part in parts):
            return first
        rows: dict[str, int] = {}  # two texts have one hash, which is not expected to happen
        return np.array([rows.setdefault(texts[row], row) for row in range(len(first))])


def _read(
    table: Table[list[str]], names: Sequence[str], folder: Path
) -> tuple[tuple[str, ...], Columns]:
    """Read classes and columns.

    Raises:
        RefusedTable: a row breaks a rule.
    """
    label, labelled, split = array("i"), array("b"), array("b")
    ids, groups, virtual = _Names(), _Names(), _Texts()
    files = {name: _Texts() for name in _modalities_of(names)}
    number_of = {"": -1}  # of each label, in the order of appearance
    for batch in table.batches:
        cells = dict(zip(names, map(_restored, batch), strict=True))
        for name in set(cells["label"]):
            number_of.setdefault(name, len(number_of) - 1)
        try:
            labelled.extend(map(_LABELLED.__getitem__, cells["labelled"]))
            split.extend(map(_SPLITS.__getitem__, cells["split"]))
        except KeyError:
            raise RefusedTable from None
        label.extend(map(number_of.__getitem__, cells["label"]))
        ids.extend(cells["id"])
        groups.extend(cells["group"])
        virtual.extend(cells["virtual"])
        for name, texts in files.items():
            texts.extend(cells[name])
    del number_of[""]
    classes = tuple(sorted(number_of))
    place = {name: number for number, name in enumerate(classes)}
    by_appearance = [*(place[name] for name in number_of), -1]  # label -1 indexes the last one
    id_texts = ids.done()
    columns = Columns(
        folder,
        np.array(by_appearance, np.int32)[np.frombuffer(label, np.int32)],
        np.frombuffer(labelled, np.bool_),
        _group_numbers(groups),
        np.frombuffer(split, np.int8),
        id_texts,
        virtual.done(),
        {name: texts.done() for name, texts in files.items()},
    )
    imageless = np.logical_and.reduce([texts.empty() for texts in columns.files.values()])
    if (
        imageless.any()
        or id_texts.empty().any()
        or (columns.labelled & (columns.label < 0)).any()
        or (ids.first_rows(id_texts) != np.arange(len(label))).any()
    ):
        raise RefusedTable
    return classes, columns


def _restored(cells: list[str]) -> list[str]:
    return list(map(restored_cell, cells)) if "'" in "".join(cells) else cells


def _group_numbers(groups: _Names) -> np.ndarray:
    """Number the groups by first appearance, (n,) int32; an empty name is a group of its own."""
    texts = groups.done()
    first = np.where(texts.empty(), np.arange(len(texts.bounds) - 1), groups.first_rows(texts))
    return np.unique(first, return_inverse=True)[1].astype(np.int32)


# Row by row


def _first_problem(path: Path, looked_for: Collection[str]) -> InputError:
    """Describe the first row of a manifest that breaks a rule.

    Args:
        path: of the CSV.
        looked_for: modalities whose files must exist.
    """
    what, folder = f"manifest {path}", path.parent.absolute()
    seen: set[str] = set()
    try:
        with open_table(path, what, _LARGEST) as table:
            names = _checked_names(table, what)
            reserved = itemgetter(*map(names.index, RESERVED))
            place = {name: names.index(name) for name in _modalities_of(names)}
            for line, raw in table.lines:
                cells = list(map(restored_cell, raw))
                files = {name: cells[k] for name, k in place.items()}
                problem = _problem(reserved(cells), files, seen) or _absent(
                    {name: files[name] for name in looked_for}, folder
                )
                if problem:
                    return InputError(f"{what}, line {line}: {problem}")
                seen.add(reserved(cells)[0])
    except InputError as error:
        return error
    return InputError(f"{what} or an image of it was changed while it was read")


def _problem(reserved: Sequence[str], files: Mapping[str, str], seen: Collection[str]) -> str:
    """Describe an invalid cell of a row; "" if there is none."""
    name, label, labelled, _, split, _ = reserved
    if not name or name in seen:
        return f"id {name!r} is {'used twice' if name else 'empty'}"
    if split not in SPLITS:
        return f"split is {split!r}, wanted one of {', '.join(SPLITS)}"
    if labelled not in ("0", "1"):
        return f"labelled is {labelled!r}, wanted 0 or 1"
    if labelled == "1" and not label:
        return "labelled is 1, but the label is empty"
    return "" if any(files.values()) else f"no image in any of {', '.join(files)}"


def _absent(files: Mapping[str, str], folder: Path) -> str:
    """Describe an image of a row that does not exist; "" if there is none."""
    for name, cell in files.items():
        if cell and not file_exists(os.path.join(folder, cell)):
            return f"the {name} image {folder / cell} does not exist"
    return ""
