"""The report of a cross-validation as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mics_fast.common.files import printable
from mics_fast.reporting import figures
from mics_fast.reporting.images import cases
from mics_fast.reporting.numbers import (
    certainty,
    confusion,
    facts,
    metrics,
    opening,
    referral,
    settings,
)
from mics_fast.reporting.page import document
from mics_fast.reporting.parts import Subject, section, text


def pooled_page(
    subject: Subject, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """Write the document.

    Args:
        subject: The pooled opinions; its run is that of the first fold.
        title: Name of the cross-validation.
        columns, rows: The scores of each fold.
    """
    evaluation = subject.evaluation
    start = (
        f'<p class="opening">{escape(opening(evaluation))}</p>'
        + text(
            f"{evaluation.n} samples in {evaluation.groups} groups, {len(evaluation.classes)} "
            f"classes, each judged by the one of {len(rows)} runs that was not trained on it. "
            "The fused opinion:"
        )
        + facts(evaluation)
    )
    caption = "The fused opinion of each run on its own test rows"
    sections = (
        start, cases(subject), certainty(subject), referral(subject), metrics(subject),
        section("Each fold", figures.table(columns, rows, caption)), confusion(subject),
        settings(subject),
    )  # fmt: skip
    return document(f"Cross-validation: {printable(title)}", sections)
