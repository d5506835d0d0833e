"""Writers of answers: a JSON list, JSON lines or a CSV file, and a table on the terminal."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich import box
from rich.table import Table

from mics_fast.common.files import STANDARD_OUTPUT, printable, shown_cell, whole_file
from mics_fast.evaluation.answers import Answer, Failure, Stated, flat
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.tables import rule_text, wide_console
from mics_fast.inference.loaded_classifier import LoadedClassifier

ROWS_SHOWN = 20

Record = Answer | Failure
Write = Callable[[Record], None]


@contextmanager
def text_output(file: Path) -> Iterator[TextIO]:
    """Open a file that is renamed when complete, or standard output for "-"."""
    if file == STANDARD_OUTPUT:
        yield sys.stdout
        return
    with whole_file(file) as handle:
        yield handle


@contextmanager
def json_list(file: Path) -> Iterator[Write]:
    """Write all records as one JSON list."""
    with text_output(file) as handle:
        separator = "["

        def write(record: Record) -> None:
            nonlocal separator
            handle.write(f"{separator}\n{json.dumps(record)}")
            separator = ","

        yield write
        handle.write("[]\n" if separator == "[" else "\n]\n")


@contextmanager
def json_lines(file: Path) -> Iterator[Write]:
    """Write one JSON object per line."""
    with text_output(file) as handle:
        yield lambda record: print(json.dumps(record), file=handle)


@contextmanager
def table_file(file: Path, model: LoadedClassifier) -> Iterator[Write]:
    """Write a CSV with fixed columns, whatever is missing: belief.<class>, wli.class, ..."""
    beliefs = dict.fromkeys(model.classes, 0.0)
    stated: Stated = {"class": "", "belief": beliefs, "uncertainty": 0.0}
    whole: Answer = {
        "id": "",
        "class": "",
        "probability": beliefs,
        "belief": beliefs,
        "uncertainty": 0.0,
        "conflict": 0.0,
        "refer": None,
        "views": dict.fromkeys(model.heads, stated),
    }
    columns = [*flat(whole), "reason", *(["set"] if model.point.sets else []), "error"]
    with text_output(file) as handle:
        writer = csv.writer(handle)
        writer.writerow(map(shown_cell, columns))

        def write(record: Record) -> None:
            line = flat(record)
            writer.writerow([shown_cell(line.get(column, "")) for column in columns])

        yield write


class Summary:
    """The first answers and the counts of all answers, for the terminal."""

    def __init__(self) -> None:
        self.shown: list[Answer] = []
        self.answers: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.referred = 0

    def add(self, record: Record) -> None:
        """Count a record, and keep it if it is among the first."""
        if "error" in record:
            self.failures.append(record)  # type: ignore[arg-type]
            return
        self.answers[record["class"]] += 1
        self.referred += bool(record["refer"])
        if len(self.shown) < ROWS_SHOWN:
            self.shown.append(record)

    def print(self, modalities: Sequence[str], point: OperatingPoint) -> None:
        """Print the first answers as a table, the counts, and the failures."""
        console = wide_console()
        console.print(answer_table(self.shown, self.answers.total(), modalities))
        counts = ", ".join(f"{printable(name)}: {n}" for name, n in self.answers.most_common())
        console.print(counts)
        if point.rule:
            console.print(
                f"referred to a person: {self.referred} of {self.answers.total()} "
                f"(rule: {rule_text(point.rule)})"
            )
        if point.sets:
            console.print(
                f"the sets hold the truth in {point.sets.coverage:.0%} of new samples, on average "
                "over draws of the val rows (conformal prediction)"
            )
        if point.predictive_values:
            console.print(values_table(point))
            console.print(
                "PPV: how often an answer of this class is right; NPV: how often another answer "
                "rightly excludes it; both among the samples that are not referred"
            )

    def report_failures(self) -> None:
        """Report the number of samples without an answer, and the first reason, on stderr."""
        if self.failures:
            count = len(self.failures)
            print(
                f"no answer for {count} of {count + self.answers.total()} samples, each has a "
                f"record with the reason; the first: {printable(self.failures[0]['error'])}",
                file=sys.stderr,
            )


def answer_table(shown: Sequence[Answer], count: int, modalities: Sequence[str]) -> Table:
    """Make a table of answers, one row each."""
    title = f"samples: {count}" if count <= len(shown) else f"the first {len(shown)} of {count}"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    sets = any("set" in record for record in shown)
    table.add_column("id")
    table.add_column("class, or others of its set" if sets else "class")
    for name in ("probability", "uncertainty", "conflict"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("refer")
    for name in modalities:
        table.add_column(f"{printable(name)} alone")
    for column in table.columns:
        column.overflow = "fold"  # class names are never truncated
    for record in shown:
        numbers = (
            record["probability"][record["class"]],
            record["uncertainty"],
            record["conflict"],
        )
        alone = (record["views"].get(name) for name in modalities)
        table.add_row(
            printable(record["id"]),
            "\nor ".join(map(printable, dict.fromkeys([record["class"], *record.get("set", ())]))),
            *(f"{value:.3f}" for value in numbers),
            {None: "", True: "yes", False: "no"}[record["refer"]],
            *(printable(own["class"]) if own else "missing" for own in alone),
        )
    return table


def values_table(point: OperatingPoint) -> Table:
    """Make a table of the predictive values at the operating point, one row per class."""
    title = "predictive values"
    table = Table("class", title=title, box=box.SIMPLE_HEAD)
    for name in ("PPV", "NPV"):
        table.add_column(name, justify="right")
    for name, own in point.predictive_values.items():
        cells = ["-" if own[key] is None else f"{own[key]:.2f}" for key in ("ppv", "npv")]
        table.add_row(printable(name), *cells)
    return table
