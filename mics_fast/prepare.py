"""``python -m mics_fast.prepare``: from images, wherever they lie, to a manifest.

Every image is opened and decoded once, on all cores; in the same pass it is cropped, stored again
and rendered as virtual NBI where that is asked for, and hashed for the check of near-duplicates.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from mics_fast.data import phantom
from mics_fast.data.contact_sheet import write_contact_sheet
from mics_fast.data.images import around, content_box, cut, decode, save, shrink
from mics_fast.data.leaks import group_together, near_duplicates, perceptual_hash
from mics_fast.data.manifest import write_manifest
from mics_fast.data.reports import print_summary, report_leaks, report_rejected
from mics_fast.data.shards import write_shards
from mics_fast.data.sources import CONTACT_SHEET, Sample, read_columns, read_folders, read_table
from mics_fast.data.splits import fold_rows, label_rows, split_fold, split_rows
from mics_fast.data.virtual_nbi import virtual_nbi
from mics_fast.errors import InputError, SentenceParser, run_command

HELD_OUT = "held-out.csv"

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Inspected:
    """A sample after its images have been decoded.

    Args:
        sample: with the files that training is to read; broken ones are gone.
        hashes: modality -> perceptual hash; none of a modality that is derived.
        rejected: broken file and what is wrong with it.
    """

    sample: Sample
    hashes: dict[str, np.ndarray]
    rejected: list[tuple[Path, str]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Find or make the images, check every one, split the rows, write the manifest."""
    options = parse(arguments)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        if options.source == "phantom":
            found = make_phantom(out, options.pairs, options.seed)
            modalities = ["wli", "nbi"]
        else:
            samples, modalities = find_samples(options)
            found = in_threads(lambda sample: inspect(sample, options), samples, "checking")
        kept = keep_complete(found, modalities, options)
        kept, apart = hold_out(kept, options)
        for path in write_rows(kept, modalities, options):
            print(f"wrote {path}")
        if apart:
            print(f"wrote {write_held_out(apart, modalities, options.out)}")
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from None
    except UnicodeEncodeError as error:
        raise InputError(f"file name {error.object!r} is not UTF-8, wanted one that is") from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: an option is unknown, ill-typed or out of range.
    """
    parser = SentenceParser(prog="python -m mics_fast.prepare", description=__doc__)
    add = parser.add_argument
    add("source", help="folder of class folders, CSV file, or the word phantom")
    add("--out", type=Path, required=True, help="folder for manifest.csv")
    add("--column", action="append", default=[], metavar="MODALITY=COLUMN",
        help="column of the CSV file with the paths of a modality")  # fmt: skip
    add("--label-column", help="column of the CSV file that holds the class")
    add("--group-column", help="column of the CSV file whose value one lesion's frames share")
    add("--pair-pattern", metavar="REGEX",
        help="finds the id that both file names of a pair share; default: the stem")  # fmt: skip
    add("--keep-orphans", action="store_true", help="keep rows that miss a modality")
    add("--virtual-nbi", action="store_true", help="derive NBI from WLI frames")
    add("--crop-borders", action="store_true", help="store frames without their black borders")
    add("--store-side", type=int, metavar="PIXELS",
        help="store frames again, as JPEG with this shorter side, for fast reading")  # fmt: skip
    add(
        "--label-fraction",
        type=float,
        default=0.05,
        help="train rows that keep their label (default: 0.05)",
    )
    add("--split", type=float, nargs=3, default=(0.7, 0.1, 0.2), metavar="X",
        help="fractions of train, val and test rows (default: 0.7 0.1 0.2)")  # fmt: skip
    add("--folds", type=int, metavar="K",
        help="write fold-1.csv to fold-K.csv, each tests on another K-th of the rows")  # fmt: skip
    add("--to-shards", type=int, metavar="ROWS",
        help="copy the images into tar shards of this many rows (webdataset)")  # fmt: skip
    add("--group-near-duplicates", action="store_true",
        help="keep frames that look alike on one side of the split")  # fmt: skip
    add("--hold-out", metavar="CLASS",
        help="write this class to held-out.csv instead of the manifest")  # fmt: skip
    add("--seed", type=int, default=0, help="of split, labels and phantom (default: 0)")
    add("--pairs", type=int, default=600, help="of the phantom (default: 600)")
    options = parser.parse_args(arguments)
    check_numbers(options)
    check_source(options)
    return options


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers out of range.

    Raises:
        InputError: names the first such option.
    """
    if not 0 < options.label_fraction <= 1:
        raise InputError(
            f"--label-fraction is {options.label_fraction}, wanted above 0 and up to 1"
        )
    split = options.split
    if not (min(split) >= 0 and split[0] > 0 and abs(sum(split) - 1) < 1e-6):
        raise InputError(f"--split is {options.split}, wanted three fractions that sum to 1")
    if options.folds is not None and options.folds < 2:
        raise InputError(f"--folds is {options.folds}, wanted at least 2")
    if options.to_shards is not None and (options.to_shards < 1 or options.folds):
        raise InputError(
            f"--to-shards is {options.to_shards}, wanted at least 1 row a shard, and no --folds: "
            "a shard is of one split"
        )
    if options.store_side is not None and options.store_side < 32:
        raise InputError(f"--store-side is {options.store_side}, wanted at least 32 pixels")
    if options.seed < 0 or options.pairs < 1:
        raise InputError("--seed must be at least 0 and --pairs at least 1")


