"""Reports of ``prepare``: counts of rows, rejected files, near-duplicates across splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mics_fast.common.files import printable, write_csv
from mics_fast.data.manifest import SPLITS
from mics_fast.preparation.leaks import NearDuplicate

_SHOWN = 10  # lines of a list on the screen; the file holds the whole list


class Rejected(NamedTuple):
    """A file that is used in no row.

    Args:
        id: of its sample, "" if it belongs to none.
        file: path.
        reason: a sentence.
    """

    id: str
    file: Path
    reason: str


def print_summary(records: Sequence[Mapping[str, str]], modalities: Sequence[str]) -> None:
    """Print the rows per class and split, with images per modality if rows lack some."""

    def cell(rows: Sequence[Mapping[str, str]]) -> str:
        images = {name: sum(bool(record[name]) for record in rows) for name in modalities}
        if all(count == len(rows) for count in images.values()):
            return str(len(rows))
        return f"{len(rows)} ({', '.join(f'{n.upper()} {count}' for n, count in images.items())})"

    table = Table(title=f"{len(records)} samples")
    for name in ("class", *SPLITS, "labelled"):
        justify: Literal["left", "right"] = "left" if name == "class" else "right"
        table.add_column(name, justify=justify, overflow="fold")  # no name is cut short
    for label in sorted({record["label"] for record in records}):
        mine = [record for record in records if record["label"] == label]
        parts = [[record for record in mine if record["split"] == split] for split in SPLITS]
        labelled = sum(record["labelled"] == "1" for record in mine)
        # As Text, because names may contain characters that rich reads as markup.
        cells = (label or "(no label)", *map(cell, parts), str(labelled))
        table.add_row(*(Text(printable(own)) for own in cells))
    Console().print(table)
    virtual = {name for record in records for name in record["virtual"].split()}
    shown = [
        f"{'virtual ' if name in virtual else ''}{name.upper()} "
        f"{sum(bool(record[name]) for record in records)}"
        for name in modalities
    ]
    print(printable(f"modalities: {', '.join(shown)}"))


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Write the list of rejected files with their reasons."""
    write_list(path, ("id", "file", "reason"), rejected)


def without_paths(rejected: Sequence[Rejected]) -> list[Rejected]:
    """Reduce the files to their suffixes and remove their names from the reasons."""
    return [
        Rejected(one.id, Path(f"*{one.file.suffix}"), one.reason.replace(str(one.file), "it"))
        for one in rejected
    ]


def print_rejected(
    broken: Sequence[Rejected], orphans: Sequence[Rejected], unknown: Sequence[Rejected], file: str
) -> None:
    """Print the first rejected files, and the suffixes of the unknown ones."""
    for title, lines in (
        (f"rejected, see {file}", [one.reason for one in broken]),
        ("left out, without a partner of the same name", [str(one.file) for one in orphans]),
    ):
        if lines:
            print(f"{title}: {counted(len(lines), 'image')}")
            print("\n".join(f"  {printable(line)}" for line in lines[:_SHOWN]))
    if unknown:
        suffixes = Counter(one.file.suffix.lower() or "no suffix" for one in unknown)
        shown = ", ".join(f"{printable(name)} {n}" for name, n in suffixes.most_common(_SHOWN))
        print(
            f"not read, of an unknown suffix, see {file}: {counted(len(unknown), 'file')} ({shown})"
        )


def counted(number: int, what: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {what}{'s' * (number != 1)}"


def write_leaks(
    path: Path, alike: Sequence[NearDuplicate], records: Sequence[Mapping[str, str]]
) -> None:
    """Write the list of near-duplicates that lie in two splits."""
    header = ("id", "split", "other_id", "other_split", "modality", "different_bits")
    lines = [
        (a["id"], a["split"], b["id"], b["split"], pair.modality, pair.distance)
        for pair in alike
        for a, b in [(records[pair.first], records[pair.second])]
    ]
    write_list(path, header, lines)


def print_leaks(
    alike: Sequence[NearDuplicate], count: int, records: Sequence[Mapping[str, str]], file: str
) -> None:
    """Print the number of near-duplicates across splits, and the first of them."""
    if not count:
        return
    listed = "" if count == len(alike) else f", the closest {len(alike)} of them"
    print(
        f"near-duplicates on two sides of the split, see {file}{listed}: {counted(count, 'pair')}"
    )
    for pair in alike[:_SHOWN]:
        a, b = records[pair.first], records[pair.second]
        names = f"{a['id']} ({a['split']}) and {b['id']} ({b['split']})"
        print(printable(f"  {names}, {pair.modality.upper()}"))
    print("  --group-near-duplicates keeps them on one side")


def write_list(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Write a CSV file; without lines, remove the file of an earlier run instead.

    Raises:
        InputError: the file cannot be written.
    """
    if not lines:
        path.unlink(missing_ok=True)
        return
    texts = [[cell if isinstance(cell, int) else str(cell) for cell in line] for line in lines]
    write_csv(path, [dict(zip(header, line, strict=True)) for line in texts], header)
