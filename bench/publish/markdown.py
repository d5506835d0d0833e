"""Parts of the tables: cells, sentences, and which rows belong together."""

from __future__ import annotations

from typing import Any

from bench.publish.results import Result, Row, latest


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows) + "\n"


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def milliseconds(value: float) -> str:
    """A time with its unit."""
    return f"{digits(value)} ms"


def times(row: Row | None) -> str:
    """How many times as long as ours; "-" where there is no such row."""
    return f"{row['ratio']:.{0 if row['ratio'] >= 100 else 1}f}x" if row else "-"


def share(row: Row) -> str:
    """How much of the floor a row reaches; results of old had none of everything."""
    value = row.get("share_of_floor")
    return "not measured" if value is None else f"{100 * value:.0f} %"


def megabytes(row: Row) -> str:
    """Its memory; results of old had none of everything."""
    value = row.get("extra_mb")
    return "not measured" if value is None else f"{value:.0f}"


def how(result: Result, subject: str) -> str:
    """Command, machine and versions of a result."""
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
    """What is known of a GPU."""
    found = latest(results, subject, "cuda").values()
    names = [result.machine["device"] for result in found]
    if not names:
        return "On a GPU: not measured."
    return f"On {' and '.join(names)}: [docs/performance.md](docs/performance.md)."


def named(rows: list[Row], **wanted: object) -> dict[str, Row]:
    """Measured rows with these entries, by implementation."""
    return {
        row["implementation"]: row
        for row in rows
        if "absent" not in row and all(row[key] == value for key, value in wanted.items())
    }


def keys_of(rows: list[Row], *names: str) -> list[tuple[Any, ...]]:
    """Values of these columns, each once, in their order."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows if "shape" in row))


def newest_cpu(results: list[Result], subject: str) -> Result | None:
    """The result that the README shows."""
    return next(iter(latest(results, subject, "cpu").values()), None)
