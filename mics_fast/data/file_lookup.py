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
                self._add(self._hashes_of(f"{folder}/" if folder else ""))
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
        while self._hashes and len(self._hashes[-1]) <= 2 * len(hashes):
            both = np.concatenate([self._hashes.pop(), hashes])
            hashes = np.sort(both, kind="stable")  # merges what is sorted already
        if len(hashes):
            self._hashes.append(hashes)

    def _hashes_of(self, folder: str) -> np.ndarray:
        """Return the hash of each path that begins with a folder, or of as many as may be listed;
        sorted.
        """
        names = _names_in(os.path.join(self._base, folder), self._left)
        hashes = np.fromiter((hash(folder + name) for name in names), np.int64)
        self._left -= len(hashes)
        return np.sort(hashes)


def file_exists(file: str) -> bool:
    """Return whether an image exists, as ``image_exists``, which takes three times as long."""
    return image_exists(Path(file)) if ".tar" in file else os.path.isfile(file)


def _names_in(folder: str, most: int) -> Iterator[str]:
    """Yield the names of images in a folder or shard; of a folder's, only the first ``most``.

    If the folder cannot be read to its end, the other names are missing.
    """
    with suppress(OSError):
        if Path(folder).suffix == ".tar":
            yield from complete_members(Path(folder))
            return
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, most):
                if entry.is_file():
                    yield entry.name
