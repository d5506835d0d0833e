"""``python -m mics_fast.prepare``: write a manifest for images in folders or in a table.

Every image is decoded once, on all cores. In the same pass it is hashed to find near-duplicates
and, on request, cropped, stored again and rendered as virtual NBI.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.errors import InputError, SentenceParser, run_command
from mics_fast.preparation.options import Columns, PrepareOptions, check_options


def main(arguments: Sequence[str] | None = None) -> None:
    """Find or generate the images, check them, split the rows and write the manifest."""
    options = parse(arguments)
    # Decoders and torch take seconds to import; --help and bad options are answered before that.
    from mics_fast.preparation.assembly import prepare

    out = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        report = prepare(options)
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from None
    except UnicodeEncodeError as error:
        raise InputError(f"file name {error.object!r} is not UTF-8, wanted one that is") from None
    report()


def parse(arguments: Sequence[str] | None) -> PrepareOptions:
    """Read and check the command line.

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
    options = _options(parser.parse_args(arguments))
    check_options(options)
    return options


def _options(found: argparse.Namespace) -> PrepareOptions:
    """Convert the parsed texts to options.

    Raises:
        InputError: a malformed column assignment or regular expression.
    """
    given = vars(found)
    assignments = given.pop("column")
    names = {name: given.pop(f"{name}_column") for name in ("label", "group", "id", "split")}
    paths: dict[str, str] = {}
    if assignments:
        from mics_fast.preparation.sources import read_assignments

        paths = read_assignments(assignments)
    pattern = given.pop("pair_pattern")
    try:
        compiled = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise InputError(f"--pair-pattern {pattern} is not a regular expression: {error}") from None
    given["split"] = tuple(given["split"])
    return PrepareOptions(columns=Columns(paths, **names), pair_pattern=compiled, **given)


if __name__ == "__main__":
    run_command(main)
