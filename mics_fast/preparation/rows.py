"""Manifest rows of ``prepare``: splits, labels, leak check, writing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mics_fast.common.files import renamed
from mics_fast.data.manifest import write_manifest
from mics_fast.data.manifest_checks import check_labels, check_rows
from mics_fast.preparation.contact_sheet import write_contact_sheet
from mics_fast.preparation.inspection import Inspected
from mics_fast.preparation.leaks import NearDuplicate, group_together, near_duplicates
from mics_fast.preparation.options import PrepareOptions
from mics_fast.preparation.reports import write_leaks
from mics_fast.preparation.shard_files import write_shards
from mics_fast.preparation.sources import CONTACT_SHEET, Candidate
from mics_fast.preparation.splits import fold_rows, label_rows, split_fold, split_rows

HELD_OUT, NEAR_DUPLICATES = "held-out.csv", "near_duplicates.csv"


@dataclass(frozen=True)
class Written:
    """The files that were written, and the facts for the report.

    Args:
        files: manifests, contact sheet.
        kept: earlier manifests that were kept, under their new names.
        records: rows of the first manifest.
        alike: the closest near-duplicates in two of its splits.
        pairs: total number of near-duplicates.
        warnings: sentences about its splits.
    """

    files: list[Path]
    kept: list[Path]
    records: list[dict[str, str]]
    alike: list[NearDuplicate]
    pairs: int
    warnings: list[str]


def write_rows(
    found: Sequence[Inspected], modalities: Sequence[str], options: PrepareOptions
) -> Written:
    """Split the samples, check for leaks, write manifests, lists and the contact sheet.

    Raises:
        InputError: labels or groups contradict each other, or a file cannot be written.
    """
    samples = [one.sample for one in found]
    labels = [sample.label for sample in samples]
    groups = [sample.group for sample in samples]
    ids = [sample.id for sample in samples]
    hashes = [one.hashes for one in found]
    check_labels(f"source {options.source}", labels)
    if options.group_near_duplicates:
        groups = group_together(groups, ids, hashes)
    given = [sample.split for sample in samples]
    drawn = {"manifest.csv": given} if all(given) else draw_splits(labels, groups, options)
    files, kept = [], []
    first: list[dict[str, str]] = []
    for name, splits in drawn.items():
        labelled = draw_labelled(labels, groups, splits, options)
        records = records_of(samples, groups, splits, labelled, modalities, options.out)
        if not first:
            first = records
            warnings = check_rows(f"source {options.source}", ids, labels, groups, splits)
        if options.to_shards:
            records = write_shards(
                records, modalities, options.out, options.to_shards, options.seed
            )
        kept += replace_manifest(options.out / name, records, modalities)
        files.append(options.out / name)
    alike, pairs = near_duplicates(hashes, [record["split"] for record in first])
    write_leaks(options.out / NEAR_DUPLICATES, alike, first)
    if options.anonymise is None:  # frames may show names and dates
        write_contact_sheet(options.out / CONTACT_SHEET, first, modalities)
        files.append(options.out / CONTACT_SHEET)
    return Written(files, kept, first, alike, pairs, warnings)


def replace_manifest(
    file: Path, records: Sequence[Mapping[str, str]], modalities: Sequence[str]
) -> list[Path]:
    """Write a manifest; an existing, different one is renamed, since it may be edited by hand.

    Returns:
        The new name of the existing manifest, if there was one.
    """
    before = file.read_bytes() if file.exists() else None
    write_manifest(file, records, modalities)
    if before is None or before == file.read_bytes():
        return []
    kept = file.with_name(f"{file.name}.bak")
    with renamed(kept) as partial:
        partial.write_bytes(before)
    return [kept]


def write_held_out(found: Sequence[Inspected], modalities: Sequence[str], out: Path) -> Path:
    """Write the manifest of the held-out class: every row is a test row."""
    samples = [one.sample for one in found]
    groups = [sample.group for sample in samples]
    splits = ["test"] * len(samples)
    records = records_of(samples, groups, splits, set(), modalities, out)
    write_manifest(out / HELD_OUT, records, modalities)
    return out / HELD_OUT


def draw_splits(
    labels: Sequence[str], groups: Sequence[str], options: PrepareOptions
) -> dict[str, list[str]]:
    """Return the split of each row, keyed by the file name of its manifest."""
    if options.folds is None:
        return {"manifest.csv": split_rows(labels, groups, options.split, options.seed)}
    fold = fold_rows(labels, groups, options.folds, options.seed)
    val_share = options.split[1] / (options.split[0] + options.split[1])
    return {
        f"fold-{k + 1}.csv": split_fold(labels, groups, fold, k, val_share, options.seed)
        for k in range(options.folds)
    }


def draw_labelled(
    labels: Sequence[str],
    groups: Sequence[str],
    splits: Sequence[str],
    options: PrepareOptions,
) -> set[int]:
    """Choose the train rows that keep their label."""
    train = [row for row, split in enumerate(splits) if split == "train"]
    chosen = label_rows(
        [labels[row] for row in train],
        [groups[row] for row in train],
        options.label_fraction,
        options.seed,
    )
    return {row for row, keeps in zip(train, chosen, strict=True) if keeps}


def records_of(
    samples: Sequence[Candidate],
    groups: Sequence[str],
    splits: Sequence[str],
    labelled: set[int],
    modalities: Sequence[str],
    out: Path,
) -> list[dict[str, str]]:
    """Return the rows of a manifest in ``out``."""
    # Resolved, because "out/.." is not the parent of a folder that is reached through a link.
    folder = out.resolve()
    return [
        {
            "id": sample.id,
            "label": sample.label,
            "labelled": str(int(row in labelled)),
            "group": groups[row],
            "split": splits[row],
            "virtual": " ".join(sample.virtual),
            **{
                name: relative(sample.files[name], folder) if name in sample.files else ""
                for name in modalities
            },
        }
        for row, sample in enumerate(samples)
    ]


def relative(file: Path, folder: Path) -> str:
    """Return the path of a file relative to a resolved folder; the file itself may be a link."""
    return os.path.relpath(file.parent.resolve() / file.name, folder)
