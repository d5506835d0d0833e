"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mics_fast.common.errors import InputError


def make_folder(folder: Path) -> None:
    """Make a folder, and those it lies in, where they are not there yet.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be written: {error.strerror}") from None


@contextmanager
def renamed(file: Path) -> Iterator[Path]:
    """A temporary name, with the file's suffix; what is written under it gets the file's name when
    all is written and is removed otherwise."""
    partial = file.with_name(f".partial-{file.name}")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_file(file: Path) -> Iterator[TextIO]:
    """A text file to write to, which gets its name when all is written and none otherwise.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with renamed(file) as partial, open(partial, "w", newline="", encoding="utf-8") as handle:
            yield handle
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def write_text(file: Path, text: str) -> None:
    """Write a text file, or nothing at all.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(file) as handle:
        handle.write(text)


def write_json(file: Path, value: Any) -> None:
    """Write JSON; a number that is not finite becomes null.

    Raises:
        InputError: as ``write_text``.
    """
    write_text(file, json.dumps(finite(value), indent=1))


def write_csv(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as a table; the columns are the keys of all records, in order of appearance.

    Raises:
        InputError: as ``write_text``.
    """
    columns = list(dict.fromkeys(name for record in records for name in record))
    with whole_file(file) as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(records)


def finite(value: Any) -> Any:
    """The same nested value with None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
