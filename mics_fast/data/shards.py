"""Webdataset shards: tar files of image pairs, for archives that do not fit one disk.

A shard holds the rows of one split, in random order, so that reading it from end to end still mixes
classes: ``000123.wli.jpg``, ``000123.nbi.jpg`` and ``000123.json`` (id, label) of a row; beside it
lies an index in the format of DALI's ``wds2idx``. The manifest names an image as if the shard were
a folder: ``shards/train-000000.tar/000123.wli.jpg``. Shards may lie anywhere as long as the
manifest, or a link, leads to them.

Members are read one by one, as single files are, and not by a reader of DALI's: their bytes are
checked before a decoder gets them, and a shard that is cut short costs its last rows alone.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mics_fast.data.augmentation import epoch_order
from mics_fast.data.image_header import LARGEST_FILE, RefusedImage, check_image

_LARGEST_INDEX = 1 << 28  # bytes


@dataclass(frozen=True)
class Member:
    """Place of an image in a shard.

    Args:
        shard: tar file.
        offset, size: of its bytes in the shard.
    """

    shard: Path
    offset: int
    size: int


# Reading one image


def shard_of(path: Path) -> Path | None:
    """The shard that a path leads into, None where it is a file of its own."""
    return path.parent if path.parent.suffix == ".tar" else None


def find_member(path: Path) -> Member:
    """Find the image that a path into a shard names.

    Raises:
        OSError: the shard or its index cannot be read, or has no such member, or one that lies
            beyond the shard's end.
    """
    members, end = read_index(path.parent)
    if path.name not in members:
        raise FileNotFoundError(errno.ENOENT, "not in the shard's index", str(path))
    offset, size = members[path.name]
    if offset + size > end:
        problem = f"bytes {offset} to {offset + size} of a shard of {end}: is it a whole copy?"
        raise OSError(errno.EINVAL, problem, str(path))
    return Member(path.parent, offset, size)


@cache
def read_index(shard: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Name -> offset and size of the members of a shard, as its index says; size of the shard.

    Raises:
        OSError: the shard is not there, or its index cannot be read.
    """
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
    """The bytes of an image, in a shard or a file of its own, fit for a decoder.

    Raises:
        OSError: it cannot be read.
        RefusedImage: it is no regular file, too large, or ``check_image`` refuses it.
    """
    data = read_bytes(path)
    check_image(data)
    return np.frombuffer(data, dtype=np.uint8)


def read_bytes(path: Path) -> bytes:
    """As ``read_image``, whatever the bytes are."""
    member = None if shard_of(path) is None else find_member(path)
    return _bytes_of(path if member is None else member.shard, member)


def _bytes_of(file: Path, member: Member | None) -> bytes:
    """The bytes of a file, or of a member of a shard; never more than ``LARGEST_FILE``."""
    about = file.stat()  # before it is opened: opening a pipe waits, opening a device may act
    if not stat.S_ISREG(about.st_mode):
        raise RefusedImage(f"is {_kind_of(about.st_mode)}, wanted a regular file")
    size = about.st_size if member is None else member.size
    with open(file, "rb", opener=_open_without_waiting) as stream:
        if size <= LARGEST_FILE:
            stream.seek(0 if member is None else member.offset)
            data = stream.read(LARGEST_FILE + 1 if member is None else size)
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
    """Whether there is such a file, or such a member of a shard, whole."""
    try:
        if shard_of(path) is None:
            return stat.S_ISREG(path.stat().st_mode)
        find_member(path)
    except OSError:  # too long a name, too
        return False
    return True


# Reading batches


def shard_order(seed: int, epoch: int, shards: Sequence[Path]) -> np.ndarray:
    """(R,) a permutation of the rows that takes one shard after the other.

    Args:
        seed, epoch: of the draw of the order of the shards, and of the rows in each.
        shards: that each row lies in.
    """
    names = sorted(set(shards))
    rank = np.argsort(epoch_order(seed, epoch, len(names)))
    place = dict(zip(names, rank, strict=True))
    rows = epoch_order(seed, epoch, len(shards))
    return rows[np.argsort([place[shards[row]] for row in rows], kind="stable")]
