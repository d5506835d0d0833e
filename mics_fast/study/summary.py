"""Results of many runs as tables: means over seeds, intervals, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student

from mics_fast.evaluation.intervals import LEVEL
from mics_fast.evaluation.tables import markdown_table

FULL = "full"  # the variant that ablations are compared with
# The risk-coverage table, in % of the samples.
COVERAGES = (50, 60, 70, 80, 90, 100)
# Metrics in the tables: title and factor; the JSON holds every metric of every view.
FUSED = {"macro_f1": ("macro F1", 1), "macro_auroc": ("macro AUROC", 1)}
SELECTION = {
    "aurc": ("AURC", 1),
    "risk_at_80_coverage": ("risk, 80 % covered", 100),
    "coverage_at_5_risk": ("covered at 5 % risk", 100),
    "ece": ("ECE", 1),
}


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
    results: Sequence[dict[str, Any]], labels: Sequence[str], variants: Sequence[str]
) -> dict[str, Any]:
    """All metrics of all views for every amount of labels and variant.

    Args:
        results: of every run: "seed", "labels", "variant", "views", "labelled", "n", "n_other",
            "curve", "seconds".
        labels, variants: in the order of the rows.

    Returns:
        "rows": each with means, and differences paired by seed: to the first variant of its
        labels, to the full method, and of the fused opinion to every other view.
    """
    rows = []
    for amount in labels:
        by_variant = {
            variant: sorted(
                (x for x in results if (x["labels"], x["variant"]) == (amount, variant)),
                key=lambda result: result["seed"],
            )
            for variant in variants
        }
        rivals = {"minus_first": variants[0], "minus_full": FULL}
        for variant in variants:
            own = by_variant[variant]
            row = describe(own)
            for name, rival in rivals.items():
                if rival in by_variant and rival != variant:
                    row[name] = {
                        view: over_seeds(own, view, by_variant[rival], view)
                        for view in own[0]["views"]
                    }
            rows.append(row)
    return {"level": LEVEL, "rows": rows}


def describe(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of one variant and amount of labels, from its runs sorted by seed."""
    views = results[0]["views"]
    row = {
        "labels": results[0]["labels"],
        "variant": results[0]["variant"],
        "seeds": [result["seed"] for result in results],
        "labelled": [result["labelled"] for result in results],
        "n": results[0]["n"],
        "n_other": results[0]["n_other"],
        "seconds": statistics.fmean(result["seconds"] for result in results),
        "views": {view: over_seeds(results, view) for view in views},
        "fused_minus": {
            view: over_seeds(results, "fused", results, view) for view in views if view != "fused"
        },
    }
    curves = [result["curve"] for result in results]
    if all(curves):
        row["val"] = {
            "last": mean_interval([curve[-1][1] for curve in curves]),
            "fall": mean_interval([max(a for _, a in c) - c[-1][1] for c in curves]),
            "curve": mean_curve(curves),
        }
    return row


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Step and mean accuracy over seeds, at the steps that all of them have."""
    by_step: list[dict[float, float]] = [{at[0]: at[1] for at in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(own) for own in by_step)))
    return [[step, statistics.fmean(own[step] for own in by_step)] for step in shared]


def over_seeds(
    results: Sequence[dict[str, Any]],
    view: str,
    minus: Sequence[dict[str, Any]] = (),
    minus_view: str = "",
) -> dict[str, dict[str, Any]]:
    """Metric -> mean and interval of a view's values, or of their paired differences.

    A metric that is not defined (None) for one of the seeds is left out.
    """
    summary = {}
    for name in results[0]["views"][view]:
        values = [result["views"][view][name] for result in results]
        others = [result["views"][minus_view].get(name) for result in minus] or [0.0] * len(values)
        if None not in values and None not in others:
            differences = [a - b for a, b in zip(values, others, strict=True)]
            summary[name] = mean_interval(differences)
    return summary


def markdown(table: dict[str, Any]) -> str:
    """The tables for a person, each under a caption: what is compared, and in what unit."""
    rows = table["rows"]
    others = list(rows[0]["fused_minus"])
    missing = [name for name in others if name.startswith("without ")]
    modalities = [name for name in others if name not in missing]
    parts = [
        introduction(rows),
        fused_table(rows),
        *([curve_table(rows)] if all("val" in row for row in rows) else []),
        "**Fused against each modality alone**, accuracy in %; the differences are paired.",
        view_table(rows, modalities, [f"{name} alone" for name in modalities]),
        "**One modality missing** from every test sample, accuracy of the fused opinion in %. Of "
        "two modalities, what is left is what the other says alone.",
        view_table(rows, missing, missing),
        "**Knowing when it is wrong**: the fused opinion answers where its vacuity is lowest. "
        "Risk (error rate) and coverage (share answered) in %.",
        metric_table(rows, SELECTION),
        "**Risk against coverage**: error rate in % of the most certain share of the samples.",
        metric_table(
            rows, {f"risk_at_{share}_coverage": (f"{share} %", 100) for share in COVERAGES}
        ),
    ]
    if rows[0]["n_other"]:
        parts += [
            f"**Out of distribution**: how well vacuity tells {rows[0]['n_other']} samples of "
            "another manifest from the test samples (AUROC; 0.5 is chance).",
            other_table(rows, ["fused", *modalities]),
        ]
    return "\n\n".join(parts) + "\n"


def introduction(rows: Sequence[dict[str, Any]]) -> str:
    """What the figures of all tables are."""
    count = len(rows[0]["seeds"])
    spread = (
        "One seed: no interval."
        if count == 1
        else "± is half of Student's 95 % interval over seeds, of differences paired by seed; "
        "intervals are not corrected for the number of comparisons."
    )
    return (
        f"{rows[0]['n']} test samples, the same for all runs; {count} seed{'s' * (count > 1)} "
        f"(label draw, weights, order). {spread} In brackets: labelled train samples."
    )


def fused_table(rows: Sequence[dict[str, Any]]) -> str:
    """The fused opinion of each variant, and what it gains over the others."""
    first = rows[0]["variant"]
    differences = {"minus_first": f"- {first}", "minus_full": f"- {FULL}"}
    if first == FULL or not any("minus_full" in row for row in rows):
        differences.pop("minus_full")
    if first != FULL and {row["variant"] for row in rows} == {first, FULL}:
        differences.pop("minus_full")  # the same numbers with the other sign
    head = ["accuracy, %", *differences.values(), *(title for title, _ in FUSED.values())]
    lines = [
        [
            cell(row["views"]["fused"]["accuracy"], 100),
            *(
                cell(row[name]["fused"]["accuracy"], 100, signed=True) if name in row else ""
                for name in differences
            ),
            *(cell(row["views"]["fused"].get(name), scale) for name, (_, scale) in FUSED.items()),
            f"{row['seconds']:.0f} s",
        ]
        for row in rows
    ]
    caption = (
        '**The fused opinion.** "trained": mean wall time, shared pre-training included; the '
        'variants are not matched in time, but for "supervised-long", which has as many '
        'floating-point operations as "full".'
    )
    return f"{caption}\n\n{labelled_table(rows, [*head, 'trained'], lines)}"


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy on the val rows along each variant's fine-tuning."""
    quarters = (25, 50, 75, 100)
    lines = []
    for row in rows:
        curve = row["val"]["curve"]
        end = curve[-1][0]
        along = [min(curve, key=lambda at: abs(at[0] - end * share / 100)) for share in quarters]
        lines.append(
            [
                f"{end:.0f}",
                *(f"{100 * accuracy:.1f}" for _, accuracy in along),
                cell(row["val"]["fall"], 100),
            ]
        )
    caption = (
        "**Learning curves**: mean accuracy in % on the val rows, which choose nothing here, after "
        "a quarter, half, three quarters and all of the steps; how far the end lies below the best."
    )
    head = ["steps", *(f"{share} %" for share in quarters), "fall from the best"]
    return f"{caption}\n\n{labelled_table(rows, head, lines)}"


