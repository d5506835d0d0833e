"""Figures as inline SVG: labelled axes, readable without colour, with a text alternative.

Every figure is an HTML ``<figure>`` that scales with the page. Series differ in colour (Okabe and
Ito's colour-blind-safe palette) and in dash or marker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6508")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")
# Markers around (0, 0): circle, square, triangle, diamond, plus, cross, triangle down, bar.
MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z", "M-3-3h6v6h-6z", "M0-4L4 3H-4z",
    "M0-4.5L4.5 0L0 4.5L-4.5 0z", "M-4-1h3v-3h2v3h3v2h-3v3h-2v-3h-3z",
    "M-3.5-2.5l1-1L0-1l2.5-2.5 1 1L1 0l2.5 2.5-1 1L0 1l-2.5 2.5-1-1L-1 0z", "M0 4L4-3H-4z",
    "M-4.5-1.5h9v3h-9z",
)  # fmt: skip

WIDTH, HEIGHT = 460, 310
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 48


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        label: quantity and unit.
        low, high: range, low < high.
    """

    label: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """Return four to eight round numbers within the range."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        while (self.high - self.low) / step > 8:
            step *= 2.5 if f"{step:e}".startswith("2") else 2
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def x(self, value: float) -> float:
        """Convert a value to pixels from the left."""
        share = (value - self.low) / (self.high - self.low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Convert a value to pixels from the top."""
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


@dataclass(frozen=True)
class Series:
    """One line: its name, and as many finite x as y."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def spanning(label: str, values: Sequence[float], *, zero: bool = False) -> Axis:
    """Make an axis that spans all values, and 0 if asked, with some margin."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    room = 0.04 * (high - low) or 0.5
    return Axis(label, low if zero and low == 0 else low - room, high + room)


def chart(caption: str, description: str, x: Axis, y: Axis, marks: str, legend: str = "") -> str:
    """Draw axes around marks.

    Args:
        caption: the message of the figure.
        description: text alternative, with the important numbers.
        x, y: the axes.
        marks: SVG.
        legend: HTML.
    """
    grid = "".join(
        f'<path class="grid" d="M{x.x(tick)} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<text x="{x.x(tick)}" y="{HEIGHT - BOTTOM + 16}" class="tick middle">{tick:g}</text>'
        for tick in map(_rounded, x.ticks())
    ) + "".join(
        f'<path class="grid" d="M{LEFT} {y.y(tick)}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y.y(tick) + 4}" class="tick end">{tick:g}</text>'
        for tick in map(_rounded, y.ticks())
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    labels = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" class="label middle">'
        f"{escape(x.label)}</text>"
        f'<text transform="translate(14 {middle}) rotate(-90)" class="label middle">'
        f"{escape(y.label)}</text>"
    )
    frame = f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(caption)} {escape(description)}">{grid}{frame}{marks}{labels}</svg>'
        f"{legend}<figcaption>{escape(caption)}</figcaption></figure>"
    )


def line_chart(
    caption: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    x: Axis | None = None,
    y: Axis | None = None,
) -> str:
    """Draw lines over common axes; the description states their first and last values."""
    x = x or spanning(x_label, [value for line in series for value in line.x])
    y = y or spanning(y_label, [value for line in series for value in line.y], zero=True)
    marks = "".join(
        f'<path class="line{" dot" if len(line.x) == 1 else ""}" stroke="{PALETTE[k % 8]}" '
        + f'stroke-dasharray="{DASHES[k % 8]}" d="M'
        + "L".join(f"{x.x(a)} {y.y(b)}" for a, b in zip(line.x, line.y, strict=True))
        + ("h0" if len(line.x) == 1 else "")  # a zero-length segment with round ends shows a dot
        + '"/>'
        for k, line in enumerate(series)
    )
    description = "; ".join(
        f"{line.name}: {line.y[0]:.3g} at {line.x[0]:g}, {line.y[-1]:.3g} at {line.x[-1]:g}"
        for line in series
    )
    keys = [] if len(series) == 1 else [
        (line.name, f'<path class="line" stroke="{PALETTE[k % 8]}" '
         f'stroke-dasharray="{DASHES[k % 8]}" d="M0 6H30"/>')
        for k, line in enumerate(series)
    ]  # fmt: skip
    return chart(caption, description, x, y, marks, legend_of(keys))


def histogram(caption: str, x_label: str, groups: Mapping[str, Sequence[float]]) -> str:
    """Draw the shares of each group in 20 bins of [0, 1]: the first filled, others as outlines."""
    shares = {
        name: np.histogram(np.clip(values, 0, 1), bins=20, range=(0, 1))[0] / max(1, len(values))
        for name, values in groups.items()
    }
    x = Axis(x_label, 0.0, 1.0)
    highest = 100 * max(share.max() for share in shares.values())
    y = Axis("share of the group, %", 0.0, 1.05 * highest)
    styles = (
        f'fill="{PALETTE[5]}" fill-opacity="0.75"',
        f'fill="none" stroke="{PALETTE[1]}" stroke-width="2"',
    )
    marks, keys = "", []
    for style, (name, share) in zip(styles, shares.items(), strict=False):
        steps = "".join(f"V{y.y(100 * value)}H{x.x((k + 1) / 20)}" for k, value in enumerate(share))
        marks += f'<path {style} d="M{x.x(0)} {y.y(0)}{steps}V{y.y(0)}z"/>'
        keys.append((f"{name} (n = {len(groups[name])})", f'<path {style} d="M1 1H29V11H1z"/>'))
    description = "; ".join(
        f"{name}: n = {len(values)}, median {np.median(values):.2f}"
        for name, values in groups.items()
        if len(values)
    )
    return chart(caption, description, x, y, marks, legend_of(keys))


