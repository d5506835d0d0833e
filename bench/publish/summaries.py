"""The short tables: one per subject, from the newest run on a CPU."""

from __future__ import annotations

from bench.features import BOTH, COMPILED, FUSED, REFERENCE
from bench.publish.markdown import (
    digits,
    factor,
    how,
    keys_of,
    megabytes,
    milliseconds,
    named,
    on_gpu,
    share,
    table,
    times,
)
from bench.publish.results import Result, measured, newest_cpu
from bench.rows import Row
from bench.shift import COPY

WANTED = 3
"""Times by which the losses of a step on kept features must outweigh the fused operators."""


def evidential(results: list[Result]) -> str | None:
    """Compare evidential_fusion_loss with its rivals; name cases where an operator is slower."""
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
    """Name the rivals that are faster than ours, or return ""."""
    lost = [
        f"{row['implementation']} for `{row['operator']}` at {row['shape']} ({times(row)})"
        for row in measured(rows)
        if (row["ratio"] or 1) < 1 and not row["ours"] and row["implementation"] != COPY
    ]
    return f"Faster than ours: {'; '.join(lost)}. " if lost else ""


def consistency(results: list[Result]) -> str | None:
    """Tabulate time and, below it, memory of the consistency loss."""
    result = newest_cpu(results, "consistency")
    if result is None:
        return None
    rows = result.of("consistency", "multimodal_consistency_loss")
    rivals = ["ALBEF eager", "ALBEF compiled", "chunked, recomputed", "attention (SDPA)"]
    lines = []
    for batch, shape in keys_of(rows, "batch", "shape"):
        own = named(rows, shape=shape)
        ours = own["cpu"]
        first = [str(batch), milliseconds(ours["median_ms"]), share(ours)]
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
    """Tabulate shift and moments, with all threads and with one."""
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


def features(results: list[Result]) -> str | None:
    """Tabulate the fine-tuning step on kept features, uncompiled and compiled; name the sizes
    without the wanted gain."""
    result = newest_cpu(results, "features")
    if result is None:
        return None
    rows = measured(result.of("features"))
    lines, short = [], []
    for (shape,) in keys_of(rows, "shape"):
        own, cells = named(rows, shape=shape), [str(shape)]
        for fused, plain in ((FUSED, REFERENCE), (BOTH, COMPILED)):
            if fused not in own or plain not in own:
                cells += ["-"] * 3
                continue
            ours = own[fused]["median_ms"]
            ratio = own[plain]["median_ms"] / ours
            cells += [milliseconds(ours), f"{1000 / ours:.0f}", factor(ratio)]
            if fused == FUSED and round(ratio, 1) < WANTED:
                short.append(f"{shape} ({factor(ratio)})")
        lines.append(cells)
    head = ["classes, batch", FUSED, "steps/s", REFERENCE, "compiled: fused operators", "steps/s",
            REFERENCE]  # fmt: skip
    below = f"Below {WANTED}x, uncompiled: {'; '.join(short)}. " if short else ""
    return (
        f"{how(result, 'features')}:\n\n{table(head, lines)}\n"
        f"{below}{on_gpu(results, 'features')}\n"
    )


def pipeline(results: list[Result]) -> str | None:
    """Tabulate the pairs per second of each loader."""
    result = newest_cpu(results, "pipeline")
    if result is None:
        return None
    rows = measured(result.of("pipeline"))
    # Older results counted no CPU time of workers that were still running.
    has_cpu = all("cpu_ms_per_pair" in row for row in rows)
    lines = [
        [
            row["implementation"],
            f"{row['pairs_per_second']:.0f} ({row['slowest']:.0f} to {row['fastest']:.0f})",
            digits(1 / (row["ratio"] or 1)),
            share(row),
            *([f"{row['cpu_ms_per_pair']:.1f} ms"] if has_cpu else []),
            megabytes(row["extra_mb"]),
            row["decoder"],
        ]
        for row in rows
    ]
    head = ["", "pairs/s (slowest to fastest round)", "times DALI", "of the floor"]
    head += [*(["CPU time per pair"] if has_cpu else []), "MB", "decoder"]
    return f"{how(result, 'pipeline')}:\n\n{table(head, lines)}\n{on_gpu(results, 'pipeline')}\n"


def as_called(results: list[Result]) -> str | None:
    """Tabulate each operator as users call it, beside the kernel's own ratio."""
    lines = []
    for subject in ("evidential", "consistency", "shift"):
        result = newest_cpu(results, subject)
        rows = [] if result is None else measured(result.of(subject))
        for row in rows:
            if "called_ms" in row and row["implementation"] != COPY:
                lines.append(
                    [
                        f"`{row['operator']}`",
                        row["shape"],
                        str(row["threads"]),
                        row["implementation"],
                        milliseconds(row["called_ms"]),
                        factor(row["called_ratio"]),
                        factor(row["ratio"]),
                    ]
                )
    head = ["operator", "size", "threads", "implementation", "as called"]
    return table([*head, "times ours, as called", "times ours"], lines) if lines else None