def view_table(rows: Sequence[dict[str, Any]], views: Sequence[str], titles: Sequence[str]) -> str:
    """Accuracy of the fused opinion, of other views, and the paired differences."""
    lines = [
        [
            *(cell(row["views"][view].get("accuracy"), 100) for view in ("fused", *views)),
            *(cell(row["fused_minus"][view].get("accuracy"), 100, signed=True) for view in views),
        ]
        for row in rows
    ]
    return labelled_table(rows, ["fused", *titles, *(f"fused - {t}" for t in titles)], lines)


def metric_table(rows: Sequence[dict[str, Any]], shown: dict[str, tuple[str, int]]) -> str:
    """Metrics of the fused opinion."""
    lines = [
        [cell(row["views"]["fused"].get(name), scale) for name, (_, scale) in shown.items()]
        for row in rows
    ]
    return labelled_table(rows, [title for title, _ in shown.values()], lines)


def other_table(rows: Sequence[dict[str, Any]], views: Sequence[str]) -> str:
    """Area by vacuity against another manifest."""
    lines = [
        [cell(row["views"][view].get("out_of_distribution_auroc"), 1) for view in views]
        for row in rows
    ]
    return labelled_table(rows, views, lines)


def labelled_table(
    rows: Sequence[dict[str, Any]], head: Sequence[str], lines: Sequence[Sequence[str]]
) -> str:
    """A Markdown table whose lines begin with the amount of labels and the variant."""
    return markdown_table(
        ["labels", "variant", *head],
        [
            [
                f"{row['labels']} ({statistics.fmean(row['labelled']):.0f})",
                row["variant"],
                *line,
            ]
            for row, line in zip(rows, lines, strict=True)
        ],
    )


def cell(value: dict[str, Any] | None, scale: float, *, signed: bool = False) -> str:
    """Mean and half the interval of one metric."""
    if value is None:
        return "not defined"
    digits = 1 if scale == 100 else 3
    sign = "+" if signed else ""
    text = f"{scale * value['mean']:{sign}.{digits}f}"
    if value["interval"] is None:
        return text
    return f"{text} ± {scale * (value['interval'][1] - value['mean']):.{digits}f}"
