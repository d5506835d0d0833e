"""The tables of docs/performance.md: every row of every device, work and floors, targets."""

from __future__ import annotations

import json

from bench.machine import ROOT
from bench.publish.markdown import (
    digits,
    how,
    keys_of,
    listed,
    megabytes,
    milliseconds,
    named,
    not_measured,
    on_gpu,
    share,
    table,
    times,
)
from bench.publish.plots import OPERATORS, plots
from bench.publish.results import FOLDER, KINDS, Result, latest, measured, newest_cpu
from bench.publish.targets import TARGETS, Target, holds, measured_value
from bench.rows import Row

DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def everything(subject: str, results: list[Result]) -> str | None:
    """Tabulate every row of each device's newest result, and the rows not measured."""
    parts = []
    for kind in KINDS:
        for result in latest(results, subject, kind).values():
            rows = result.of(subject)
            parts.append(f"{how(result, subject)}:\n\n{full_table(measured(rows))}")
            parts.append(not_measured(rows))
    if not parts:
        return None
    if not latest(results, subject, "cuda"):
        parts.append(on_gpu(results, subject) + "\n")
    return "\n".join(part for part in parts if part)


def full_table(rows: list[Row]) -> str:
    """Tabulate all columns of the operators' rows."""
    lines = [
        [
            f"`{row['operator']}`",
            row["shape"],
            str(row["threads"]),
            row["implementation"],
            digits(row["median_ms"]),
            spread(row),
            digits(row["min_ms"]),
            digits(row["cpu_ms"]) if row["cpu_ms"] else "-",
            times(row),
            share(row),
            megabytes(row["extra_mb"], 1),
        ]
        for row in rows
    ]
    head = ["operator", "size", "threads", "implementation", "median ms", "20 to 80 %", "least"]
    return table([*head, "CPU ms", "times ours", "of the floor", "MB extra"], lines)


def training(results: list[Result]) -> str | None:
    """Tabulate the ladder of every device."""
    parts = []
    for kind in KINDS:
        for result in latest(results, "training", kind).values():
            rows = result.of("training")
            lines = [ladder_line(row) for row in measured(rows)]
            head = ["model", "rung", "pairs/s", "ms (CPU ms)", "20 to 80 %", "faster than a"]
            head += ["GFLOP/pair", "floor ms", "of the floor", "MB", "wait for data"]
            parts.append(f"{how(result, 'training')}:\n\n{table(head, lines)}")
            parts.append(not_measured(rows))
    if not parts:
        return None
    if not latest(results, "training", "cuda"):
        parts.append(on_gpu(results, "training") + "\n")
    return "\n".join(part for part in parts if part)


def ladder_line(row: Row) -> list[str]:
    """Return the cells of a rung."""
    wait, faster = row["data_wait"], row["x_ms"]
    return [
        row["shape"],
        f"{row['implementation']}, {row['precision']}",
        digits(row["pairs_per_second"]),
        f"{digits(row['ms'])} ({digits(row['cpu_ms'])})",
        spread(row),
        "-" if faster is None else f"{faster:.2f}x",
        digits(row["gflop_per_pair"]),
        digits(row["floor_ms"] or 0),
        share(row),
        megabytes(row["memory_mb"]),
        "random frames" if wait is None else f"{100 * wait:.0f} %",
    ]


def host(results: list[Result]) -> str | None:
    """Tabulate host time and launches per call."""
    result = newest_cpu(results, "host")
    if result is None:
        return None
    lines = [
        [
            f"`{row['operator']}`",
            row["shape"],
            row["implementation"],
            f"{row['host_us']:.0f}",
            str(row["launches"]),
            str(row["torch_kernels"]),
        ]
        for row in measured(result.of("host"))
    ]
    head = ["operator", "size", "passes", "host us", "launches", "torch kernels"]
    return f"{how(result, 'host')}:\n\n{table(head, lines)}"


