"""The report of a run as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mics_fast.common.files import CONTROLS, printable
from mics_fast.reporting.images import cases, features, reconstructions
from mics_fast.reporting.numbers import (
    certainty,
    confusion,
    curves,
    metrics,
    referral,
    settings,
    summary,
)
from mics_fast.reporting.parts import Subject
from mics_fast.reporting.style import STYLE


def page(subject: Subject) -> str:
    """Write the report of a run."""
    name = printable(subject.run.folder.resolve().name) if subject.paths else "a run"
    pictures = (reconstructions(subject),) if subject.frames else ()
    sections = (
        summary(subject), cases(subject), certainty(subject), referral(subject), metrics(subject),
        confusion(subject), curves(subject), features(subject), *pictures, settings(subject),
    )  # fmt: skip
    return document(f"Report: {name}", sections)


def document(title: str, sections: Sequence[str]) -> str:
    """Write a document; the policy in its head forbids all requests."""
    name = escape(title)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f'<title>{name}</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
        f"</head><body><main><h1>{name}</h1>{''.join(sections)}</main></body></html>\n"
    )
    return text.translate({code: own for code, own in CONTROLS.items() if chr(code) not in "\t\n"})
