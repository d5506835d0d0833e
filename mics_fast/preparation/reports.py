"""What ``prepare`` tells a person: how many rows there are of what, and what to look at."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mics_fast.common.files import whole_file
from mics_fast.data.manifest import SPLITS
from mics_fast.preparation.leaks import NearDuplicate

_SHOWN = 10  # lines of a list on the screen; its file holds all of them

Rejected = tuple[str, Path, str]
"""Id of the sample, file, and why it is left out."""


def print_summary(records: Sequence[Mapping[str, str]], modalities: Sequence[str]) -> None:
    """Classes x splits, with the images of each modality where rows miss some; labelled rows."""

    def cell(rows: Sequence[Mapping[str, str]]) -> str:
        images = {name: sum(bool(record[name]) for record in rows) for name in modalities}
        if all(count == len(rows) for count in images.values()):
            return str(len(rows))
        return f"{len(rows)} ({', '.join(f'{n.upper()} {count}' for n, count in images.items())})"

    table = Table(title=f"{len(records)} samples")
    for name in ("class", *SPLITS, "labelled"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for label in sorted({record["label"] for record in records}):
        mine = [record for record in records if record["label"] == label]
        parts = [[record for record in mine if record["split"] == split] for split in SPLITS]
        labelled = sum(record["labelled"] == "1" for record in mine)
        table.add_row(label or "(no label)", *map(cell, parts), str(labelled))
    Console().print(table)
    virtual = {name for record in records for name in record["virtual"].split()}
    shown = [
        f"{'virtual ' if name in virtual else ''}{name.upper()} "
        f"{sum(bool(record[name]) for record in records)}"
        for name in modalities
    ]
    print(f"modalities: {', '.join(shown)}")


def report_rejected(broken: Sequence[Rejected], orphans: Sequence[Rejected], path: Path) -> None:
    """List what is left out: broken images, and images without a partner."""
    write_list(path, ("id", "file", "reason"), [*broken, *orphans])
    for title, lines in (
        (f"rejected, see {path.name}", [reason for _, _, reason in broken]),
        ("left out, without a partner of the same name", [str(file) for _, file, _ in orphans]),
    ):
        if lines:
            print(f"{title}: {len(lines)} images")
            print("\n".join(f"  {line}" for line in lines[:_SHOWN]))


def report_leaks(
    alike: Sequence[NearDuplicate], records: Sequence[Mapping[str, str]], path: Path
) -> None:
    """List the near-duplicates that lie on two sides of the split."""
    leaks = [
        (a["id"], a["split"], b["id"], b["split"], pair.modality, pair.distance)
        for pair in alike
        for a, b in [(records[pair.first], records[pair.second])]
        if a["split"] != b["split"]
    ]
    header = ("id", "split", "other_id", "other_split", "modality", "different_bits")
    write_list(path, header, leaks)
    if leaks:
        print(f"near-duplicates on two sides of the split, see {path.name}: {len(leaks)} pairs")
        for one, own, other, its, modality, _ in leaks[:_SHOWN]:
            print(f"  {one} ({own}) and {other} ({its}), {modality.upper()}")
        print("  --group-near-duplicates keeps them on one side")


def write_list(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Write a CSV file; no lines leave no file, not even that of an earlier run.

    Raises:
        InputError: the file cannot be written.
    """
    if not lines:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as file:
        csv.writer(file).writerows([header, *lines])
