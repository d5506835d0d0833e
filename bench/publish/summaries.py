"""The tables of the README: for each subject one, of the newest run on a CPU."""

from __future__ import annotations

from bench.publish.markdown import (
    digits,
    how,
    keys_of,
    megabytes,
    milliseconds,
    named,
    newest_cpu,
    on_gpu,
    share,
    table,
    times,
)
from bench.publish.results import Result, Row, latest


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
            share(ours),
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
    rows = named(result.of("pipeline")).values()
    # Older results counted no CPU time of workers that were still running.
    has_cpu = all("cpu_ms_per_pair" in row for row in rows)
    lines = [
        [
            row["implementation"],
            f"{row['pairs_per_second']:.0f} ({row['slowest']:.0f} to {row['fastest']:.0f})",
            digits(1 / row["ratio"]),
            "-" if is_floor(row) else share(row),
            *([f"{row['cpu_ms_per_pair']:.1f} ms"] if has_cpu else []),
            megabytes(row),
            row["decoder"],
        ]
        for row in rows
    ]
    head = ["", "pairs/s (lowest to highest)", "ratio", "of the floor"]
    head += [*(["CPU time a pair"] if has_cpu else []), "MB", "decoder"]
    on = "" if latest(results, "pipeline", "cuda") else "\nOn a GPU: not measured.\n"
    return f"{how(result, 'pipeline')}:\n\n{table(head, lines)}{on}"


def is_floor(row: Row) -> bool:
    """Whether a row of the pipeline is what others are held against."""
    return str(row["implementation"]).startswith("decoding alone")
