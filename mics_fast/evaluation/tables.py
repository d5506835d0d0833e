"""Tables of results: for the terminal, and as rows of text for pages and model cards."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mics_fast.common.files import printable
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import FUSED, Source
from mics_fast.evaluation.prediction_sets import SetQuality
from mics_fast.evaluation.referral import Rule
from mics_fast.evaluation.results import Comparison, Evaluation, OpinionMetrics

WIDE = 160  # characters per line of a file or a pipe

# Metrics in the tables, in this order; the JSON holds more.
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
REFERRAL_COLUMNS = (
    "refer if", "answered", "95 %", "wrong of all", "95 %", "wrong of answered", "95 %",
)  # fmt: skip
DIFFERENCE_COLUMNS = ("metric", "difference", "95 %")


def print_tables(evaluation: Evaluation) -> None:
    """Print the metrics of every opinion and every class, and the comparison, if any."""
    console = wide_console()
    console.print(metrics_table(evaluation))
    console.print(class_table(evaluation))
    if evaluation.referrals:
        console.print(referral_table(evaluation))
        console.print(guarantee(evaluation.point))
    if evaluation.sets:
        console.print(set_sentence(evaluation.sets))
    if evaluation.against:
        console.print(difference_table(evaluation.against))


def wide_console() -> Console:
    """Make a console for tables of plain text on standard output.

    Names are not read as markup. Output to a file or a pipe is not squeezed into 80 columns.
    """
    width = None if Console().is_terminal or "COLUMNS" in os.environ else WIDE
    return Console(width=width, markup=False, emoji=False, highlight=False)


def metrics_table(evaluation: Evaluation) -> Table:
    """Make a table with one row per metric and one column per opinion."""
    title = f"{evaluation.split}: {evaluation.n} pairs, {len(evaluation.classes)} classes"
    columns = shown_columns(evaluation)
    table = Table("metric", title=title, box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(printable(name), justify="right")
        if name == FUSED.name:
            table.add_column("95 %", justify="right")
    for row in metric_rows(columns):
        table.add_row(*row)

    def add(title: str, values: Sequence[str]) -> None:
        table.add_row(title, values[0], "", *values[1:])

    judged = [own.pseudo_labels for own in columns.values()]
    if judged[0]:
        add("pseudo coverage", [number(own["coverage"] if own else None) for own in judged])
        add("pseudo precision", [number(own["precision"] if own else None) for own in judged])
    add("n", [str(own.n) for own in columns.values()])
    return table


def shown_columns(evaluation: Evaluation) -> dict[str, OpinionMetrics]:
    """Map column titles to opinions; derived modalities are called virtual.

    With two modalities, the fused opinion without one equals the other, so both are omitted.
    """
    modalities = sum(not source.missing for source in evaluation.metrics) - 1
    return {
        _title(source, evaluation.virtual): own
        for source, own in evaluation.metrics.items()
        if not (source.missing and modalities == 2)
    }


def _title(source: Source, virtual: Sequence[str]) -> str:
    if source.missing:
        return f"no {source.name}"
    return f"virtual {source.name}" if source.name in virtual else source.name


def class_table(evaluation: Evaluation) -> Table:
    """Make a table of sensitivity and specificity of the fused opinion, one row per class."""
    table = Table(title="fused, each class against the rest", box=box.SIMPLE_HEAD)
    for name in CLASS_COLUMNS:
        if name == "class":
            table.add_column(name, overflow="fold")  # a class name is never cut short
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in class_rows(evaluation.fused):
        table.add_row(*row)
    return table


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> Table:
    """Lay out cells whose first column is a name and whose others are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def difference_table(against: Comparison) -> Table:
    """Make a table of fused metrics of this run minus those of the other."""
    title = f"fused: this run - {printable(against.run)}"
    return table_of(DIFFERENCE_COLUMNS, difference_rows(against), title)


def referral_table(evaluation: Evaluation) -> Table:
    """Make a table of answered and wrong samples, one row per rule."""
    title = f"referral to a person, on {evaluation.split} (fused)"
    return table_of(REFERRAL_COLUMNS, referral_rows(evaluation), title)


