"""Sources of ``prepare``: class folders, folders per class and modality, or a table of paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from mics_fast.common.anonymity import pseudonym
from mics_fast.common.errors import InputError
from mics_fast.data.images import SUFFIXES
from mics_fast.data.manifest import RESERVED, SPLITS
from mics_fast.data.tables import read_table
from mics_fast.preparation.options import Columns, PrepareOptions

CONTACT_SHEET = "contact_sheet.png"
"""Name of the contact sheet beside the manifest."""

KNOWN_MODALITIES = ("wli", "nbi")
READ_SUFFIXES = SUFFIXES | {".dcm"}
_PATIENT = re.compile(r"patient|subject|person|case|lesion|polyp|study|exam|visit|mrn", re.I)
_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val",
                "testing": "test"}  # fmt: skip


@dataclass
class Candidate:
    """A sample that becomes a row of the manifest if its images can be used.

    Args:
        id: unique text; from folders or paths, the relative path without suffix.
        label: class name, "" = unknown.
        files: modality -> image; a missing modality has no entry.
        group: name of the group, "" = a group of its own.
        split: train, val or test if the source gives it, "" if it is drawn.
        virtual: modalities derived from another one.
    """

    id: str
    label: str
    files: dict[str, Path]
    group: str = ""
    split: str = ""
    virtual: list[str] = field(default_factory=list)


def read_folders(
    source: Path, out: Path, pattern: re.Pattern[str] | None
) -> tuple[list[Candidate], list[str]]:
    """Read the samples of ``<class>/`` folders, or of ``<class>_<MODALITY>/`` folders.

    Args:
        source: folder of folders.
        out: folder that ``prepare`` writes to, which may lie in the source.
        pattern: regular expression for the id that the files of one sample share (its first group
            if it has one); None: the whole stem.

    Returns:
        Samples sorted by id, including samples without a partner, and the modalities.

    Raises:
        InputError: the folder does not exist, has another layout, or cannot be used.
    """
    if not source.is_dir():
        raise InputError(f"source {source} is neither a folder nor a table (CSV, TSV)")
    folders = class_folders(source, out)
    found: dict[str, Candidate] = {}
    for (label, modality), folder in folders.items():
        for key, path in images_by_key(folder, pattern).items():
            name = f"{label}/{key}"
            found.setdefault(name, Candidate(name, label, {})).files[modality] = path
    modalities = in_order({modality for _, modality in folders})
    if len(modalities) > 1 and not any(len(one.files) > 1 for one in found.values()):
        same = "of the same name" if pattern is None else f"that share what {pattern.pattern} finds"
        kinds = " and ".join(map(str.upper, modalities))
        raise InputError(f"source {source} has no {kinds} image {same}")
    return [found[name] for name in sorted(found)], modalities


def class_folders(source: Path, out: Path) -> dict[tuple[str, str], Path]:
    """Map (class, modality) to its folder; in the one-modality layout every modality is wli.

    Raises:
        InputError: no folder, both layouts, a folder without images or without a partner.
    """
    written = {out.resolve(), *(out.resolve() / name for name in (*KNOWN_MODALITIES, "shards"))}
    folders = sorted(
        path
        for path in source.iterdir()
        if path.is_dir() and not path.name.startswith(".")
        if path.resolve() not in written or images_of(path)
    )
    if not folders:
        raise InputError(
            f"source {source} has no folder, wanted <class>/ or <class>_WLI/ and <class>_NBI/"
        )
    for folder in folders:
        if not images_of(folder):
            kinds = ", ".join(sorted(READ_SUFFIXES))
            raise InputError(f"{folder} holds no image, wanted files that end in {kinds}")
    paired = by_class_and_modality(source, folders)
    return paired or {(folder.name.strip(), KNOWN_MODALITIES[0]): folder for folder in folders}


def by_class_and_modality(source: Path, folders: Sequence[Path]) -> dict[tuple[str, str], Path]:
    """Return the folders of the layout ``<class>_<MODALITY>``; empty for the other layout.

    ``_WLI`` and ``_NBI`` may be written in any case. Other modalities are recognised if every
    folder's name ends in capitals and every class has the same two or more of them.

    Raises:
        InputError: folders of both layouts, duplicates, or a folder without a partner.
    """
    split = {path: path.name.rpartition("_") for path in folders}
    known = [
        path for path, (own, _, end) in split.items() if own and end.lower() in KNOWN_MODALITIES
    ]
    named = [
        path for path, (own, _, end) in split.items() if own and (path in known or end.isupper())
    ]
    found: dict[tuple[str, str], Path] = {}
    for path in named:
        label, _, end = split[path]
        other = found.setdefault((label.strip(), end.lower()), path)
        if other is not path:
            raise InputError(f"source {source} holds {other.name} and {path.name}, wanted one")
    modalities = in_order({modality for _, modality in found})
    wanted = modalities if len(modalities) > 1 else KNOWN_MODALITIES
    missing = [
        (path, f"{label}_{needed.upper()}")
        for (label, _), path in sorted(found.items())
        for needed in wanted
        if (label, needed) not in found
    ]
    if not known:
        complete = len(named) == len(folders) and len(modalities) > 1 and not missing
        return found if complete else {}
    alone = [path for path in folders if path not in named]
    if alone:
        raise InputError(
            f"source {source} holds {named[0].name} and {alone[0].name}, wanted pairs of folders "
            "or single folders, not both"
        )
    for path, needed in missing:
        raise InputError(f"{path} has no partner, wanted {needed} beside it")
    return found


def in_order(modalities: set[str]) -> list[str]:
    """Sort the modalities, wli and nbi first."""
    return sorted(modalities, key=lambda name: (name not in KNOWN_MODALITIES, name == "nbi", name))


def images_of(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted by name, without the contact sheet."""
    return [path for path in _files_of(folder) if path.suffix.lower() in READ_SUFFIXES]


