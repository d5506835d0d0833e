"""Summaries of many runs: means over seeds, intervals, paired differences, Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions
from rich.markdown import Markdown, TableElement
from rich.table import Table
from scipy.stats import t as student

from mics_fast.evaluation.intervals import LEVEL
from mics_fast.evaluation.tables import markdown_table

FULL = "full"  # the variant that ablations are compared with
# The risk-coverage table, in % of the samples.
COVERAGES = (50, 60, 70, 80, 90, 100)
# Metrics in the tables: title and factor; the JSON holds all metrics of all views.
FUSED = {"macro_f1": ("macro F1", 1), "macro_auroc": ("macro AUROC", 1)}
SELECTION = {
    "aurc": ("AURC", 1),
    "risk_at_80_coverage": ("risk, 80 % covered", 100),
    "coverage_at_5_risk": ("covered at 5 % risk", 100),
    "ece": ("ECE", 1),
}


class WholeTable(TableElement):
    """A table on the terminal whose second column, the variant, stays on one line where it can;
    words that do not fit are folded, not cut."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            if len(table.columns) > 1:
                variants = [str(cell) for cell in table.columns[1].cells]
                table.columns[1].width = max(map(len, variants), default=1)
            yield table


class Summary(Markdown):
    """The tables of a study for the terminal."""

    elements: ClassVar = {**Markdown.elements, "table_open": WholeTable}


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Compute the mean and Student's 95 % interval over seeds; no interval for a single seed.

    The values must come from independent draws (seeds), not from test rows.
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
    """Summarise all metrics of all views for every amount of labels and variant.

    Args:
        results: of all runs, from ``assess``.
        labels, variants: in the order of the rows.

    Returns:
        "rows": means, and differences paired by seed: to the first variant with the same labels,
        to the full method, and of the fused opinion to every other view.
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
    """Summarise the runs of one variant and amount of labels, sorted by seed."""
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
        "missing": results[0]["missing"],
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
    """Return step and mean accuracy over seeds at the steps that all curves share."""
    by_step: list[dict[float, float]] = [{at[0]: at[1] for at in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(own) for own in by_step)))
    return [[step, statistics.fmean(own[step] for own in by_step)] for step in shared]


def over_seeds(
    results: Sequence[dict[str, Any]],
    view: str,
    minus: Sequence[dict[str, Any]] = (),
    minus_view: str = "",
) -> dict[str, dict[str, Any]]:
    """Summarise each metric of a view, or its differences to another view paired by seed.

    A metric that is undefined (None) for one of the seeds is omitted.
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
    """Format the tables, each under a caption with the comparison and the unit."""
    rows = table["rows"]
    others = list(rows[0]["fused_minus"])
    missing = rows[0]["missing"]
    modalities = [name for name in others if name not in missing]
    parts = [
        introduction(rows),
        fused_table(rows),
        *([curve_table(rows)] if all("val" in row for row in rows) else []),
        "**Fused against each modality alone**, accuracy in %; the differences are paired.",
        view_table(rows, modalities, [f"{name} alone" for name in modalities]),
        "**One modality missing** from every test sample, accuracy of the fused opinion in %. Of "
        "two modalities, the other one then decides alone.",
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
            f"**Out of distribution**: how well vacuity separates {rows[0]['n_other']} samples of "
            "another manifest from the test samples (AUROC; 0.5 is chance).",
            other_table(rows, ["fused", *modalities]),
        ]
    return "\n\n".join(parts) + "\n"


def introduction(rows: Sequence[dict[str, Any]]) -> str:
    """Describe the figures of all tables."""
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
    """Format the fused opinion of each variant, and its gain over the others."""
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
        'variants are not matched in time; only "supervised-long" has as many floating-point '
        'operations as "full".'
    )
    return f"{caption}\n\n{labelled_table(rows, [*head, 'trained'], lines)}"


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the accuracy on the val rows along each variant's fine-tuning."""
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
        "**Learning curves**: mean accuracy in % on the val rows, which select nothing here, after "
        "a quarter, half, three quarters and all of the steps, and the fall from the best to the "
        "last."
    )
    head = ["steps", *(f"{share} %" for share in quarters), "fall from the best"]
    return f"{caption}\n\n{labelled_table(rows, head, lines)}"


def view_table(rows: Sequence[dict[str, Any]], views: Sequence[str], titles: Sequence[str]) -> str:
    """Format the accuracies of the fused opinion and of other views, with paired differences."""
    lines = [
        [
            *(cell(row["views"][view].get("accuracy"), 100) for view in ("fused", *views)),
            *(cell(row["fused_minus"][view].get("accuracy"), 100, signed=True) for view in views),
        ]
        for row in rows
    ]
    return labelled_table(rows, ["fused", *titles, *(f"fused - {t}" for t in titles)], lines)


def metric_table(rows: Sequence[dict[str, Any]], shown: dict[str, tuple[str, int]]) -> str:
    """Format metrics of the fused opinion."""
    lines = [
        [cell(row["views"]["fused"].get(name), scale) for name, (_, scale) in shown.items()]
        for row in rows
    ]
    return labelled_table(rows, [title for title, _ in shown.values()], lines)


def other_table(rows: Sequence[dict[str, Any]], views: Sequence[str]) -> str:
    """Format the AUROC of vacuity against another manifest."""
    lines = [
        [cell(row["views"][view].get("out_of_distribution_auroc"), 1) for view in views]
        for row in rows
    ]
    return labelled_table(rows, views, lines)


def labelled_table(
    rows: Sequence[dict[str, Any]], head: Sequence[str], lines: Sequence[Sequence[str]]
) -> str:
    """Format a Markdown table whose rows begin with the amount of labels and the variant."""
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
    """Format the mean and half the interval of one metric."""
    if value is None:
        return "undefined"
    digits = 1 if scale == 100 else 3
    sign = "+" if signed else ""
    text = f"{scale * value['mean']:{sign}.{digits}f}"
    if value["interval"] is None:
        return text
    return f"{text} ± {scale * (value['interval'][1] - value['mean']):.{digits}f}"