def reliability_diagram(caption: str, confidence: np.ndarray, right: np.ndarray, bins: int) -> str:
    """Draw the accuracy per confidence bin against the diagonal, with the number of rows."""
    x, y = Axis("confidence (highest probability)", 0, 1), Axis("accuracy in the bin", 0, 1.08)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    dashed = '<path class="line" stroke="#555" stroke-dasharray="5 4" d="'
    marks = f'{dashed}M{x.x(0)} {y.y(0)}L{x.x(1)} {y.y(1)}"/>'
    stated = []
    for k in range(bins):
        rows = right[place == k]
        if not len(rows):
            continue
        left, width = x.x(k / bins) + 1, x.x(1 / bins) - x.x(0) - 2
        top = y.y(rows.mean())
        marks += (
            f'<path fill="{PALETTE[0]}" fill-opacity="0.8" '
            f'd="M{left} {y.y(0)}V{top}h{width:.1f}V{y.y(0)}z"/>'
            f'<text x="{left + width / 2:.1f}" y="{top - 3}" class="small middle">'
            f"{len(rows)}</text>"
        )
        stated.append(f"confidence {k / bins:.2f} to {(k + 1) / bins:.2f}: accuracy "
                      f"{rows.mean():.2f}, n = {len(rows)}")  # fmt: skip
    keys = [
        ("accuracy; number of rows above", f'<path fill="{PALETTE[0]}" d="M1 1H29V11H1z"/>'),
        ("perfectly calibrated", f'{dashed}M0 6H30"/>'),
    ]
    return chart(caption, "; ".join(stated), x, y, marks, legend_of(keys))


def scatter(
    caption: str, x_label: str, y_label: str, points: np.ndarray, label: np.ndarray,
    names: Sequence[str],
) -> str:  # fmt: skip
    """Draw points (N, 2) with one marker and colour per class."""
    x, y = spanning(x_label, points[:, 0].tolist()), spanning(y_label, points[:, 1].tolist())
    marks = "".join(
        f'<path fill="{PALETTE[k % 8]}" fill-opacity="0.8" d="{MARKERS[k % 8]}" '
        f'transform="translate({x.x(a)} {y.y(b)})"/>'
        for (a, b), k in zip(points.tolist(), label.tolist(), strict=True)
    )
    keys = [
        (f"{name} (n = {int((label == k).sum())})",
         f'<path fill="{PALETTE[k % 8]}" d="{MARKERS[k % 8]}" transform="translate(15 6)"/>')
        for k, name in enumerate(names)
    ]  # fmt: skip
    description = "; ".join(
        f"{name}: centre ({points[label == k, 0].mean():.2g}, {points[label == k, 1].mean():.2g})"
        for k, name in enumerate(names)
        if (label == k).any()
    )
    return chart(caption, description, x, y, marks, legend_of(keys))


def legend_of(keys: Sequence[tuple[str, str]]) -> str:
    """Draw names beside their marks, each an SVG of 30 x 12."""
    entries = "".join(
        f'<li><svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">{mark}</svg>'
        f"{escape(name)}</li>"
        for name, mark in keys
    )
    return f'<ul class="legend">{entries}</ul>' if keys else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Make an HTML table of plain text; the first column names the row."""
    cells = [[f"<td>{escape(cell)}</td>" for cell in row[1:]] for row in rows]
    return _table("", head, [row[0] for row in rows], cells, caption)


def confusion_table(counts: Sequence[Sequence[int]], names: Sequence[str], caption: str) -> str:
    """Make a table of counts, shaded by their share of the row; columns have the rows' numbers."""

    def cell(value: int, share: float) -> str:
        ink = "#fff" if share > 0.85 else "#111"  # the one with more contrast
        return f'<td style="background:rgba(0,114,178,{share:.2f});color:{ink}">{value}</td>'

    cells = [[cell(value, value / max(1, sum(row))) for value in row] for row in counts]
    numbered = [f"{k + 1} {name}" for k, name in enumerate(names)]
    head = ["truth \\ answer", *(str(k + 1) for k in range(len(names)))]
    return _table("confusion", head, numbered, cells, caption)


def belief_table(views: Mapping[str, Mapping[str, float]], truth: str, caption: str) -> str:
    """Draw bars of belief: one row per class and one for uncertainty, one column per opinion."""

    def cell(value: float) -> str:
        bar = f'<span class="bar" style="width:{100 * value:.0f}%"></span>'
        return f'<td><span>{value:.2f}</span><div class="track">{bar}</div></td>'

    names = list(next(iter(views.values())))
    cells = [[cell(belief[name]) for belief in views.values()] for name in names]
    marked = [f"{name} (truth)" if name == truth else name for name in names]
    return _table("belief", ["belief", *views], marked, cells, caption)


def _table(
    kind: str,
    head: Sequence[str],
    names: Sequence[str],
    cells: Sequence[Sequence[str]],
    caption: str,
) -> str:
    """Make a table of HTML cells that scrolls sideways on narrow pages."""
    top = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(row)}</tr>'
        for name, row in zip(names, cells, strict=True)
    )
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="wide" tabindex="0">'
        f'<table class="{kind}" aria-label="{escape(caption)}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></figure>"
    )


def _rounded(value: float) -> float:
    """Remove the noise of binary fractions, so that 0.30000000000000004 is shown as 0.3."""
    return round(value, 10)