def check_source(options: argparse.Namespace) -> None:
    """Refuse options that do not go with the source; compile the pattern, read the columns.

    Raises:
        InputError: names the first such option.
    """
    if options.source == "phantom":
        for name in ("virtual_nbi", "crop_borders", "store_side"):
            if getattr(options, name):
                option = name.replace("_", "-")
                raise InputError(f"--{option} is for given frames, but the phantom makes its own")
    is_table = Path(options.source).suffix.lower() == ".csv"
    if is_table and not options.column:
        raise InputError(
            f"{options.source} is a table, wanted --column MODALITY=COLUMN, as in wli=file"
        )
    if is_table and options.pair_pattern:
        raise InputError("--pair-pattern is for folders, but the rows of a table are pairs already")
    for name in ("column", "label_column", "group_column"):
        if getattr(options, name) and not is_table:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is for a CSV file, but the source is {options.source}")
    options.column = read_columns(options.column)
    if options.pair_pattern is not None:
        try:
            options.pair_pattern = re.compile(options.pair_pattern)
        except re.error as error:
            raise InputError(
                f"--pair-pattern {options.pair_pattern} is no regular expression: {error}"
            ) from None


def find_samples(options: argparse.Namespace) -> tuple[list[Sample], list[str]]:
    """The samples of a table or of folders, complete or not, and the modalities they should have.

    Nothing is opened yet.
    """
    if options.column:
        samples = read_table(
            Path(options.source), options.column, options.label_column, options.group_column
        )
    else:
        samples = read_folders(Path(options.source), options.out, options.pair_pattern)
    there = {name for sample in samples for name in sample.files}
    modalities = list(options.column) or [name for name in ("wli", "nbi") if name in there]
    if options.virtual_nbi:
        if modalities != ["wli"]:
            raise InputError(
                f"--virtual-nbi is for WLI frames alone, but {options.source} has "
                f"{', '.join(modalities).upper()}"
            )
        modalities.append("nbi")
    return samples, modalities


def make_phantom(out: Path, pairs: int, seed: int) -> list[Inspected]:
    """Render the phantom's pairs below ``out/wli`` and ``out/nbi``."""

    def render(index: int) -> Inspected:
        label, wli, nbi = phantom.render_pair(seed, index)
        name = f"{index:06d}"
        files = {"wli": out / "wli" / f"{name}.png", "nbi": out / "nbi" / f"{name}.png"}
        save(wli, files["wli"])
        save(nbi, files["nbi"])
        return Inspected(Sample(name, label, files), {}, [])

    return in_threads(render, range(pairs), "phantom")


def inspect(sample: Sample, options: argparse.Namespace) -> Inspected:
    """Decode every image of a sample once, and make of it whatever the options ask for."""
    frames, rejected = {}, []
    for name, path in sample.files.items():
        try:
            frames[name] = decode(path)
        except InputError as error:
            rejected.append((path, str(error)))
    files = {name: sample.files[name] for name in frames}
    checked = Sample(sample.id, sample.label, files, sample.group)
    if options.crop_borders and frames:
        # One box for all modalities, in fractions of the frame: a pair stays registered.
        box = around(content_box(frame) for frame in frames.values())
        frames = {name: cut(frame, box) for name, frame in frames.items()}
    if options.store_side:
        frames = {name: shrink(frame, options.store_side) for name, frame in frames.items()}
    hashes = {name: perceptual_hash(frame) for name, frame in frames.items()}
    if options.crop_borders or options.store_side:
        for name, frame in frames.items():
            store(frame, name, checked, options.out)
    if options.virtual_nbi and "wli" in frames:
        store(virtual_nbi(frames["wli"]), "nbi", checked, options.out)
        checked.virtual.append("nbi")
    return Inspected(checked, hashes, rejected)


def store(frame: np.ndarray, modality: str, sample: Sample, out: Path) -> None:
    """Write a frame below ``out/<modality>`` and let the sample refer to it."""
    target = out / modality / f"{sample.id}.jpg"
    save(frame, target)
    sample.files[modality] = target