def spread(row: Row) -> str:
    """Format the 20th and 80th percentile."""
    return f"{digits(row['p20_ms'])} to {digits(row['p80_ms'])}"


def work(results: list[Result]) -> str | None:
    """Tabulate bytes, FLOPs and floor of every case, and the peaks of the machines."""
    parts = [
        (result, measured(result.of(subject)))
        for kind in KINDS
        for subject in OPERATORS
        for result in latest(results, subject, kind).values()
    ]
    if not parts:
        return None
    machines: dict[tuple[str, str], str] = {}  # one line for several runs
    lines: list[list[str]] = []
    for result, rows in parts:
        for peaks in result.peaks.values():
            machines[result.machine["device"], peaks["source"]] = (
                f"- {result.machine['device']}: {peaks['bytes'] / 1e9:.0f} GB/s from memory, "
                f"{peaks['matrix_flops'] / 1e9:.0f} GFLOP/s of matrix products, "
                f"{peaks['vector_flops'] / 1e9:.0f} GFLOP/s otherwise ({peaks['source']})"
            )
        lines += [work_line(rows, *key) for key in keys_of(rows, "operator", "shape", "threads")]
    head = ["operator", "size", "threads", "MB", "GB/s", "GFLOP", "floor ms"]
    return "\n".join(machines.values()) + "\n\n" + table(head, lines)


def work_line(rows: list[Row], operator: str, shape: str, threads: int) -> list[str]:
    """Return the work of a case and its floor, at the bandwidth for its bytes."""
    row = next(iter(named(rows, operator=operator, shape=shape, threads=threads).values()))
    return [
        f"`{operator}`",
        shape,
        str(threads),
        f"{row['bytes'] / 1e6:.2f}",
        digits(row["bandwidth"] / 1e9),
        f"{(row['flops'] or 0) / 1e9:.3g}",
        digits(row["floor_ms"] or 0),
    ]


def targets(results: list[Result]) -> str | None:
    """Tabulate the measured targets and whether they are met; list the others in one line."""
    if not results:
        return None
    lines, missing = [], dict.fromkeys(KINDS, 0)
    for target in TARGETS:
        value = measured_value(target, results)
        if value is None:
            missing[target.kind] += 1
            continue
        bound = target.least if target.least is not None else target.most
        assert bound is not None
        side = "at least" if target.least is not None else "at most"
        lines.append(
            [
                DEVICES[target.kind],
                f"{what_of(target)} {target.shape}".strip(),
                f"{target.implementation} {side} {in_words(target, bound)}",
                in_words(target, value),
                "met" if holds(target, value) else "missed",
            ]
        )
    found = table(["", "operator", "target", "measured", ""], lines)
    left = [f"{count} on a {DEVICES[kind]}" for kind, count in missing.items() if count]
    return f"{found}\nNot measured: {listed(left)}.\n" if left else found


def what_of(target: Target) -> str:
    """Format an operator as code, anything else as words."""
    return f"`{target.operator}`" if target.operator.isidentifier() else target.operator


def kernels(results: list[Result]) -> str | None:
    """Tabulate registers and shared memory of each kind of GPU kernel from make check-kernels."""
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
    """Show the plots as images."""
    lines = [
        f"![{one.title}]({one.path.relative_to(ROOT / 'docs').as_posix()})"
        for one in plots(results)
    ]
    return "\n\n".join(lines) + "\n" if lines else None


def in_words(target: Target, value: float) -> str:
    """Format a value of a target's column with its unit."""
    return {
        "ratio": f"{digits(value)}x",
        "called_ratio": f"{digits(value)}x as called",
        "median_ms": milliseconds(value),
        "extra_mb": f"{value:.0f} MB extra",
        "share_of_floor": f"{100 * value:.0f} % of the floor",
        "times_b": f"{digits(value)}x faster than b",
        "pairs_per_second": f"{digits(value)} pairs/s",
        "mfu": f"MFU {100 * value:.0f} %",
        "data_wait": f"{100 * value:.0f} % of the time waiting for data",
    }[target.column]