def unknown_files(source: Path) -> list[Path]:
    """Return the files in the folders of a source whose suffix is not recognised."""
    folders = (
        [path for path in sorted(source.iterdir()) if path.is_dir()] if source.is_dir() else []
    )
    return [
        path
        for folder in folders
        if not folder.name.startswith(".")
        for path in _files_of(folder)
        if path.suffix.lower() not in READ_SUFFIXES and not path.is_dir()
    ]


def _files_of(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name != CONTACT_SHEET
    )


def images_by_key(folder: Path, pattern: re.Pattern[str] | None) -> dict[str, Path]:
    """Map the id that the images of a sample share to the image in this folder.

    Raises:
        InputError: the pattern does not match a name, or two images have the same id.
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


def read_list(file: Path, columns: Columns) -> list[Candidate]:
    """Read the samples of a table whose columns hold paths, relative to its folder.

    Without an id column, the id of a row is the path of its first image without image suffix.

    Args:
        file: CSV or TSV with a header.
        columns: names of the columns; an empty path cell is a missing image.

    Raises:
        InputError: names file and line; the file is unreadable, a column is missing, a row has no
            image, an id is repeated, or a split is not known.
    """
    table = read_table(file, str(file))
    for column in columns.all():
        if column not in table.columns:
            raise InputError(f"{file} has no column {column!r}, {table.found}")
    found: dict[str, Candidate] = {}
    for line, cells in table.lines:
        where = f"{file}, line {line}"
        paths = {name: cells[own] for name, own in columns.paths.items() if cells[own]}
        if not paths:
            raise InputError(f"{where}: no path in {', '.join(columns.paths.values())}")
        first = next(iter(paths.values()))
        name = cells[columns.id] if columns.id else name_of(first)
        if not name or name in found:
            what = f"image {first} has" if columns.id is None else f"column {columns.id} holds"
            raise InputError(f"{where}: {what} the id of another, {name!r}" if name else
                             f"{where}: the id is empty")  # fmt: skip
        found[name] = Candidate(
            name,
            cells[columns.label] if columns.label else "",
            {modality: file.parent / path for modality, path in paths.items()},
            cells[columns.group] if columns.group else "",
            split_of(cells[columns.split], where) if columns.split else "",
        )
    if not found:
        raise InputError(f"{file} has no row")
    return list(found.values())


def group_hints(options: PrepareOptions) -> list[str]:
    """Ask for groups if an unused column of a table seems to name patients or lesions.

    Such a column has a telling name, and values that several rows share.
    """
    if not options.columns.paths or options.columns.group:
        return []
    table = read_table(Path(options.source), options.source)
    hints = []
    for column in table.columns:
        values = [cells[column] for _, cells in table.lines if cells[column]]
        if column in options.columns.all() or not _PATIENT.search(column):
            continue
        if 1 < len(set(values)) < len(values):
            hints.append(
                f"column {column} seems to name patients or lesions ({len(set(values))} in "
                f"{len(values)} rows): --group-column {column} keeps the rows of each in one "
                "split; without it, the test rows may show patients of the train rows"
            )
    return hints


def name_of(path: str) -> str:
    """Return the id of a path: without image suffix, root and upward steps."""
    first = PurePosixPath(path)
    if first.suffix.lower() in READ_SUFFIXES:  # the end of 1.2.840.1 is no suffix
        first = first.with_suffix("")
    return "/".join(part for part in first.parts if part not in ("/", ".."))


def split_of(cell: str, where: str) -> str:
    """Return the split for a cell, which may use another common name such as "Training".

    Raises:
        InputError: the name is not known.
    """
    name = _SPLIT_NAMES.get(cell.lower(), cell.lower())
    if name not in SPLITS:
        raise InputError(f"{where}: split is {cell!r}, wanted one of {', '.join(SPLITS)}")
    return name


def anonymised(candidates: Sequence[Candidate], key: bytes) -> list[Candidate]:
    """Replace the ids and group names of samples by pseudonyms."""
    return [
        replace(one, id=pseudonym(key, one.id), group=one.group and pseudonym(key, one.group))
        for one in candidates
    ]


def read_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """Read modality -> column from texts such as ``wli=file``.

    Raises:
        InputError: malformed text, a repeated modality, or a reserved name.
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
