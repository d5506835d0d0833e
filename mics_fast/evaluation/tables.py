"""The metrics of a run as tables: for the terminal, and as rows of text for every other page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDE = 160  # characters of a line in a file or a pipe

# What the table shows, in this order; the JSON holds more.
SHOWN = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
    "macro_auprc": "macro AUPRC",
    "kappa": "Cohen's kappa",
    "mcc": "MCC",
    "ece": "ECE",
    "adaptive_ece": "adaptive ECE",
    "brier": "Brier score",
    "nll": "NLL",
    "aurc": "AURC",
    "risk_at_80_coverage": "risk, 80 % covered",
    "coverage_at_5_risk": "covered at 5 % risk",
    "uncertainty": "uncertainty",
    "out_of_distribution_auroc": "OOD AUROC",
}
CLASS_COLUMNS = ("class", "n", "sensitivity", "95 %", "specificity", "95 %")
DIFFERENCE_COLUMNS = ("metric", "difference", "95 %")


def print_tables(result: dict[str, Any]) -> None:
    """The metrics of every view, those of every class, and the comparison where there is one."""
    console = wide_console()
    console.print(metrics_table(result))
    console.print(class_table(result))
    if "against" in result:
        console.print(difference_table(result["against"]))


def wide_console() -> Console:
    """Standard output; where that is no terminal, no column is squeezed into 80 characters."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


def metrics_table(result: dict[str, Any]) -> Table:
    """A row for each metric, a column for each view; derived modalities are called virtual."""
    title = f"{result['split']}: {result['n']} pairs, {len(result['classes'])} classes"
    table = Table("metric", title=title, box=box.SIMPLE_HEAD)
    views = {
        f"virtual {name}" if name in result["virtual"] else name: metrics
        for name, metrics in result["views"].items()
    } | {f"no {name}": metrics for name, metrics in result["missing"].items()}
    for name in views:
        table.add_column(name, justify="right")
        if name == "fused":
            table.add_column("95 %", justify="right")

    def add(title: str, values: Sequence[str]) -> None:
        table.add_row(title, values[0], "", *values[1:])

    for row in metric_rows(views):
        table.add_row(*row)
    for name in ("coverage", "precision"):
        if "pseudo_labels" in views["fused"]:
            judged = (metrics.get("pseudo_labels", {}) for metrics in views.values())
            values = [number(quality.get(name)) for quality in judged]
            add(f"pseudo {name}", values)
    add("n", [str(metrics["n"]) for metrics in views.values()])
    return table


def class_table(result: dict[str, Any]) -> Table:
    """Sensitivity and specificity of the fused opinion, a row for each class."""
    table = Table(title="fused, each class against the rest", box=box.SIMPLE_HEAD)
    for name in CLASS_COLUMNS:
        if name == "class":
            table.add_column(name, overflow="fold")  # a class name is never cut short
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in class_rows(result["views"]["fused"]):
        table.add_row(*row)
    return table


def difference_table(against: dict[str, Any]) -> Table:
    """Fused metrics of this run minus those of the other."""
    table = Table(title=f"fused: this run - {against['run']}", box=box.SIMPLE_HEAD)
    for name in DIFFERENCE_COLUMNS:
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in difference_rows(against):
        table.add_row(*row)
    return table


def metric_rows(views: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """For each metric its title, the fused value and its interval, the values of other views."""
    fused = views["fused"]
    others = [metrics for name, metrics in views.items() if name != "fused"]
    return [
        [title, number(fused[name]), interval(fused["intervals"].get(name))]
        + [number(metrics.get(name)) for metrics in others]
        for name, title in SHOWN.items()
        if name in fused
    ]


def class_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """For each class of a view the cells of ``CLASS_COLUMNS``."""
    return [
        [
            label,
            str(own["n"]),
            number(own["sensitivity"]),
            interval(own["intervals"]["sensitivity"]),
            number(own["specificity"]),
            interval(own["intervals"]["specificity"]),
        ]
        for label, own in metrics["per_class"].items()
    ]


def difference_rows(against: dict[str, Any]) -> list[list[str]]:
    """For each metric of the fused opinion the cells of ``DIFFERENCE_COLUMNS``."""
    return [
        [SHOWN[name], f"{value['difference']:+.3f}", interval(value["interval"])]
        for name, value in against["views"]["fused"].items()
    ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are plain text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def number(value: float | None) -> str:
    """Three decimals; nothing where there is no value, a dash where it is not defined."""
    if value is None:
        return ""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def interval(bounds: Sequence[float] | None) -> str:
    """Both ends of an interval, two decimals."""
    return "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"
