"""The tables of docs/performance.md: every row of every device, work and floors, promises."""

from __future__ import annotations

import json

from bench.machine import ROOT
from bench.publish.markdown import digits, how, keys_of, milliseconds, named, share, table, times
from bench.publish.plots import plots
from bench.publish.results import FOLDER, Result, Row, latest
from bench.publish.targets import TARGETS, Target, holds, row_for


def everything(subject: str, results: list[Result]) -> str | None:
    """Every row of the newest result of each device, and what was not measured."""
    parts = []
    for kind in ("cpu", "cuda"):
        for result in latest(results, subject, kind).values():
            parts.append(f"{how(result, subject)}:\n\n{full_table(result.of(subject))}")
    if not parts:
        return None
    if not latest(results, subject, "cuda"):
        parts.append("On a GPU: not measured.\n")
    return "\n".join(parts)


def full_table(rows: list[Row]) -> str:
    """All columns of rows of operators."""
    lines = []
    for row in rows:
        name = [f"`{row['operator']}`", row["shape"], str(row["threads"]), row["implementation"]]
        if "absent" in row:
            lines.append([*name, f"not measured: {row['absent']}", "", "", "", "", "", ""])
            continue
        extra = row["extra_mb"]
        lines.append(
            [
                *name,
                digits(row["median_ms"]),
                spread(row),
                digits(row["min_ms"]),
                digits(row["cpu_ms"]) if row["cpu_ms"] else "-",
                times(row),
                share(row),
                "not measured" if extra is None else f"{extra:.1f}",
            ]
        )
    head = ["operator", "size", "threads", "implementation", "median ms", "20 to 80 %", "least"]
    return table([*head, "CPU ms", "times ours", "of the floor", "MB extra"], lines)


def training(results: list[Result]) -> str | None:
    """The ladder of every device."""
    parts = []
    for kind in ("cpu", "cuda"):
        for result in latest(results, "training", kind).values():
            lines = [
                [
                    row["shape"],
                    f"{row['implementation']}, {row['precision']}",
                    digits(row["pairs_per_second"]),
                    f"{digits(row['ms'])} ({digits(row['cpu_ms'])})",
                    spread(row),
                    times_a(row),
                    digits(row["gflop_per_pair"]),
                    digits(row["floor_ms"]) if "floor_ms" in row else "not measured",
                    share(row),
                    "not measured" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}",
                    "not measured"
                    if row["data_wait"] is None
                    else f"{100 * row['data_wait']:.0f} %",
                ]
                for row in measured(result.of("training"))
            ]
            head = ["model", "rung", "pairs/s", "ms (CPU ms)", "20 to 80 %", "faster than a"]
            head += ["GFLOP/pair", "floor ms", "of the floor", "MB", "wait for data"]
            cells = table(head, lines)
            parts.append(f"{how(result, 'training')}:\n\n{cells}")
    if not parts:
        return None
    if not latest(results, "training", "cuda"):
        parts.append("On a GPU: not measured.\n")
    return "\n".join(parts)


def spread(row: Row) -> str:
    """The 20th and 80th percentile; results of old had none of everything."""
    return f"{digits(row['p20_ms'])} to {digits(row['p80_ms'])}" if "p20_ms" in row else "-"


def times_a(row: Row) -> str:
    """How many times faster than the first rung."""
    return "-" if row["x_ms"] is None else f"{row['x_ms']:.2f}x"


def measured(rows: list[Row]) -> list[Row]:
    """Those that hold figures."""
    return [row for row in rows if "absent" not in row]