def referral_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return the cells of ``REFERRAL_COLUMNS`` for each rule; the rule in force is marked."""
    rows = []
    for own in evaluation.referrals:
        kept = " (kept)" if own.rule == evaluation.point.rule else ""
        cells = [f"{rule_text(own.rule)}{kept}"]
        for name in ("coverage", "risk", "error"):
            cells += [number(own.values[name]), interval(own.intervals[name])]
        rows.append(cells)
    return rows


def referral_sentence(values: Mapping[str, float]) -> str:
    """Say how good the answers are, and how good if the least certain are left to a person.

    Args:
        values: Of the fused opinion, see ``metrics.prediction_metrics``.
    """
    return (
        f"Of 100 patients like these the model is right on {100 * values['accuracy']:.0f}; if it "
        f"may refer the 20 it is least sure of, on {1 - values['risk_at_80_coverage']:.0%} of the "
        "rest."
    )


def set_sentence(sets: SetQuality) -> str:
    """Say what prediction sets hold, and how large they are."""
    values, ends = sets.values, sets.intervals["covered"]
    return (
        f"Prediction sets for a coverage of {sets.rule.coverage:.0%}: {values['covered']:.1%} of "
        f"them hold the truth (95 %: {100 * ends[0]:.0f} to {100 * ends[1]:.0f} %), with "
        f"{values['size']:.1f} classes on average; {values['single']:.0%} name one class. The "
        "coverage holds on average over draws of the val rows, for new groups from the same source."
    )


def rule_text(rule: Rule) -> str:
    """Describe in words when a rule refers."""
    if refers_all(rule):
        return f"always, by {rule.by}"
    return f"{rule.by} {'above' if rule.by == 'uncertainty' else 'below'} {rule.limit:.3f}"


def refers_all(rule: Rule) -> bool:
    """Return True for the rule that is chosen where no limit satisfies the target."""
    return not math.isfinite(rule.limit) or (rule.by == "uncertainty" and rule.limit == 0)


def guarantee(point: OperatingPoint) -> str:
    """State the guarantee of a rule and its conditions."""
    if point.target is None:
        return "No guarantee: the threshold was not chosen for a target risk."
    often = (
        "on average over draws of the val rows"
        if point.target.confidence is None
        else f"for at least {point.target.confidence:.0%} of the draws of the val rows"
    )
    never = "No limit keeps this risk on the val rows, so every sample is referred. "
    return (
        (never if point.rule and refers_all(point.rule) else "")
        + f"Guarantee: at most {point.target.risk:.1%} of all samples are answered and wrong, "
        f"{often}, for new groups from the same source (conformal risk control). It is approximate "
        "where the val rows also chose the checkpoint, or a calibration for referral by "
        "probability."
    )


def metric_rows(columns: Mapping[str, OpinionMetrics]) -> list[list[str]]:
    """Return for each metric its title, the fused value, its interval, and the other values."""
    fused, *others = columns.values()
    return [
        [title, number(fused.values[name]), interval(fused.intervals.get(name))]
        + [number(own.values.get(name)) for own in others]
        for name, title in SHOWN.items()
        if name in fused.values
    ]


def class_rows(metrics: OpinionMetrics) -> list[list[str]]:
    """Return the cells of ``CLASS_COLUMNS`` for each class."""
    return [
        [
            printable(label),
            str(own.n),
            number(own.values["sensitivity"]),
            interval(own.intervals["sensitivity"]),
            number(own.values["specificity"]),
            interval(own.intervals["specificity"]),
        ]
        for label, own in metrics.per_class.items()
    ]


def difference_rows(against: Comparison) -> list[list[str]]:
    """Return the cells of ``DIFFERENCE_COLUMNS`` for each metric of the fused opinion."""
    return [
        [SHOWN[name], f"{value['difference']:+.3f}", interval(value["interval"])]
        for name, value in against.differences[FUSED].items()
    ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table; bars in cells are escaped, other Markdown is kept."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("\\|", "|").replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


def markdown_text(text: str) -> str:
    """Escape a name for Markdown, and for the HTML that Markdown passes through."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", printable(text).replace("&", "&amp;"))


def number(value: float | None) -> str:
    """Format with three decimals; "" for None, a dash if undefined."""
    if value is None:
        return ""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def interval(bounds: Sequence[float] | None) -> str:
    """Format both ends of an interval with two decimals; "" for None, a dash if undefined."""
    if bounds is None:
        return ""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}" if all(map(math.isfinite, bounds)) else "-"
