"""Writes the tables of README.md and docs/, and the plots, from the stored results.

    python -m bench.tables            writes
    python -m bench.tables --check    fails where a table or a plot is not what the results say

A table stands between "<!-- bench: NAME -->" and "<!-- bench: end -->". One whose subject has no
stored result stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial

from bench.machine import ROOT
from bench.results import FOLDER, Result, Row, latest, stored
from bench.targets import TARGETS, Target, holds, row_for

FILES = ("README.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- bench: (?!end)([\w -]+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)
Block = Callable[[list[Result]], str | None]


# --- Parts ----------------------------------------------------------------------------------------


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


def keys_of(rows: list[Row], *names: str) -> list[tuple[object, ...]]:
    """Values of these columns, each once, in their order."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows if "shape" in row))


# --- Tables of the README -------------------------------------------------------------------------


def newest_cpu(results: list[Result], subject: str) -> Result | None:
    """The result that the README shows."""
    return next(iter(latest(results, subject, "cpu").values()), None)


def evidential(results: list[Result]) -> str | None:
    """evidential_fusion_loss against its rivals, and where an evidential operator loses."""
    result = newest_cpu(results, "evidential")
    if result is None:
        return None
    rows = result.of("evidential", "evidential_fusion_loss")
    rivals = ["reference", "reference, compiled", "textbook float32", "textbook, compiled"]
    lines = []
    for (shape,) in keys_of(rows, "shape"):
        own = named(rows, shape=shape)
        first = [str(shape), milliseconds(own["cpu"]["median_ms"])]
        lines.append(first + [times(own.get(rival)) for rival in rivals])
    head = ["rows x views x classes", "C++", "reference", "compiled", "textbook", "compiled"]
    return (
        f"{how(result, 'evidential')}:\n\n{table(head, lines)}\n"
        f"{losses(result.of('evidential'))}{on_gpu(results, 'evidential')}\n"
    )


def losses(rows: list[Row]) -> str:
    """A sentence on the rows in which another implementation is faster than ours."""
    lost = [row for row in rows if row.get("ratio", 1) < 1 and not row["ours"]]
    lost = [row for row in lost if row["implementation"] != "copy"]
    if not lost:
        return ""
    cases = [
        f"`{row['operator']}` at {row['shape']} to {row['implementation']} ({times(row)})"
        for row in lost
    ]
    return f"Loses: {'; '.join(cases)}. "


def consistency(results: list[Result]) -> str | None:
    """Times and, below each, memory of the consistency loss."""
    result = newest_cpu(results, "consistency")
    if result is None:
        return None
    rows = result.of("consistency", "multimodal_consistency_loss")
    rivals = ["ALBEF eager", "ALBEF compiled", "chunked, recomputed", "attention (SDPA)"]
    lines = []
    for batch, shape in keys_of(rows, "batch", "shape"):
        own = named(rows, shape=shape)
        ours = own["cpu"]
        first = [
            str(batch),
            milliseconds(ours["median_ms"]),
            f"{100 * ours['share_of_floor']:.0f} %",
        ]
        lines.append(first + [times(own.get(rival)) for rival in rivals])
        memory = [own[name]["extra_mb"] if name in own else None for name in ("cpu", *rivals)]
        cells = ["-" if mb is None else f"{max(1, mb):.0f} MB" for mb in memory]
        lines.append(["", cells[0], "", *cells[1:]])
    head = ["B", "C++", "of the floor", "ALBEF", "compiled", "chunked", "attention"]
    return (
        f"{how(result, 'consistency')}:\n\n{table(head, lines)}\n"
        f"{losses(result.of('consistency'))}{on_gpu(results, 'consistency')}\n"
    )


def shift(results: list[Result]) -> str | None:
    """Shift and moments, with all threads and with one."""
    result = newest_cpu(results, "shift")
    if result is None:
        return None
    lines = []
    rows = result.of("shift")
    for operator, shape, threads in keys_of(rows, "operator", "shape", "threads"):
        own = named(rows, operator=operator, shape=shape, threads=threads)
        is_shift = operator == "shift_features"
        plain = "eager" if is_shift else "one-hot"
        cells = [times(own.get(name)) for name in (plain, f"{plain}, compiled", "one-hot, E[x^2]")]
        name = "shift" if is_shift else "moments"
        lines.append([name, str(threads), milliseconds(own["cpu"]["median_ms"]), *cells])
    head = ["", "threads", "C++", "eager", "compiled", "eager, plain squares"]
    return f"{how(result, 'shift')}:\n\n{table(head, lines)}\n{on_gpu(results, 'shift')}\n"


