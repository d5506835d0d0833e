"""Parts shared by all sections of the report: the subject, and blocks of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch

from mics_fast.evaluation.results import Evaluation
from mics_fast.inference.assessment import Assessment
from mics_fast.training.run import Run


@dataclass
class Subject:
    """The run under report.

    Args:
        run: Folder and options.
        assessment: Opinions of the run on the test rows.
        evaluation: Its metrics.
        rival: The run to compare with, assessed on the same rows; None without one.
        outside: Vacuity of the rows of another distribution, (N,); None without them.
        paths: True to show names of files and folders.
        frames: True to show images of samples and overlays on them.
        explains: True to explain the cases with the classifier of the assessment.
    """

    run: Run
    assessment: Assessment
    evaluation: Evaluation
    rival: Assessment | None
    outside: torch.Tensor | None
    paths: bool = True
    frames: bool = True
    explains: bool = True


def section(title: str, *parts: str) -> str:
    """Make a section with a heading."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def text(*sentences: str) -> str:
    """Make a paragraph of plain text."""
    return f"<p>{escape(' '.join(sentences))}</p>"


def tables(*table: str) -> str:
    """Place tables side by side, each as wide as its cells, if there is room."""
    return f'<div class="tables">{"".join(table)}</div>'


def grid(*figure: str) -> str:
    """Place figures side by side if there is room."""
    return f'<div class="grid">{"".join(figure)}</div>'


def strip(caption: str, images: dict[str, str]) -> str:
    """Place images side by side, each with its own title."""
    cells = "".join(
        f'<div><img src="{uri}" alt="{escape(title)}, {escape(caption)}">'
        f"<span>{escape(title)}</span></div>"
        for title, uri in images.items()
    )
    return (
        f'<figure><div class="strip">{cells}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
