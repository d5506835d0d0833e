"""Finding out which of many files exist: whole folders are listed where that is faster."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mics_fast.data.shards import complete_members, image_exists

_MANY = 16  # files of a folder, from which listing it is faster than looking at each
_PER_FILE = 4  # entries of a folder that are listed in the time of looking at one file


class FileLookup:
    """Looks for files.

    A listed file is known by the hash of its path, 64 bits: with a million files in the listed
    folders, an absent one is overlooked with a probability of 5e-14.

    Args:
        base: folder that paths are relative to.
        files: number of files that will be looked for, which limits what is listed.
    """

    def __init__(self, base: str, files: int) -> None:
        self._base = base
        self._left = _PER_FILE * files
        self._listed: set[str] = set()
        self._hashes: list[np.ndarray] = []  # each sorted, less than half as long as the one before

    def all_exist(self, paths: Sequence[str]) -> bool:
        """Return whether all files exist, as ``file_exists``."""
        hashes = np.fromiter(map(hash, paths), np.int64, len(paths))
        unknown = self._unknown(hashes, np.argsort(hashes))  # sorted, or searching is slow
        folders = Counter([paths[place].rpartition("/")[0] for place in unknown.tolist()])
        for folder, asked in folders.items():
            if asked >= _MANY and folder not in self._listed:
                self._listed.add(folder)
                listed = _hashes_in(self._base, f"{folder}/" if folder else "", self._left)
                self._add(np.sort(np.fromiter(listed, np.int64)))
        unknown = self._unknown(hashes, unknown)
        return all(file_exists(os.path.join(self._base, paths[k])) for k in unknown.tolist())

    def _unknown(self, hashes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the places whose hashes are those of no listed file."""
        for known in self._hashes:
            asked = hashes[places]
            places = places[known.take(np.searchsorted(known, asked), mode="clip") != asked]
        return places

    def _add(self, hashes: np.ndarray) -> None:
        """Add sorted hashes; each is merged with others only as often as their number doubles."""
        self._left = max(self._left - len(hashes), 0)  # shards are listed whole
        while self._hashes and len(self._hashes[-1]) <= 2 * len(hashes):
            both = np.concatenate([self._hashes.pop(), hashes])
            hashes = np.sort(both, kind="stable")  # merges what is sorted already
        if len(hashes):
            self._hashes.append(hashes)


def file_exists(file: str) -> bool:
    """Return whether an image exists, as ``image_exists``, which takes three times as long."""
    return image_exists(Path(file)) if ".tar" in file else os.path.isfile(file)


def _hashes_in(base: str, start: str, most: int) -> Iterator[int]:
    """Yield the hash of the path of each image in a folder or shard.

    If the folder cannot be read to its end, the other images are missing.

    Args:
        base, start: the folder; paths begin with ``start``.
        most: number of entries of a folder that are looked at.
    """
    folder = os.path.join(base, start)
    with suppress(OSError, ValueError):  # ValueError: a name with a NUL character
        if Path(folder).suffix == ".tar":
            yield from (hash(start + name) for name in complete_members(Path(folder)))
            return
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, most):
                if entry.is_file():
                    yield hash(start + entry.name)
