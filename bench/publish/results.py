"""Stored results: what was measured where, newest first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT, slug

FOLDER = ROOT / "bench" / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One run of ``python -m bench``."""

    path: Path
    machine: dict[str, Any]
    peaks: dict[str, dict[str, Any]]
    rows: list[Row]

    @property
    def device(self) -> str:
        """Name of the device as part of a path."""
        return slug(self.machine["device"])

    def of(self, subject: str, operator: str | None = None) -> list[Row]:
        """Rows of a subject (and operator), with those that say why they hold no figure."""
        rows = [row for row in self.rows if row["subject"] == subject]
        return [row for row in rows if operator in (None, row.get("operator"))]


def stored(folder: Path = FOLDER) -> list[Result]:
    """All results but those of --quick, newest first."""
    files = [path for path in folder.glob("*/*.json") if not path.stem.endswith("-quick")]
    results = [Result(path, **json.loads(path.read_text())) for path in files]
    return sorted(results, key=lambda result: result.machine["date"], reverse=True)


def latest(results: list[Result], subject: str, kind: str) -> dict[str, Result]:
    """Of each device of a kind ("cpu" or "cuda") the newest result with figures on a subject, by
    device, the newest first."""
    found: dict[str, Result] = {}
    for result in results:
        has = any("absent" not in row for row in result.of(subject))
        if result.machine["kind"] == kind and has:
            found.setdefault(result.device, result)
    return found
