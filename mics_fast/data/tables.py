"""Tables of text: comma, semicolon or tab, UTF-8; every error names the file and the line."""

from __future__ import annotations

import csv
import io
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TextIO, TypeVar

from mics_fast.common.errors import InputError
from mics_fast.common.files import open_regular

_LARGEST = 1 << 28  # bytes of a table that is read into memory
_LONGEST = 1 << 20  # characters of a line
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

Cells = TypeVar("Cells")


@dataclass(frozen=True)
class Table(Generic[Cells]):
    """A table with a header.

    Args:
        separator: its name in words.
        columns: names from the header.
        lines: line number and cells of each row, stripped; every row has a cell for every column.
    """

    separator: str
    columns: tuple[str, ...]
    lines: Iterable[tuple[int, Cells]]

    @property
    def found(self) -> str:
        """Describe the columns and how they were read, for an error about a missing one."""
        return f"only {', '.join(self.columns)} (read as UTF-8, separated by {self.separator})"


def read_table(file: Path, what: str) -> Table[dict[str, str]]:
    """Read a table into memory, each row as column -> cell.

    Args:
        file: CSV or TSV of at most 256 MiB.
        what: name of the table in error messages, such as "manifest x.csv".

    Raises:
        InputError: as ``open_table``, and as its lines.
    """
    with open_table(file, what, _LARGEST) as table:
        columns = table.columns
        lines = [(line, dict(zip(columns, cells, strict=True))) for line, cells in table.lines]
    return Table(table.separator, columns, lines)


@contextmanager
def open_table(file: Path, what: str, largest: int) -> Iterator[Table[list[str]]]:
    """Open a table whose lines are read one by one; its separator is the most frequent candidate
    in the header.

    Args:
        file, what: as ``read_table``.
        largest: size limit in bytes.

    Raises:
        InputError: the file cannot be read, or has no valid header. Its lines raise it if the file
            is not a table, or has a line whose number of cells differs from the header.
    """
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_regular(file))
        except InputError as error:
            problem = str(error).removeprefix(f"{file} ").removeprefix("cannot be read: ")
            raise InputError(f"{what} cannot be read: {problem}") from None
        if os.fstat(opened.fileno()).st_size > largest:
            raise InputError(f"{what} cannot be read: holds more than {largest} bytes")
        # Spreadsheets put a byte order mark in front.
        lines = _lines(io.TextIOWrapper(opened, encoding="utf-8-sig", newline=""), what)
        header = next(lines, "")
        separator = max(_SEPARATORS, key=header.count)
        rows = _rows(itertools.chain([header], lines), separator, what)
        _, columns = next(rows, (0, []))
        yield Table(_SEPARATORS[separator], _checked(columns, what), _even(rows, columns, what))


def _lines(text: TextIO, what: str) -> Iterator[str]:
    """Yield the lines of a text."""
    for number in itertools.count(1):
        try:
            line = text.readline(_LONGEST)
        except UnicodeDecodeError:
            problem = "is not UTF-8, wanted text in UTF-8"
            raise InputError(f"{what} cannot be read: {problem}") from None
        except OSError as error:
            raise InputError(f"{what} cannot be read: {error.strerror}") from None
        if "\0" in line:
            raise InputError(f"{what} cannot be read: it holds a NUL character, wanted text")
        if len(line) == _LONGEST:
            problem = f"a table of lines shorter than {_LONGEST} characters"
            raise InputError(f"{what}, line {number}: no end of the line, wanted {problem}")
        if not line:
            return
        yield line


def _rows(lines: Iterable[str], separator: str, what: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line and the stripped cells of each row that is not empty."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise InputError(f"{what}, line {reader.line_num}: no CSV: {error}") from None


def _even(
    rows: Iterable[tuple[int, list[str]]], columns: list[str], what: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield rows, and refuse one that has not one cell per column."""
    for line, cells in rows:
        if len(cells) != len(columns):
            raise InputError(
                f"{what}, line {line}: another number of cells than the header, "
                f"{len(cells)} instead of {len(columns)}"
            )
        yield line, cells


def _checked(columns: list[str], what: str) -> tuple[str, ...]:
    for column in columns:
        if not column or columns.count(column) > 1:
            problem = f"{column} twice" if column else "without a name"
            raise InputError(f"{what} has a column {problem}, wanted each name once")
        if any(unicodedata.category(own) == "Cc" for own in column):
            raise InputError(f"{what} has a column {column!r}, wanted no control characters")
    return tuple(columns)
