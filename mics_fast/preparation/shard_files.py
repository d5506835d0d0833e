"""Writing of shards: tar files with images of one split, in random order, each with an index."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from mics_fast.common.files import make_private, renamed
from mics_fast.data.augmentation import epoch_order
from mics_fast.data.image_header import check_image
from mics_fast.data.shards import read_bytes, read_index
from mics_fast.preparation.metadata import without_metadata

_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp"}


def write_shards(
    records: Sequence[Mapping[str, str]],
    modalities: Sequence[str],
    folder: Path,
    rows_per_shard: int,
    seed: int,
) -> list[dict[str, str]]:
    """Copy the images of all rows into shards, without metadata.

    Args:
        records: rows of the manifest; their paths are relative to ``folder``.
        modalities: names of the columns that hold paths.
        folder: of the manifest; shards are written below its ``shards``.
        rows_per_shard: at most this many rows per shard.
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
) -> list[tuple[str, bytes]]:
    """Return name and content of a row's members, and rewrite its paths to lead into the shard."""
    key = f"{number:06d}"
    about = {name: record[name] for name in ("id", "label", "split")}
    members: list[tuple[str, bytes]] = [(f"{key}.json", json.dumps(about).encode())]
    for name in modalities:
        if record[name]:
            source = folder / record[name]
            encoded = without_metadata(read_bytes(source), source)
            # Readers of shards split names at blanks; a dot ends the key alone.
            member = f"{key}.{quote(name, safe='')}{_ENDINGS[check_image(encoded).kind]}"
            members.append((member, encoded))
            record[name] = f"shards/{shard}/{member}"
    return members


def write_shard(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """Write a tar file and its index atomically; the index is renamed first, so that every shard
    has one."""
    with renamed(path) as partial:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        make_private(partial)
        with tarfile.open(partial) as tar:
            placed = [(info.name, info.offset_data, info.size) for info in tar]
        lines = [
            " ".join(f"{name.split('.', 1)[1]} {place} {size} {name}" for name, place, size in own)
            for _, own in groupby(placed, key=lambda member: member[0].split(".", 1)[0])
        ]
        with renamed(path.with_suffix(".idx")) as index:
            index.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
            make_private(index)
    read_index.cache_clear()  # of a shard that had this name before
