"""Options of ``prepare``: one frozen record, and the checks that span several options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mics_fast.common.errors import InputError

PHANTOM = "phantom"
"""Source that asks for generated pairs instead of given images."""


@dataclass(frozen=True)
class Columns:
    """Columns of a table, by content; None if the table has no such column.

    Args:
        paths: modality -> column of paths, relative to the table's folder; empty for folders.
        label, group, id, split: columns of names.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    label: str | None = None
    group: str | None = None
    id: str | None = None
    split: str | None = None

    def all(self) -> list[str]:
        """Return the names of all columns that are read."""
        names = [*self.paths.values(), self.label, self.group, self.id, self.split]
        return [name for name in names if name]


@dataclass(frozen=True)
class PrepareOptions:
    """Options of one ``prepare`` run.

    Args:
        source: folder of class folders, table (CSV, TSV), or ``PHANTOM``.
        out: folder for the manifest.
        columns: of the table.
        pair_pattern: regular expression for the id that both file names of a pair share; None:
            the stem.
        keep_orphans: keep rows that lack a modality.
        virtual_nbi: derive NBI from WLI frames.
        crop_borders: store frames without their black borders.
        store_side: shorter side of the stored frames, pixels, at least 32; None: as they are.
        label_fraction: share of the train rows that keep their label, in (0, 1].
        split: fractions of train, val and test rows; they sum to 1.
        folds: number of cross-validation folds, at least 2; None: one split.
        to_shards: rows per tar shard; None: no shards.
        group_near_duplicates: keep near-duplicates in one split.
        hold_out: class to write to a manifest of its own.
        anonymise: file with the key of the pseudonyms; None: names are kept.
        seed: of split, labels and phantom.
        pairs: number of phantom pairs.
    """

    source: str
    out: Path
    columns: Columns
    pair_pattern: re.Pattern[str] | None
    keep_orphans: bool
    virtual_nbi: bool
    crop_borders: bool
    store_side: int | None
    label_fraction: float
    split: tuple[float, float, float]
    folds: int | None
    to_shards: int | None
    group_near_duplicates: bool
    hold_out: str | None
    anonymise: Path | None
    seed: int
    pairs: int


def check_options(options: PrepareOptions) -> None:
    """Refuse numbers out of range and options that contradict each other or the source.

    Raises:
        InputError: names the first such option.
    """
    _check_numbers(options)
    _check_source(options)
    stored = options.store_side or options.crop_borders
    if options.anonymise and not (stored or (options.to_shards and not options.hold_out)):
        raise InputError(
            "--anonymise needs --store-side or --crop-borders, or --to-shards without --hold-out: "
            "the names of the source's own files would be in the manifest"
        )
    if options.columns.split and options.folds:
        raise InputError("--split-column gives the splits, but --folds draws them, wanted one")


def _check_numbers(options: PrepareOptions) -> None:
    if not 0 < options.label_fraction <= 1:
        raise InputError(
            f"--label-fraction is {options.label_fraction}, wanted above 0 and up to 1"
        )
    split = options.split
    if not (min(split) >= 0 and split[0] > 0 and abs(sum(split) - 1) < 1e-6):
        raise InputError(f"--split is {list(split)}, wanted three fractions that sum to 1")
    if options.folds is not None and options.folds < 2:
        raise InputError(f"--folds is {options.folds}, wanted at least 2")
    if options.to_shards is not None and (options.to_shards < 1 or options.folds):
        raise InputError(
            f"--to-shards is {options.to_shards}, wanted at least 1 row per shard, and no --folds: "
            "all rows of a shard are of one split"
        )
    if options.store_side is not None and options.store_side < 32:
        raise InputError(f"--store-side is {options.store_side}, wanted at least 32 pixels")
    for name, least in (("seed", 0), ("pairs", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} is {getattr(options, name)}, wanted at least {least}")


def _check_source(options: PrepareOptions) -> None:
    columns = options.columns
    if options.source == PHANTOM:
        for name in ("virtual_nbi", "crop_borders", "store_side"):
            if getattr(options, name):
                option = name.replace("_", "-")
                raise InputError(f"--{option} is for given frames, but the phantom makes its own")
    is_table = Path(options.source).suffix.lower() in (".csv", ".tsv", ".txt")
    if is_table and not columns.paths:
        raise InputError(
            f"{options.source} is a table, wanted --column MODALITY=COLUMN, as in wli=file"
        )
    if is_table and options.pair_pattern:
        raise InputError("--pair-pattern is for folders, but the rows of a table are pairs already")
    given = {
        "--column": columns.paths,
        "--label-column": columns.label,
        "--group-column": columns.group,
        "--id-column": columns.id,
        "--split-column": columns.split,
    }
    for option, value in given.items():
        if value and not is_table:
            raise InputError(f"{option} is for a CSV file, but the source is {options.source}")
