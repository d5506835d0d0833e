"""Parts of the tables: cells, sentences, and groups of rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.publish.results import Result, latest, measured
from bench.rows import Row


def table(head: list[str], lines: list[list[str]]) -> str:
    """Format a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows) + "\n"


def digits(value: float) -> str:
    """Format with three significant digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def milliseconds(value: float) -> str:
    """Format a time with its unit."""
    return f"{digits(value)} ms"


def times(row: Row | None) -> str:
    """Format the time of a row as a multiple of ours; "-" for no row."""
    return "-" if row is None else factor(row["ratio"])


def factor(value: float | None) -> str:
    """Format a ratio."""
    return "-" if value is None else f"{value:.{0 if value >= 100 else 1}f}x"


def share(row: Row) -> str:
    """Format the share of the floor that a row reaches."""
    value = row["share_of_floor"]
    return "-" if value is None else f"{100 * value:.0f} %"


def megabytes(value: float | None, digits: int = 0) -> str:
    """Format an amount of memory."""
    return "-" if value is None else f"{value:.{digits}f}"


def listed(names: Iterable[str]) -> str:
    """Join names as in "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def how(result: Result, subject: str) -> str:
    """Describe command, machine and versions of a result."""
    machine = result.machine
    option = "" if subject != "pipeline" else " --manifest data/mine/manifest.csv"
    command = f"python -m bench --{machine['mode']} --only {subject}{option}"
    where = f"an {machine['device']}" if machine["device"][0] in "AEIO" else machine["device"]
    if machine["kind"] == "cpu":
        number = machine["threads"]
        where = f"{'one thread' if number == 1 else f'{number} threads'} of {where}"
    else:
        where += f" (CUDA {machine['cuda']}, {machine['gpu']})"
    return (
        f"`{command}` on {where}, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date'][:10]}"
    )


def on_gpu(results: list[Result], subject: str) -> str:
    """Name the GPUs on which a subject was measured."""
    found = latest(results, subject, "cuda").values()
    names = [result.machine["device"] for result in found]
    return f"Measured on {listed(names)}, too." if names else "Not measured on a GPU."


def not_measured(rows: list[Row]) -> str:
    """Describe the rows without figures in one line, or ""."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if "absent" in row:
            key = row.get("operator", row["subject"]), row.get("shape", ""), row["absent"]
            found.setdefault(key, []).append(row.get("implementation", "all"))
    if not found:
        return ""
    parts = [
        f"{listed(names)} for `{operator}`{f' at {shape}' if shape else ''} ({reason})"
        for (operator, shape, reason), names in found.items()
    ]
    return f"Not measured: {'; '.join(parts)}.\n"


def named(rows: list[Row], **wanted: object) -> dict[str, Row]:
    """Return measured rows with these entries, by implementation."""
    return {
        row["implementation"]: row
        for row in measured(rows)
        if all(row.get(key) == value for key, value in wanted.items())
    }


def keys_of(rows: list[Row], *names: str) -> list[tuple[Any, ...]]:
    """Return the distinct values of these columns, in order."""
    return list(
        dict.fromkeys(tuple(row.get(name) for name in names) for row in rows if "shape" in row)
    )
