"""What the sections of the report have in common: their subject, and blocks of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from mics_fast.inference.evaluated import Evaluated
from mics_fast.training.run import Run


@dataclass
class Subject:
    """What the page is about.

    Args:
        run: its folder and options.
        evaluated: the run on the test rows, not calibrated.
        result: its metrics, see ``evaluate.summarise``.
        rival: the run to compare with, evaluated on the same rows; None without one.
        outside: vacuity (N,) of the rows of another distribution; None without them.
    """

    run: Run
    evaluated: Evaluated
    result: dict[str, Any]
    rival: Evaluated | None
    outside: torch.Tensor | None


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def text(*sentences: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(' '.join(sentences))}</p>"


def grid(*figure: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figure)}</div>'


def strip(caption: str, images: dict[str, str]) -> str:
    """Images side by side, each with its own title."""
    cells = "".join(
        f'<div><img src="{uri}" alt="{escape(title)}, {escape(caption)}">'
        f"<span>{escape(title)}</span></div>"
        for title, uri in images.items()
    )
    return (
        f'<figure><div class="strip">{cells}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
