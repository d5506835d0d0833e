"""Webdataset shards: tar files of image pairs, for archives that do not fit one disk.

A shard holds rows of one split in random order, so that sequential reading still mixes classes.
A row is stored as ``000123.wli.jpg``, ``000123.nbi.jpg`` and ``000123.json`` (id, label). Each
shard has an index in the format of DALI's ``wds2idx``. The manifest addresses an image as if the
shard were a folder: ``shards/train-000000.tar/000123.wli.jpg``. Shards may lie anywhere as long as
the manifest, or a link, leads to them.

Members are read one by one like single files, not by a DALI reader: their bytes are checked before
they reach a decoder, and a truncated shard loses only its last rows.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mics_fast.data.augmentation import epoch_order
from mics_fast.data.image_header import LARGEST_FILE, RefusedImage, check_image

_LARGEST_INDEX = 1 << 28  # bytes


@dataclass(frozen=True)
class Member:
    """Position of an image in a shard.

    Args:
        shard: tar file.
        offset, size: of its bytes in the shard.
    """

    shard: Path
    offset: int
    size: int


# Reading one image


def shard_of(path: Path) -> Path | None:
    """Return the shard that a path leads into, None for a plain file."""
    return path.parent if path.parent.suffix == ".tar" else None


def find_member(path: Path) -> Member:
    """Find the image that a path into a shard names.

    Raises:
        OSError: the shard or its index cannot be read, the member is missing, or it lies beyond
            the shard's end.
    """
    members, end = read_index(path.parent)
    if path.name not in members:
        raise FileNotFoundError(errno.ENOENT, "not in the shard's index", str(path))
    offset, size = members[path.name]
    if offset + size > end:
        problem = f"bytes {offset} to {offset + size} of a shard of {end}: is it a whole copy?"
        raise OSError(errno.EINVAL, problem, str(path))
    return Member(path.parent, offset, size)


def complete_members(shard: Path) -> list[str]:
    """Return the names that ``find_member`` finds in a shard, without keeping its index.

    Raises:
        OSError: the shard is missing, or its index cannot be read.
    """
    members, end = _read_index(shard)
    return [name for name, (offset, size) in members.items() if offset + size <= end]


@cache
def read_index(shard: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Read a shard's index: name -> offset and size of each member; and the size of the shard.

    Raises:
        OSError: the shard is missing, or its index cannot be read.
    """
    return _read_index(shard)


def _read_index(shard: Path) -> tuple[dict[str, tuple[int, int]], int]:
    index = shard.with_suffix(".idx")
    about = index.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST_INDEX:
        raise OSError(errno.EINVAL, "its index is no regular file, or too large", str(index))
    members = {}
    try:
        _, *lines = index.read_text(encoding="utf-8").splitlines()
        for line in lines:
            words = line.split()
            for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True):
                members[name] = (int(offset), int(size))
    except ValueError:
        raise OSError(errno.EINVAL, "its index is broken", str(index)) from None
    if any(offset < 0 or size < 0 for offset, size in members.values()):
        raise OSError(errno.EINVAL, "its index is broken", str(index))
    return members, shard.stat().st_size


def read_image(path: Path) -> np.ndarray:
    """Read the checked bytes of an image, from a shard or a plain file.

    Raises:
        OSError: it cannot be read.
        RefusedImage: it is not a regular file, is too large, or fails ``check_image``.
    """
    data = read_bytes(path)
    check_image(data)
    return np.frombuffer(data, dtype=np.uint8)


def read_bytes(path: Path) -> bytes:
    """Read bytes as ``read_image`` does, without checking that they are an image."""
    member = None if shard_of(path) is None else find_member(path)
    return _bytes_of(path if member is None else member.shard, member)


def _bytes_of(file: Path, member: Member | None) -> bytes:
    """Read a file, or a member of a shard; never more than ``LARGEST_FILE`` bytes."""
    about = file.stat()  # before opening: opening a pipe waits, opening a device may have effects
    if not stat.S_ISREG(about.st_mode):
        raise RefusedImage(f"is {_kind_of(about.st_mode)}, wanted a regular file")
    size = about.st_size if member is None else member.size
    with open(file, "rb", opener=_open_without_waiting) as stream:
        if size <= LARGEST_FILE:
            stream.seek(0 if member is None else member.offset)
            data = stream.read(LARGEST_FILE + 1 if member is None else size)
            if data is None:  # one of the system's that waits for news, such as /proc/kmsg
                raise RefusedImage("is no regular file: it has nothing to read yet")
            if len(data) <= LARGEST_FILE:
                return data
    wanted = f"wanted an image of at most {LARGEST_FILE >> 20} MiB"
    raise RefusedImage(f"has {size / 2**20:.0f} MiB, {wanted}")


def _open_without_waiting(file: str, flags: int) -> int:
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def _kind_of(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


def image_exists(path: Path) -> bool:
    """Return True if the file exists, or the member exists and is complete."""
    try:
        if shard_of(path) is None:
            return stat.S_ISREG(path.stat().st_mode)
        find_member(path)
    except OSError:  # includes names that are too long
        return False
    return True


# Reading batches


def shard_order(seed: int, epoch: int, shards: np.ndarray) -> np.ndarray:
    """Draw a permutation of the rows, (R,), that goes shard by shard.

    Args:
        seed, epoch: of the order of the shards, and of the rows in each.
        shards: number of each row's shard, (R,) int64; every number from 0 on has a row.
    """
    place = np.argsort(epoch_order(seed, epoch, int(shards.max()) + 1))
    rows = epoch_order(seed, epoch, len(shards))
    return rows[np.argsort(place[shards[rows]], kind="stable")]
