"""What ``prepare`` is given: class folders, pairs of class folders, or a table of paths."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mics_fast.common.errors import InputError
from mics_fast.data.images import SUFFIXES
from mics_fast.data.manifest import RESERVED

CONTACT_SHEET = "contact_sheet.png"
"""Name of the picture that ``prepare`` leaves beside the manifest."""


@dataclass
class Sample:
    """One row of the manifest to be.

    Args:
        id: unique text, a relative path without suffix.
        label: class name, "" = unknown.
        files: modality -> image; a missing modality has no entry.
        group: name of the group, "" = a group of its own.
        virtual: modalities that are derived from another.
    """

    id: str
    label: str
    files: dict[str, Path]
    group: str = ""
    virtual: list[str] = field(default_factory=list)


def read_folders(source: Path, out: Path, pattern: re.Pattern[str] | None) -> list[Sample]:
    """The samples of ``<class>/`` folders, or of ``<class>_WLI/`` and ``<class>_NBI/`` pairs.

    Args:
        source: folder of folders.
        out: folder that ``prepare`` writes to, which may lie in the source.
        pattern: finds the id that the file names of a pair share, its first group if it has one;
            None: the whole stem.

    Returns:
        Samples in the order of their ids; one without a partner has a single file.

    Raises:
        InputError: no such folder, a layout that is neither, or a folder that cannot be used.
    """
    if not source.is_dir():
        raise InputError(f"source {source} is neither a folder nor a CSV file")
    paired, single = class_folders(source, out)
    samples: dict[str, Sample] = {}
    for folder in paired or single:
        label, modality = folder.name, "wli"
        if paired:
            label, modality = folder.name[:-4], folder.name[-3:].lower()
        for key, path in images_by_key(folder, pattern).items():
            name = f"{label}/{key}"
            samples.setdefault(name, Sample(name, label, {})).files[modality] = path
    if paired and not any(len(sample.files) == 2 for sample in samples.values()):
        same = "of the same name" if pattern is None else f"that share what {pattern.pattern} finds"
        raise InputError(f"source {source} has no WLI and NBI image {same}")
    return [samples[name] for name in sorted(samples)]


def class_folders(source: Path, out: Path) -> tuple[list[Path], list[Path]]:
    """The folders of a source: those of the pair layout, or those of the one-modality layout.

    Raises:
        InputError: there is none, there are both, one holds no image, or one has no partner.
    """
    written = {out.resolve(), *(out.resolve() / name for name in ("wli", "nbi", "shards"))}
    folders = sorted(
        path
        for path in source.iterdir()
        if path.is_dir() and not path.name.startswith(".")
        if path.resolve() not in written or images_of(path)
    )
    paired = [path for path in folders if path.name.endswith(("_WLI", "_NBI"))]
    single = [path for path in folders if path not in paired]
    if not folders:
        raise InputError(
            f"source {source} has no folder, wanted <class>/ or <class>_WLI/ and <class>_NBI/"
        )
    if paired and single:
        raise InputError(
            f"source {source} holds {paired[0].name} and {single[0].name}, wanted pairs of folders "
            "or single folders, not both"
        )
    for folder in folders:
        if not images_of(folder):
            kinds = ", ".join(sorted(SUFFIXES))
            raise InputError(f"{folder} holds no image, wanted files that end in {kinds}")
    for folder in paired:
        other = folder.name[:-3] + ("NBI" if folder.name.endswith("WLI") else "WLI")
        if not (source / other).is_dir():
            raise InputError(f"{folder} has no partner, wanted {other} beside it")
    return paired, single


def images_of(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name; what ``prepare`` drew itself is none of them."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        if path.name != CONTACT_SHEET
    )


def images_by_key(folder: Path, pattern: re.Pattern[str] | None) -> dict[str, Path]:
    """The images of a folder by what names their pair.

    Raises:
        InputError: the pattern finds nothing in a name, or two images have one key.
    """
    files = images_of(folder)
    keys = [path.stem for path in files]
    if pattern is not None:
        found = [pattern.search(path.stem) for path in files]
        for path, match in zip(files, found, strict=True):
            if match is None or not match[min(1, pattern.groups)]:
                raise InputError(f"--pair-pattern {pattern.pattern} finds no id in {path}")
        keys = [match[min(1, pattern.groups)] for match in found if match is not None]
    for key, count in Counter(keys).items():
        if count > 1:
            raise InputError(f"{folder} holds {count} images named {key}, wanted one")
    return dict(zip(keys, files, strict=True))


def read_table(
    file: Path, columns: Mapping[str, str], label_column: str | None, group_column: str | None
) -> list[Sample]:
    """The samples of a CSV file whose columns hold paths, relative to its folder.

    The id of a row is the path of its first image without suffix.

    Args:
        file: CSV with a header.
        columns: modality -> its column; an empty cell is a missing image.
        label_column: holds class names; None: no labels.
        group_column: holds what rows of one group share; None: no groups.

    Raises:
        InputError: unreadable, no such column, a row without an image, or two rows of one id.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = list(reader.fieldnames or ())
            records = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{file} cannot be read as a table: {why}") from None
    wanted = [*columns.values(), *filter(None, (label_column, group_column))]
    for column in wanted:
        if column not in header:
            raise InputError(f"{file} has no column {column!r}, only {', '.join(header)}")
    samples: dict[str, Sample] = {}
    for line, record in enumerate(records, start=2):
        cells = {column: (record[column] or "").strip() for column in wanted}
        files = {name: file.parent / cells[own] for name, own in columns.items() if cells[own]}
        if not files:
            raise InputError(f"{file}, line {line}: no path in {', '.join(columns.values())}")
        first = PurePosixPath(cells[columns[next(iter(files))]])
        name = "/".join(part for part in first.with_suffix("").parts if part not in ("/", ".."))
        if name in samples:
            raise InputError(f"{file}, line {line}: image {first} has the id of another, {name!r}")
        label = cells[label_column] if label_column else ""
        group = cells[group_column] if group_column else ""
        samples[name] = Sample(name, label, files, group)
    if not samples:
        raise InputError(f"{file} has no row")
    return list(samples.values())


def read_columns(assignments: Sequence[str]) -> dict[str, str]:
    """Modality -> column from texts such as ``wli=file``.

    Raises:
        InputError: another form, a modality given twice, or a reserved name.
    """
    columns: dict[str, str] = {}
    for text in assignments:
        modality, equals, column = text.partition("=")
        if not (modality and equals and column) or modality in columns or modality in RESERVED:
            raise InputError(
                f"--column is {text!r}, wanted MODALITY=COLUMN, each modality once and none named "
                f"{', '.join(RESERVED)}"
            )
        columns[modality] = column
    return columns
