"""Rows of a manifest, held as columns: numbers and text in arrays, and a ``Row`` made on access.

A million ``Row`` objects take more than a gigabyte; their columns take 150 MB, which the processes
of a machine share if the arrays are mapped from a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

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
class Texts:
    """A column of n texts.

    Args:
        text: UTF-8 of all of them in order, uint8.
        bounds: where each begins and the last ends, (n + 1,) int64.
    """

    text: np.ndarray
    bounds: np.ndarray

    def __getitem__(self, number: int) -> str:
        start, end = self.bounds[number : number + 2].tolist()
        return self.text[start:end].tobytes().decode(errors="replace")

    def part(self, start: int, end: int) -> list[str]:
        """Return the texts from a row to before another, faster than one by one."""
        bounds = self.bounds[start : end + 1]
        data = self.text[bounds[0] : bounds[-1]].tobytes()
        cuts = (bounds - bounds[0]).tolist()
        if not data.isascii():
            pairs = itertools.pairwise(cuts)
            return [data[here:there].decode(errors="replace") for here, there in pairs]
        text = data.decode()
        return [text[here:there] for here, there in itertools.pairwise(cuts)]

    def empty(self) -> np.ndarray:
        """Return which texts are empty, (n,) bool."""
        return self.bounds[1:] == self.bounds[:-1]

    def equal(self, rows: np.ndarray, others: np.ndarray) -> bool:
        """Return whether the text of each row is that of the other one, both (R,) int64."""
        starts, lengths = self.bounds[rows], self.bounds[rows + 1] - self.bounds[rows]
        if (lengths != self.bounds[others + 1] - self.bounds[others]).any():
            return False
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        here = self.text[np.repeat(starts, lengths) + within]
        return bool((here == self.text[np.repeat(self.bounds[others], lengths) + within]).all())


@dataclass(frozen=True)
class Columns:
    """The columns of a manifest's n rows.

    Args:
        folder: absolute; the paths are relative to it.
        label: index into the classes, -1 for an empty cell, (n,) int32.
        labelled: (n,) bool.
        group: (n,) int32.
        split: index into ``SPLITS``, (n,) int8.
        id: ids.
        virtual: names of modalities, separated by blanks.
        files: modality -> paths of its images; an empty one is missing.
    """

    folder: Path
    label: np.ndarray
    labelled: np.ndarray
    group: np.ndarray
    split: np.ndarray
    id: Texts
    virtual: Texts
    files: Mapping[str, Texts]


class Rows(Sequence[Row]):
    """Some rows of a manifest.

    Args:
        columns: of the whole manifest.
        indices: ``Row.index`` of each, (R,) int64.
    """

    def __init__(self, columns: Columns, indices: np.ndarray) -> None:
        self.columns, self.indices = columns, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> Row | Rows:
        if isinstance(at, slice):
            return Rows(self.columns, self.indices[at])
        return self._row(int(self.indices[at]))

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, self.indices.tolist())

    def where(self, mask: np.ndarray) -> Rows:
        """Return the rows that a mask, (R,) bool, selects."""
        return Rows(self.columns, self.indices[mask])

    @property
    def known(self) -> Rows:
        """Return the rows with a label, whether training may use it or not."""
        return self.where(self.label >= 0)

    @property
    def label(self) -> np.ndarray:
        """Return the label of each row, (R,) int32."""
        return self.columns.label[self.indices]

    @property
    def labelled(self) -> np.ndarray:
        """Return whether training may use the label of each row, (R,) bool."""
        return self.columns.labelled[self.indices]

    @property
    def group(self) -> np.ndarray:
        """Return the group of each row, (R,) int32."""
        return self.columns.group[self.indices]

    @property
    def split(self) -> np.ndarray:
        """Return the split of each row as index into ``SPLITS``, (R,) int8."""
        return self.columns.split[self.indices]

    def missing(self, modality: str) -> np.ndarray:
        """Return which rows have no image of a modality, (R,) bool."""
        return self.columns.files[modality].empty()[self.indices]

    def with_labels(self, label: np.ndarray) -> Rows:
        """Return the rows with other labels, (R,) int32."""
        changed = self.columns.label.copy()
        changed[self.indices] = label
        return Rows(replace(self.columns, label=changed), self.indices)

    def _row(self, number: int) -> Row:
        own = self.columns
        paths = {name: texts[number] for name, texts in own.files.items()}
        return Row(
            index=number,
            id=own.id[number],
            label=int(own.label[number]),
            labelled=bool(own.labelled[number]),
            group=int(own.group[number]),
            split=SPLITS[own.split[number]],
            virtual=tuple(own.virtual[number].split()),
            files={name: own.folder / path if path else None for name, path in paths.items()},
        )


def labels_of(rows: Sequence[Row]) -> np.ndarray:
    """Return the label of each row, (R,)."""
    return rows.label if isinstance(rows, Rows) else np.array([row.label for row in rows], int)


def indices_of(rows: Sequence[Row]) -> np.ndarray:
    """Return the row number of each row, (R,)."""
    return rows.indices if isinstance(rows, Rows) else np.array([row.index for row in rows], int)
