"""The steps of ``prepare``: find the images, check them, split the rows, write and report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from mics_fast.common.anonymity import read_key
from mics_fast.common.errors import InputError, wrapped
from mics_fast.common.files import printable
from mics_fast.preparation.inspection import (
    hold_out,
    in_threads,
    inspect,
    keep_complete,
    make_phantom,
)
from mics_fast.preparation.options import PHANTOM, PrepareOptions
from mics_fast.preparation.overlays import overlay_warnings
from mics_fast.preparation.reports import (
    Rejected,
    print_leaks,
    print_rejected,
    print_summary,
    without_paths,
    write_rejected,
)
from mics_fast.preparation.rows import NEAR_DUPLICATES, write_held_out, write_rows
from mics_fast.preparation.sources import (
    READ_SUFFIXES,
    Candidate,
    anonymised,
    group_hints,
    read_folders,
    read_list,
    unknown_files,
)

REJECTED = "rejected.csv"


def prepare(options: PrepareOptions) -> Callable[[], None]:
    """Write the manifest and everything beside it.

    Returns:
        A function that prints the report. It runs last, so a closed terminal loses no manifest.

    Raises:
        InputError: the source or the options cannot be used, or no sample is usable.
    """
    out = options.out
    unknown: list[Rejected] = []
    if options.source == PHANTOM:
        found, modalities = make_phantom(out, options.pairs, options.seed), ["wli", "nbi"]
    else:
        candidates, modalities, unknown = find_candidates(options)
        if options.anonymise:
            candidates = anonymised(candidates, read_key(options.anonymise))
        found = in_threads(lambda one: inspect(one, options), candidates, "checking")
    kept, broken, orphans = keep_complete(found, modalities, options.keep_orphans)
    rejected = [*broken, *orphans, *unknown]
    write_rejected(out / REJECTED, without_paths(rejected) if options.anonymise else rejected)
    if not kept:
        raise InputError(
            f"source {options.source} has no usable sample, wanted one with all of its images; "
            f"{out / REJECTED} says what is wrong"
        )
    kept, apart = hold_out(kept, options.hold_out)
    written = write_rows(kept, modalities, options)
    held_out = [write_held_out(apart, modalities, out)] if apart else []
    dark = [path for one in found for path in one.dark]
    drawn = overlay_warnings(
        [(f"{one.sample.id}, {name.upper()}", own)
         for one in kept for name, own in one.overlays.items()]
    )  # fmt: skip

    def report() -> None:
        print_rejected(broken, orphans, unknown, REJECTED)
        if dark:
            print(
                f"{len(dark)} images of 16 bits use less than a quarter of their range and are "
                f"read as nearly black, such as {printable(str(dark[0]))}: is it 10- or 12-bit "
                "data, which should be scaled first?"
            )
        print_summary(written.records, modalities)
        print_leaks(written.alike, written.pairs, written.records, NEAR_DUPLICATES)
        for warning in (*written.warnings, *drawn, *group_hints(options)):
            print(wrapped(f"warning: {printable(warning)}", sys.stdout))
        for path in written.kept:
            print(f"{path.with_suffix('')} existed with other content: it is now {path}")
        for path in (*written.files, *held_out):
            print(f"wrote {path}")

    return report


def find_candidates(
    options: PrepareOptions,
) -> tuple[list[Candidate], list[str], list[Rejected]]:
    """Find the samples of a table or of folders without opening any image.

    Returns:
        The samples, complete or not; their modalities; the files with an unknown suffix.
    """
    source = Path(options.source)
    unknown: list[Rejected] = []
    if options.columns.paths:
        candidates = read_list(source, options.columns)
        modalities = list(options.columns.paths)
    else:
        candidates, modalities = read_folders(source, options.out, options.pair_pattern)
        reason = f"its suffix is none of {', '.join(sorted(READ_SUFFIXES))}"
        unknown = [Rejected("", path, reason) for path in unknown_files(source)]
    if options.virtual_nbi:
        if modalities != ["wli"]:
            raise InputError(
                f"--virtual-nbi is for WLI frames alone, but {options.source} has "
                f"{', '.join(modalities).upper()}"
            )
        modalities = ["wli", "nbi"]
    return candidates, modalities, unknown
