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
_BLOCK = 1 << 18  # bytes that are read at once
_BATCH = 256  # rows; more leave the caches of a CPU core
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

Cells = TypeVar("Cells")


class RefusedTable(Exception):
    """A table that breaks a rule; reading its ``lines`` says which, and where."""


@dataclass(frozen=True)
class Table(Generic[Cells]):
    """A table with a header.

    Args:
        separator: its name in words.
        columns: names from the header.
        lines: line number and cells of each row, stripped; every row has a cell for every column.
        batches: the same cells without line numbers, several times as fast: for some rows at a
            time, a list per column. Of an open table either lines or batches can be read.
    """

    separator: str
    columns: tuple[str, ...]
    lines: Iterable[tuple[int, Cells]]
    batches: Iterable[list[list[str]]] = ()

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
    """Open a table whose rows are read one by one, or in batches; its separator is the most
    frequent candidate in the header.

    Args:
        file, what: as ``read_table``.
        largest: size limit in bytes.

    Raises:
        InputError: the file cannot be read, or has no valid header. Its lines raise it if the file
            is not a table, or has a line whose number of cells differs from the header; its
            batches raise RefusedTable instead.
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
        yield Table(
            _SEPARATORS[separator],
            _checked(columns, what),
            _even(rows, columns, what),
            _batches(opened, separator, len(columns)),
        )


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


# Many rows at a time: the loops over lines and cells are those of Python's own C code


def _batches(opened: io.BufferedReader, separator: str, width: int) -> Iterator[list[list[str]]]:
    """Yield the stripped cells of the rows below the header, some rows at a time, by column.

    Raises:
        RefusedTable: ``_lines``, ``_rows`` or ``_even`` would raise InputError.
    """
    try:
        opened.seek(0)
        lines = itertools.chain.from_iterable(_blocks(opened))
        rows = filter(None, csv.reader(lines, delimiter=separator, strict=True))
        next(rows, None)  # the header
        while batch := list(itertools.islice(rows, _BATCH)):
            if set(map(len, batch)) != {width}:
                raise RefusedTable
            yield [list(map(str.strip, cells)) for cells in zip(*batch, strict=True)]
    except (csv.Error, OSError, UnicodeDecodeError):
        raise RefusedTable from None


def _blocks(opened: io.BufferedReader) -> Iterator[io.StringIO]:
    """Yield the text of a file in blocks of whole lines.

    Raises:
        OSError, UnicodeDecodeError: as they do.
        RefusedTable: a line that ``_lines`` refuses.
    """
    rest, encoding = b"", "utf-8-sig"
    while read := opened.read(_BLOCK):
        block = rest + read
        end = block.rfind(b"\n") + 1 or block.rfind(b"\r") + 1
        rest = block[end:]
        if len(rest) > 4 * _LONGEST:  # a character has at most four bytes
            raise RefusedTable
        if end:
            yield _plain(block[:end].decode(encoding))
            encoding = "utf-8"
    yield _plain(rest.decode(encoding))


def _plain(text: str) -> io.StringIO:
    """Return a text as its lines; refuse what ``_lines`` refuses."""
    lines = io.StringIO(text, newline="")
    if "\0" in text or (len(text) >= _LONGEST and max(map(len, lines)) >= _LONGEST):
        raise RefusedTable
    lines.seek(0)
    return lines