def work(results: list[Result]) -> str | None:
    """Bytes, FLOPs and floor of every case, at the bandwidth of as many bytes, and what the
    machines do at most."""
    parts = []
    for kind in ("cpu", "cuda"):
        for subject in ("evidential", "consistency", "shift"):
            for result in latest(results, subject, kind).values():
                parts.append((result, result.of(subject)))
    if not parts:
        return None
    lines: list[list[str]] = []
    machines: dict[tuple[str, str], str] = {}  # of several runs one line
    for result, rows in parts:
        for peaks in result.peaks.values():
            machines[str(result.machine["device"]), peaks["source"]] = (
                f"- {result.machine['device']}: {peaks['bytes'] / 1e9:.0f} GB/s from memory, "
                f"{peaks['matrix_flops'] / 1e9:.0f} GFLOP/s of products, "
                f"{peaks['vector_flops'] / 1e9:.0f} of others ({peaks['source']})"
            )
        rows = measured(rows)
        seen = keys_of(rows, "operator", "shape", "threads", "bytes", "flops")
        for operator, shape, threads, moved, flops in seen:
            own = named(rows, operator=operator, shape=shape, threads=threads)
            first = next(iter(own.values()))
            rate = first.get("bandwidth")
            lines.append(
                [
                    f"`{operator}`",
                    str(shape),
                    str(threads),
                    f"{moved / 1e6:.2f}",
                    digits(rate / 1e9) if rate else "not measured",
                    f"{flops / 1e9:.3g}",
                    digits(first["floor_ms"]),
                ]
            )
    head = ["operator", "size", "threads", "MB", "GB/s", "GFLOP", "floor ms"]
    return "\n".join(machines.values()) + "\n\n" + table(head, lines)


def targets(results: list[Result]) -> str | None:
    """Each promise, what was measured, and whether it holds."""
    lines = []
    for target in TARGETS:
        row = row_for(target, results)
        value = None if row is None else row[target.column]
        verdict = "not measured" if value is None else "holds" if holds(target, value) else "missed"
        found = "not measured" if value is None else in_words(target, value)
        bound = target.least if target.least is not None else target.most
        assert bound is not None
        side = "at least" if target.least is not None else "at most"
        what = f"`{target.operator}`" if "_" in target.operator else target.operator
        lines.append(
            [
                "GPU" if target.kind == "cuda" else "CPU",
                f"{what} {target.shape}".strip(),
                f"{target.implementation} {side} {in_words(target, bound)}",
                found,
                verdict,
            ]
        )
    return table(["", "operator", "wanted", "measured", ""], lines) if results else None


def kernels(results: list[Result]) -> str | None:
    """Registers and shared memory of every kind of GPU kernel, as make check-kernels found them."""
    path = FOLDER / "kernels.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    chips = list(next(iter(found["kinds"].values())))
    lines = [
        [kind, *(f"{usage[chip][0]}, {usage[chip][2] / 1024:.0f} KB" for chip in chips)]
        for kind, usage in found["kinds"].items()
    ]
    spilled = sum(chip[1] for usage in found["kinds"].values() for chip in usage.values())
    return (
        f"{found['count']} kernels, compiled by Triton {found['triton']} and nvcc; bytes spilled: "
        f"{spilled}.\n\n{table(['kernel', *(f'sm_{chip}' for chip in chips)], lines)}"
    )


def shown(results: list[Result]) -> str | None:
    """The plots, as images."""
    lines = [
        f"![{one.title}]({one.path.relative_to(ROOT / 'docs').as_posix()})"
        for one in plots(results)
    ]
    return "\n\n".join(lines) + "\n" if lines else None


def in_words(target: Target, value: float) -> str:
    """A value of a target's column with its unit."""
    return {
        "ratio": f"{digits(value)}x",
        "median_ms": milliseconds(value),
        "extra_mb": f"{value:.0f} MB extra",
        "share_of_floor": f"{100 * value:.0f} % of the floor",
        "times_b": f"{digits(value)}x faster than b",
        "pairs_per_second": f"{digits(value)} pairs/s",
        "mfu": f"MFU {100 * value:.0f} %",
        "data_wait": f"{100 * value:.0f} % of the time waiting for data",
    }[target.column]
