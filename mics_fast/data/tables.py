"""Tables of text: comma, semicolon or tab, UTF-8; every error names the file and the line."""

from __future__ import annotations

import csv
import io
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from mics_fast.common.errors import InputError
from mics_fast.common.files import read_small

_LARGEST = 1 << 28  # bytes
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Table:
    """A table with a header.

    Args:
        separator: its name in words.
        columns: names from the header.
        lines: line number and cells of each row, stripped; every row has a cell for every column.
    """

    separator: str
    columns: tuple[str, ...]
    lines: list[tuple[int, dict[str, str]]]

    @property
    def found(self) -> str:
        """Describe the columns and how they were read, for an error about a missing one."""
        return f"only {', '.join(self.columns)} (read as UTF-8, separated by {self.separator})"


def read_table(file: Path, what: str) -> Table:
    """Read a table; the separator is the most frequent candidate in the header.

    Args:
        file: CSV or TSV.
        what: name of the table in error messages, such as "manifest x.csv".

    Raises:
        InputError: the file cannot be read, is not a table, or has a line whose number of cells
            differs from the header.
    """
    text = _text_of(file, what)
    header = text[: text.find("\n")] if "\n" in text else text
    separator = max(_SEPARATORS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines = []
    columns: tuple[str, ...] | None = None
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if not cells:
                continue
            if columns is None:
                columns = _checked(stripped, what)
            elif len(cells) != len(columns):
                raise InputError(
                    f"{what}, line {reader.line_num}: another number of cells than the header, "
                    f"{len(cells)} instead of {len(columns)}"
                )
            else:
                lines.append((reader.line_num, dict(zip(columns, stripped, strict=True))))
    except csv.Error as error:
        raise InputError(f"{what}, line {reader.line_num}: no CSV: {error}") from None
    return Table(_SEPARATORS[separator], columns or (), lines)


def _checked(columns: list[str], what: str) -> tuple[str, ...]:
    for column in columns:
        if not column or columns.count(column) > 1:
            problem = f"{column} twice" if column else "without a name"
            raise InputError(f"{what} has a column {problem}, wanted each name once")
        if any(unicodedata.category(own) == "Cc" for own in column):
            raise InputError(f"{what} has a column {column!r}, wanted no control characters")
    return tuple(columns)


def _text_of(file: Path, what: str) -> str:
    try:
        text = read_small(file, _LARGEST)
    except InputError as error:
        problem = str(error).removeprefix(f"{file} ").removeprefix("cannot be read: ")
        raise InputError(f"{what} cannot be read: {problem}") from None
    if "\0" in text:
        raise InputError(f"{what} cannot be read: it holds a NUL character, wanted text")
    return text