def keep_complete(
    found: Sequence[Inspected], modalities: Sequence[str], options: argparse.Namespace
) -> list[Inspected]:
    """The samples that become rows; what does not is listed in ``rejected.csv`` with its reason.

    Raises:
        InputError: nothing is left.
    """
    enough = 1 if options.keep_orphans else len(modalities)
    kept, broken, orphans = [], [], []
    for one in found:
        broken += [(one.sample.id, path, reason) for path, reason in one.rejected]
        if len(one.sample.files) >= enough:
            kept.append(one)
        else:
            missing = ", ".join(name for name in modalities if name not in one.sample.files).upper()
            reason = f"without a partner: no {missing} image that can be used"
            orphans += [(one.sample.id, path, reason) for path in one.sample.files.values()]
    report_rejected(broken, orphans, options.out / "rejected.csv")
    if not kept:
        raise InputError(
            f"source {options.source} has no sample left, wanted one with all of its images; "
            f"{options.out / 'rejected.csv'} says what is wrong"
        )
    return kept


def hold_out(
    found: Sequence[Inspected], options: argparse.Namespace
) -> tuple[list[Inspected], list[Inspected]]:
    """The samples of all classes but the one that is to be held out, and those of that one.

    Raises:
        InputError: no sample is of that class, or all are.
    """
    name = options.hold_out
    if name is None:
        return list(found), []
    kept = [one for one in found if one.sample.label != name]
    apart = [one for one in found if one.sample.label == name]
    if not kept or not apart:
        classes = ", ".join(sorted({one.sample.label for one in found} - {""}))
        raise InputError(f"--hold-out is {name}, wanted one of several classes, there: {classes}")
    return kept, apart


def in_threads(work: Callable[[T], R], items: Iterable[T], title: str) -> list[R]:
    """Apply ``work`` to all items, in order, with a progress bar on a terminal."""
    items = list(items)
    console = Console(stderr=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(work, items)
        return list(
            track(results, title, len(items), console=console, disable=not console.is_terminal)
        )


def write_rows(
    found: Sequence[Inspected], modalities: Sequence[str], options: argparse.Namespace
) -> list[Path]:
    """Split the samples, check for leaks, write manifests and contact sheet, print a summary.

    Returns:
        The files written.
    """
    samples = [one.sample for one in found]
    labels = [sample.label for sample in samples]
    groups = [sample.group for sample in samples]
    alike = near_duplicates([one.hashes for one in found])
    if options.group_near_duplicates:
        groups = group_together(groups, [sample.id for sample in samples], alike)
    written: list[Path] = []
    for name, splits in draw_splits(labels, groups, options).items():
        labelled = draw_labelled(labels, groups, splits, options)
        records = records_of(samples, groups, splits, labelled, modalities, options.out)
        if not written:
            print_summary(records, modalities)
            report_leaks(alike, records, options.out / "near_duplicates.csv")
            write_contact_sheet(options.out / CONTACT_SHEET, records, modalities)
        if options.to_shards:
            records = write_shards(
                records, modalities, options.out, options.to_shards, options.seed
            )
        write_manifest(options.out / name, records, modalities)
        written.append(options.out / name)
    return [*written, options.out / CONTACT_SHEET]


def write_held_out(found: Sequence[Inspected], modalities: Sequence[str], out: Path) -> Path:
    """The manifest of the class that is held out: every row is for testing."""
    samples = [one.sample for one in found]
    groups = [sample.group for sample in samples]
    splits = ["test"] * len(samples)
    records = records_of(samples, groups, splits, set(), modalities, out)
    write_manifest(out / HELD_OUT, records, modalities)
    return out / HELD_OUT


def draw_splits(
    labels: Sequence[str], groups: Sequence[str], options: argparse.Namespace
) -> dict[str, list[str]]:
    """File name of each manifest -> the split of each row."""
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
    options: argparse.Namespace,
) -> set[int]:
    """The train rows that keep their label."""
    train = [row for row, split in enumerate(splits) if split == "train"]
    chosen = label_rows(
        [labels[row] for row in train],
        [groups[row] for row in train],
        options.label_fraction,
        options.seed,
    )
    return {row for row, keeps in zip(train, chosen, strict=True) if keeps}


def records_of(
    samples: Sequence[Sample],
    groups: Sequence[str],
    splits: Sequence[str],
    labelled: set[int],
    modalities: Sequence[str],
    out: Path,
) -> list[dict[str, str]]:
    """The rows of a manifest in ``out``."""
    # Resolved: "out/.." is not the parent of a folder that is reached through a link.
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
    """The way from a resolved folder to a file, whose own name may be a link."""
    return os.path.relpath(file.parent.resolve() / file.name, folder)


if __name__ == "__main__":
    run_command(main)
