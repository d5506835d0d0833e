"""Results of many runs as one table: means over seeds, intervals, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student

from mics_fast.intervals import LEVEL
from mics_fast.model_card import markdown_table

# Columns of the Markdown table; the JSON holds every metric of every view.
SHOWN = {"macro_f1": "macro F1", "macro_auroc": "macro AUROC", "ece": "ECE", "aurc": "AURC"}


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and Student's 95 % interval over seeds; without an interval for a single seed.

    The values are of independent draws (seeds), not of test rows.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "interval": None, "values": list(values)}
    quantile = student.ppf((1 + LEVEL) / 2, len(values) - 1)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "interval": [mean - half, mean + half], "values": list(values)}


def tabulate(
    results: Sequence[dict[str, Any]], fractions: Sequence[float], variants: Sequence[str]
) -> dict[str, Any]:
    """All metrics of all views for every label fraction and variant.

    Args:
        results: of every run: "seed", "label_fraction", "variant", "views", "labelled", "n",
            "seconds".
        fractions, variants: in the order of the rows.

    Returns:
        "rows": each with means, and the differences, paired by seed, to the variant in the row
        above and to the first one of its label fraction.
    """
    rows = []
    for fraction in fractions:
        by_variant = {
            variant: sorted(
                (x for x in results if (x["label_fraction"], x["variant"]) == (fraction, variant)),
                key=lambda result: result["seed"],
            )
            for variant in variants
        }
        for position, variant in enumerate(variants):
            own = by_variant[variant]
            row = {
                "label_fraction": fraction,
                "variant": variant,
                "seeds": [result["seed"] for result in own],
                "labelled": [result["labelled"] for result in own],
                "n": own[0]["n"],
                "seconds": statistics.fmean(result["seconds"] for result in own),
                "views": over_seeds(own),
            }
            if position:
                row["minus_previous"] = over_seeds(own, by_variant[variants[position - 1]])
                row["minus_first"] = over_seeds(own, by_variant[variants[0]])
            rows.append(row)
    return {"level": LEVEL, "rows": rows}


def over_seeds(
    results: Sequence[dict[str, Any]], minus: Sequence[dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """View -> metric -> mean and interval, of the results or of their paired differences.

    A metric that is not defined (None) for one of the seeds is left out.
    """
    summary: dict[str, dict[str, Any]] = {}
    for view, metrics in results[0]["views"].items():
        summary[view] = {}
        for name in metrics:
            values = [result["views"][view][name] for result in results]
            others = [x["views"][view][name] for x in minus] if minus else [0.0] * len(values)
            if None not in values and None not in others:
                differences = [a - b for a, b in zip(values, others, strict=True)]
                summary[view][name] = mean_interval(differences)
    return summary


def markdown(table: dict[str, Any]) -> str:
    """The table for a person: fused metrics, accuracies in %."""
    rows = table["rows"]
    first = rows[0]["variant"]
    head = [
        "labels", "variant", "accuracy, %", "- row above", f"- {first}", *SHOWN.values(), "trained",
    ]  # fmt: skip
    lines = []
    for row in rows:
        fused = row["views"]["fused"]
        differences = [
            cell(row[name]["fused"]["accuracy"], 100, signed=True) if name in row else ""
            for name in ("minus_previous", "minus_first")
        ]
        lines.append(
            [
                f"{row['label_fraction']:.1%} ({statistics.fmean(row['labelled']):.0f})",
                row["variant"],
                cell(fused["accuracy"], 100),
                *differences,
                *(cell(fused.get(name), 1) for name in SHOWN),
                f"{row['seconds']:.0f} s",
            ]
        )
    count = len(rows[0]["seeds"])
    return (
        "# Results\n\n"
        f"Fused opinion on {rows[0]['n']} test samples, {count} seeds (label draw, weights, "
        "order). In brackets: Student's 95 % interval over seeds, of differences paired by seed"
        f"{'; one seed has none' if count == 1 else ''}. The test samples are the same for all "
        "seeds, and the intervals are not corrected for the number of comparisons. "
        '"trained": mean wall time, shared pre-training included; the variants are not matched '
        "in time.\n\n" + markdown_table(head, lines) + "\n"
    )


def cell(value: dict[str, Any] | None, scale: float, *, signed: bool = False) -> str:
    """Mean and interval of one metric."""
    if value is None:
        return "not defined"
    digits = 1 if scale == 100 else 3
    sign = "+" if signed else ""
    text = f"{scale * value['mean']:{sign}.{digits}f}"
    if value["interval"] is None:
        return text
    low, high = (f"{scale * bound:{sign}.{digits}f}" for bound in value["interval"])
    return f"{text} ({low} to {high})"
