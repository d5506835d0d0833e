"""``python -m mics_fast.prepare``: from images, wherever they lie, to a manifest.

Every image is opened and decoded once, on all cores; in the same pass it is cropped, stored again
and rendered as virtual NBI where that is asked for, and hashed for the check of near-duplicates.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.errors import InputError, SentenceParser, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Find or make the images, check every one, split the rows, write the manifest."""
    options = parse(arguments)
    # Decoders and torch take seconds to import: --help and mistyped options do not wait for them.
    from mics_fast.preparation.assembly import prepare

    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        report = prepare(options)
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from None
    except UnicodeEncodeError as error:
        raise InputError(f"file name {error.object!r} is not UTF-8, wanted one that is") from None
    report()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: an option is unknown, ill-typed or out of range.
    """
    parser = SentenceParser(prog="python -m mics_fast.prepare", description=__doc__)
    add = parser.add_argument
    add("source", help="folder of class folders, table (CSV, TSV), or the word phantom")
    add("--out", type=Path, required=True, help="folder for manifest.csv")
    add("--column", action="append", default=[], metavar="MODALITY=COLUMN",
        help="column of the CSV file with the paths of a modality")  # fmt: skip
    add("--label-column", help="column of the CSV file that holds the class")
    add("--group-column", help="column of the CSV file whose value one lesion's frames share")
    add("--id-column", help="column of the CSV file with an id per row; default: the path")
    add("--split-column", help="column of the CSV file with train, val or test; default: drawn")
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
    add("--anonymise", type=Path, metavar="KEY_FILE",
        help="write ids and groups hashed with the key in this file (made if it is not there), no "
        "paths of the source and no contact sheet")  # fmt: skip
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
    for name, least in (("seed", 0), ("pairs", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} is {getattr(options, name)}, wanted at least {least}")


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
    is_table = Path(options.source).suffix.lower() in (".csv", ".tsv", ".txt")
    if is_table and not options.column:
        raise InputError(
            f"{options.source} is a table, wanted --column MODALITY=COLUMN, as in wli=file"
        )
    if is_table and options.pair_pattern:
        raise InputError("--pair-pattern is for folders, but the rows of a table are pairs already")
    for name in ("column", "label_column", "group_column", "id_column", "split_column"):
        if getattr(options, name) and not is_table:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is for a CSV file, but the source is {options.source}")
    stored = options.store_side or options.crop_borders
    if options.anonymise and not (stored or (options.to_shards and not options.hold_out)):
        raise InputError(
            "--anonymise needs --store-side or --crop-borders, or --to-shards without --hold-out: "
            "the names of the source's own files would be in the manifest"
        )
    if options.split_column and options.folds:
        raise InputError("--split-column gives the splits, but --folds draws them, wanted one")
    from mics_fast.preparation.sources import Columns, read_assignments

    options.column = read_assignments(options.column)
    options.columns = Columns(
        options.column,
        options.label_column,
        options.group_column,
        options.id_column,
        options.split_column,
    )
    if options.pair_pattern is not None:
        try:
            options.pair_pattern = re.compile(options.pair_pattern)
        except re.error as error:
            raise InputError(
                f"--pair-pattern {options.pair_pattern} is no regular expression: {error}"
            ) from None


if __name__ == "__main__":
    run_command(main)
