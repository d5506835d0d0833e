"""The metrics of a run as tables for the terminal; their names and number formats everywhere."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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

    def add(title: str, values: Sequence[str], bounds: Sequence[float] | None = None) -> None:
        table.add_row(title, values[0], interval(bounds), *values[1:])

    for name, shown in SHOWN.items():
        if name in views["fused"]:
            values = [number(metrics.get(name)) for metrics in views.values()]
            add(shown, values, views["fused"]["intervals"].get(name))
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
    table.add_column("class", overflow="fold")  # a class name is never cut short
    for name in ("n", "sensitivity", "95 %", "specificity", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, metrics in result["views"]["fused"]["per_class"].items():
        cells = []
        for name in ("sensitivity", "specificity"):
            cells += [number(metrics[name]), interval(metrics["intervals"][name])]
        table.add_row(label, str(metrics["n"]), *cells)
    return table


def difference_table(against: dict[str, Any]) -> Table:
    """Fused metrics of this run minus those of the other."""
    table = Table(title=f"fused: this run - {against['run']}", box=box.SIMPLE_HEAD)
    for name in ("metric", "difference", "95 %"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, value in against["views"]["fused"].items():
        table.add_row(SHOWN[name], f"{value['difference']:+.3f}", interval(value["interval"]))
    return table


def number(value: float | None) -> str:
    """Three decimals; nothing where there is no value, a dash where it is not defined."""
    if value is None:
        return ""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def interval(bounds: Sequence[float] | None) -> str:
    """Both ends of an interval, two decimals."""
    return "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"
