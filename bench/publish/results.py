"""Stored results of benchmarks, newest first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.machine import ROOT, slug
from bench.rows import Machine, Row, StoredPeaks

FOLDER = ROOT / "bench" / "results"
KINDS = ("cpu", "cuda")


@dataclass(frozen=True)
class Result:
    """One run of ``python -m bench``."""

    path: Path
    machine: Machine
    peaks: dict[str, StoredPeaks]
    rows: list[Row]

    @property
    def device(self) -> str:
        """Name of the device as part of a path."""
        return slug(self.machine["device"])

    def of(self, subject: str, operator: str | None = None) -> list[Row]:
        """Return the rows of a subject (and operator), including rows without figures."""
        rows = [row for row in self.rows if row["subject"] == subject]
        return [row for row in rows if operator in (None, row.get("operator"))]


def stored(folder: Path = FOLDER) -> list[Result]:
    """Read all results except those of --quick, newest first."""
    files = [path for path in folder.glob("*/*.json") if not path.stem.endswith("-quick")]
    results = [Result(path, **json.loads(path.read_text())) for path in files]
    return sorted(results, key=lambda result: result.machine["date"], reverse=True)


def latest(results: list[Result], subject: str, kind: str) -> dict[str, Result]:
    """Return the newest result on a subject with figures per device of a kind, newest first.

    Args:
        kind: cpu or cuda.
    """
    found: dict[str, Result] = {}
    for result in results:
        if result.machine["kind"] == kind and measured(result.of(subject)):
            found.setdefault(result.device, result)
    return found


def newest_cpu(results: list[Result], subject: str) -> Result | None:
    """Return the newest result of any CPU."""
    return next(iter(latest(results, subject, "cpu").values()), None)


def figure(row: Row, column: str) -> float | None:
    """Return the number in a column; None if there is none."""
    value = dict(row).get(column)
    return float(value) if isinstance(value, int | float) else None


def measured(rows: list[Row]) -> list[Row]:
    """Select rows with figures."""
    return [row for row in rows if "absent" not in row]
