"""Webdataset shards: tar files of image pairs, for archives that do not fit one disk.

A shard holds the rows of one split, in random order, so that reading it from end to end still mixes
classes: ``000123.wli.jpg``, ``000123.nbi.jpg`` and ``000123.json`` (id, label) of a row; beside it
lies an index in the format of DALI's ``wds2idx``. The manifest names an image as if the shard were
a folder: ``shards/train-000000.tar/000123.wli.jpg``. Shards may lie anywhere as long as the
manifest, or a link, leads to them.

Training reads shards by DALI's webdataset reader. What it reads, and in which order, is decided by
index files that are written for it, some batches at a time; so order and resume are as exact as
those of single files.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np

from mics_fast.common.files import renamed
from mics_fast.data.augmentation import epoch_order


@dataclass(frozen=True)
class Member:
    """Where an image lies.

    Args:
        shard: tar file.
        offset, size: of its bytes in the shard.
    """

    shard: Path
    offset: int
    size: int


# Writing


def write_shards(
    records: Sequence[Mapping[str, str]],
    modalities: Sequence[str],
    folder: Path,
    rows_per_shard: int,
    seed: int,
) -> list[dict[str, str]]:
    """Copy the images of all rows into shards.

    Args:
        records: rows of the manifest; their paths are relative to ``folder``.
        modalities: names of the columns that hold paths.
        folder: of the manifest; shards are written below its ``shards``.
        rows_per_shard: most rows of a shard.
        seed: of the order.

    Returns:
        The records with paths into the shards.
    """
    moved = [dict(record) for record in records]
    (folder / "shards").mkdir(exist_ok=True)
    for split in sorted({record["split"] for record in records}):
        rows = [number for number, record in enumerate(records) if record["split"] == split]
        order = [rows[place] for place in epoch_order(seed, 0, len(rows))]
        for shard, start in enumerate(range(0, len(order), rows_per_shard)):
            name = f"{split}-{shard:06d}.tar"
            members = [
                member
                for number in order[start : start + rows_per_shard]
                for member in members_of(number, moved[number], modalities, folder, name)
            ]
            write_shard(folder / "shards" / name, members)
    return moved


def members_of(
    number: int, record: dict[str, str], modalities: Sequence[str], folder: Path, shard: str
) -> list[tuple[str, Path | bytes]]:
    """Name and content of the members of a row; its paths lead into the shard from now on."""
    key = f"{number:06d}"
    about = {name: record[name] for name in ("id", "label", "split")}
    members: list[tuple[str, Path | bytes]] = [(f"{key}.json", json.dumps(about).encode())]
    for name in modalities:
        if record[name]:
            source = folder / record[name]
            member = f"{key}.{name}{source.suffix.lower()}"
            members.append((member, source))
            record[name] = f"shards/{shard}/{member}"
    return members


def write_shard(path: Path, members: Sequence[tuple[str, Path | bytes]]) -> None:
    """Write a tar file and its index, each under a temporary name first; the index gets its name
    first, so that a shard with its name has one."""
    with renamed(path) as partial:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members:
                encoded = content.read_bytes() if isinstance(content, Path) else content
                info = tarfile.TarInfo(name)
                info.size = len(encoded)
                tar.addfile(info, io.BytesIO(encoded))
        with tarfile.open(partial) as tar:
            placed = [(info.name, info.offset_data, info.size) for info in tar]
        lines = [
            " ".join(f"{name.split('.', 1)[1]} {place} {size} {name}" for name, place, size in own)
            for _, own in groupby(placed, key=lambda member: member[0].split(".", 1)[0])
        ]
        with renamed(path.with_suffix(".idx")) as index:
            index.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
    read_index.cache_clear()  # of a shard that had this name before


# Reading one image


def shard_of(path: Path) -> Path | None:
    """The shard that a path leads into, None where it is a file of its own."""
    return path.parent if path.parent.suffix == ".tar" else None


def find_member(path: Path) -> Member:
    """Where the image lies that a path into a shard names.

    Raises:
        OSError: the shard or its index cannot be read, or has no such member.
    """
    try:
        offset, size = read_index(path.parent)[path.name]
    except (KeyError, ValueError):
        raise FileNotFoundError(errno.ENOENT, "not in the shard's index", str(path)) from None
    return Member(path.parent, offset, size)


@cache
def read_index(shard: Path) -> dict[str, tuple[int, int]]:
    """Name -> offset and size of the members of a shard.

    Raises:
        OSError: the shard is not there, or its index cannot be read.
    """
    shard.stat()
    _, *lines = shard.with_suffix(".idx").read_text().splitlines()
    members = {}
    for line in lines:
        words = line.split()
        for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True):
            members[name] = (int(offset), int(size))
    return members


def read_image(path: Path) -> np.ndarray:
    """The bytes of an image, in a shard or a file of its own.

    Raises:
        OSError: it cannot be read.
    """
    if shard_of(path) is None:
        return np.fromfile(path, dtype=np.uint8)
    member = find_member(path)
    return np.fromfile(member.shard, dtype=np.uint8, count=member.size, offset=member.offset)


def image_exists(path: Path) -> bool:
    """Whether there is such a file, or such a member of a shard."""
    if shard_of(path) is None:
        return path.is_file()
    try:
        return os.path.getsize(path.parent) > find_member(path).offset
    except OSError:
        return False


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


def write_indices(
    samples: Sequence[Sequence[Member]], modalities: Sequence[str], folder: Path
) -> tuple[list[str], list[str]]:
    """Index files that make DALI's webdataset reader read these samples in this order.

    Args:
        samples: an image for each modality, those of a sample in one shard.
        modalities: names; the reader's component names.
        folder: where the index files are written.

    Returns:
        The shards and their index files; a shard comes as often as the order returns to it.
    """
    shards: list[str] = []
    indices: list[str] = []
    for shard, part in groupby(samples, key=lambda members: members[0].shard):
        lines = list(_index_lines(part, modalities))
        index = folder / f"{len(indices):06d}.idx"
        index.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
        shards.append(str(shard))
        indices.append(str(index))
    return shards, indices


def _index_lines(samples: Iterator[Sequence[Member]], modalities: Sequence[str]) -> Iterator[str]:
    for number, members in enumerate(samples):
        yield " ".join(
            f"{name} {member.offset} {member.size} {number}.{name}"
            for name, member in zip(modalities, members, strict=True)
        )
