"""Atomic files: written under a temporary name, then renamed, so none is ever half written."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mics_fast.common.errors import InputError

STANDARD_OUTPUT = Path("-")
"""Stands for standard output where a command takes a file name."""


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be written: {error.strerror}") from None


@contextmanager
def open_regular(file: Path) -> Iterator[io.BufferedReader]:
    """Open an untrusted file for reading.

    Args:
        file: a regular file; devices, pipes and folders are refused unread.

    Raises:
        InputError: the file does not exist or is not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{str(file)!r} is no file name") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{file} is no regular file")
        with open(descriptor, "rb", closefd=False) as opened:
            yield opened
    finally:
        os.close(descriptor)


def read_small(file: Path, largest: int) -> str:
    """Read the text of an untrusted file.

    Args:
        file: as for ``open_regular``.
        largest: size limit in bytes.

    Raises:
        InputError: the file does not exist, is not a regular file, is too large or not UTF-8.
    """
    try:
        with open_regular(file) as opened:
            content = opened.read(largest + 1)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if content is None:  # one of the system's that waits for news, such as /proc/kmsg
        raise InputError(f"{file} is no regular file: it has nothing to read yet")
    if len(content) > largest:
        raise InputError(f"{file} holds more than {largest} bytes")
    try:
        return content.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8, wanted text in UTF-8") from None


def read_json(file: Path, largest: int = 2**20) -> Any:
    """Read the value in a small, untrusted JSON file.

    Raises:
        InputError: as ``read_small``, or the text is not JSON.
    """
    text = read_small(file, largest)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{file} is no JSON") from None


@contextmanager
def renamed(file: Path) -> Iterator[Path]:
    """Create an empty file, private to its owner, and rename it to ``file`` on success.

    The temporary name is random and keeps the suffix, so nobody can plant a link there. On any
    error the temporary file is removed. An OSError names ``file``, for ``run_command`` to report.
    """
    partial = file.with_name(f".partial-{secrets.token_hex(8)}{file.suffix}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        os.close(os.open(partial, flags, 0o600))
        yield partial
        partial.replace(file)
    except OSError as error:
        if str(error.filename or partial) == str(partial):  # not of another file in the body
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_file(file: Path) -> Iterator[TextIO]:
    """Open a text file for writing; it gets its name only when everything is written.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with renamed(file) as partial, open(partial, "w", newline="", encoding="utf-8") as handle:
            yield handle
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(file) as handle:
        handle.write(text)


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON; non-finite numbers become null.

    Raises:
        InputError: as ``write_text``.
    """
    write_text(file, json.dumps(finite(value), indent=1))


def write_csv(
    file: Path,
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    *,
    exact: bool = False,
) -> None:
    """Write records as a CSV file, readable by its owner only and safe to open in a spreadsheet.

    Args:
        file: CSV file.
        records: column -> cell; a missing cell is empty.
        columns: names in order; default: the keys of all records, in order of appearance.
        exact: keep control characters, for a table that is read again.

    Raises:
        InputError: as ``write_text``.
    """
    inert = inert_cell if exact else shown_cell
    names = columns or list(dict.fromkeys(name for record in records for name in record))
    with whole_file(file) as handle:
        make_private(handle.fileno())
        writer = csv.DictWriter(handle, names)
        writer.writerow({name: inert(name) for name in names})
        for record in records:
            writer.writerow({name: inert(cell) for name, cell in record.items()})


def make_private(file: Path | int) -> None:
    """Restrict a file (a path or a descriptor) to its owner: it may contain patient data."""
    if os.name == "posix":
        os.chmod(file, 0o600)


CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], "?")  # of Unicode, for str.translate
# Beginnings of a formula, with the blanks that a spreadsheet skips and the wide forms of East Asia.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def inert_cell(cell: Any) -> Any:
    """Make a cell inert: text that begins like a formula gets a leading apostrophe.

    ``restored_cell`` removes the apostrophe, so every text survives the round trip.

    Examples:
        >>> inert_cell("=1+1"), restored_cell("'=1+1"), inert_cell("polyp"), inert_cell(-1.5)
        ("'=1+1", '=1+1', 'polyp', -1.5)
    """
    return f"'{cell}" if isinstance(cell, str) and _like_a_formula(cell) else cell


def restored_cell(cell: str) -> str:
    """Return the original text of a cell that ``inert_cell`` wrote."""
    return cell[1:] if cell.startswith("'") and _like_a_formula(cell) else cell


def _like_a_formula(cell: str) -> bool:
    return cell.lstrip("'").startswith(_FORMULA)


def shown_cell(cell: Any) -> Any:
    """Make a cell of a table for people inert, and replace its control characters."""
    return inert_cell(cell.translate(CONTROLS) if isinstance(cell, str) else cell)


def printable(text: str) -> str:
    """Replace the control characters of a name by question marks, for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def finite(value: Any) -> Any:
    """Return the same nested value with None for every number that JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