def pipeline(results: list[Result]) -> str | None:
    """Pairs a second of each way to make training views."""
    result = newest_cpu(results, "pipeline")
    if result is None:
        return None
    lines = []
    for row in named(result.of("pipeline")).values():
        span = f"{row['slowest']:.0f} to {row['fastest']:.0f}"
        lines.append(
            [
                row["implementation"],
                f"{row['pairs_per_second']:.0f} ({span})",
                digits(1 / row["ratio"]),
                f"{row['cpu_ms']:.1f} ms",
                row["decoder"],
            ]
        )
    if not latest(results, "pipeline", "cuda"):
        lines.append(["any, on a GPU", "not measured", "", "", "nvJPEG"])
    head = ["", "pairs/s (lowest to highest)", "ratio", "CPU time a pair", "decoder"]
    return f"{how(result, 'pipeline')}:\n\n{table(head, lines)}"


# --- Tables of docs/performance.md ----------------------------------------------------------------


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
                f"{digits(row['p20_ms'])} to {digits(row['p80_ms'])}",
                digits(row["min_ms"]),
                digits(row["cpu_ms"]) if row["cpu_ms"] else "-",
                times(row),
                f"{100 * row['share_of_floor']:.0f} %",
                "not measured" if extra is None else f"{extra:.1f}",
            ]
        )
    head = ["operator", "size", "threads", "implementation", "median ms", "20 to 80 %", "least"]
    return table([*head, "CPU ms", "times ours", "of the floor", "MB extra"], lines)


def work(results: list[Result]) -> str | None:
    """Bytes, FLOPs and floor of every case, and what the machines do at most."""
    parts = []
    for kind in ("cpu", "cuda"):
        for subject in ("evidential", "consistency", "shift"):
            for result in latest(results, subject, kind).values():
                parts.append((result, result.of(subject)))
    if not parts:
        return None
    lines, machines = [], []
    for result, rows in parts:
        machines += [
            f"- {result.machine['device']}: {peaks['bytes'] / 1e9:.0f} GB/s, "
            f"{peaks['matrix_flops'] / 1e9:.0f} GFLOP/s of products, "
            f"{peaks['vector_flops'] / 1e9:.0f} of others ({peaks['source']})"
            for peaks in result.peaks.values()
        ]
        rows = [row for row in rows if "absent" not in row]
        seen = keys_of(rows, "operator", "shape", "threads", "bytes", "flops")
        for operator, shape, threads, moved, flops in seen:
            own = named(rows, operator=operator, shape=shape, threads=threads)
            floor = next(iter(own.values()))["floor_ms"]
            bound = [f"{moved / 1e6:.2f}", f"{flops / 1e9:.3g}", digits(floor)]
            lines.append([f"`{operator}`", str(shape), str(threads), *bound])
    head = ["operator", "size", "threads", "MB", "GFLOP", "floor ms"]
    return "\n".join(dict.fromkeys(machines)) + "\n\n" + table(head, lines)


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
    from bench.plots import plots

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
    }[target.column]


BLOCKS: dict[str, Block] = {
    "evidential": evidential,
    "consistency": consistency,
    "shift": shift,
    "pipeline": pipeline,
    "work": work,
    "targets": targets,
    "plots": shown,
    "kernels": kernels,
    **{f"all {name}": partial(everything, name) for name in ("evidential", "consistency", "shift")},
}


# --- Writing --------------------------------------------------------------------------------------


def filled(text: str, results: list[Result]) -> str:
    """A document with its tables as the results say."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise SystemExit(f"there is no table named {match[2]!r}; there are {', '.join(BLOCKS)}")
        content = BLOCKS[match[2]](results)
        return match[0] if content is None else f"{match[1]}{content}{match[3]}"

    return BLOCK.sub(block, text)


def main() -> int:
    """Write, or say what is stale; exit status 1 where something is."""
    from bench.plots import draw, stale_plots

    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = stored()
    stale = stale_plots(results) if check else []
    for name in FILES:
        path = ROOT / name
        text = path.read_text()
        new = filled(text, results)
        if new != text and check:
            stale.append(name)
        elif new != text:
            path.write_text(new)
            print(f"wrote {name}")
    if not check:
        draw(results)
        return 0
    for name in stale:
        print(f"{name} is not what bench/results says: run python -m bench.tables")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
