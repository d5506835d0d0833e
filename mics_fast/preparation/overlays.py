"""Detection of what a recorder draws on frames: text in the border, and boxes in the corners.

Text may name patients or dates. A box or a logo that comes with some hospitals or classes only lets
a network tell these apart without looking at the tissue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLACK, _BRIGHT = 40, 120  # of 255: paper and ink of burned-in text
_EDGE = 0.25  # of the width, on either side, in which text is looked for
_STROKE = 0.012  # of the width: the widest stroke of a letter
_STROKES, _LINES = 4, 6  # strokes in a line of pixels of text, and lines of pixels with so many
_SMALLEST = 64  # pixels
_CORNER = 0.22  # of width and height
_FLAT = 0.3  # share of a corner that one colour must fill
_STEP = 16  # grey levels that count as one colour
_FEWEST, _LEAST_SHARE = 3, 0.02  # frames with the same box: at least so many, and this share

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Overlays:
    """Overlays found on a frame.

    Args:
        text: True if there seems to be text in its black border.
        corners: Corner -> colour of a flat area that is not black.
    """

    text: bool
    corners: dict[str, Colour]


def find_overlays(image: np.ndarray) -> Overlays:
    """Look for text and flat corners in a (H, W, 3) uint8 frame; in a tiny one there are none."""
    if min(image.shape[:2]) < _SMALLEST:
        return Overlays(False, {})
    return Overlays(has_text(image), flat_corners(image))


def has_text(image: np.ndarray) -> bool:
    """Return True if many thin bright strokes stand on black at the left or right of a frame.

    A stroke is a short bright run in a line of pixels with black on both sides. The edge of the
    picture makes one at most; highlights on dark tissue make few in one line.
    """
    ink = image.max(2)
    width = image.shape[1]
    reach, longest = int(_EDGE * width), max(2, int(_STROKE * width))
    sides = (ink[:, :reach], ink[:, width - reach :])
    return any((strokes(side, longest) >= _STROKES).sum() >= _LINES for side in sides)


def strokes(ink: np.ndarray, longest: int) -> np.ndarray:
    """Count in each line of (H, W) pixels the bright runs of at most ``longest`` between black."""
    black = ink <= _BLACK
    begins = np.flatnonzero(np.pad(black[:, :-1] & ~black[:, 1:], ((0, 0), (0, 1))))
    ends = np.flatnonzero(np.pad(~black[:, :-1] & black[:, 1:], ((0, 0), (0, 1))))
    following = ends.searchsorted(begins)
    begins, following = begins[following < len(ends)], following[following < len(ends)]
    last = ends[following]  # of the run that begins behind each black pixel, if in the same line
    width = ink.shape[1]
    short = (last - begins <= longest) & (last // width == begins // width)
    begins, last = begins[short], last[short]
    if not len(begins):
        return np.zeros(len(ink), dtype=np.int64)
    bounds = np.stack([begins + 1, last + 1], 1).ravel()
    brightest = np.maximum.reduceat(ink.ravel(), bounds)[::2]
    return np.bincount(begins[brightest > _BRIGHT] // width, minlength=len(ink))


def flat_corners(image: np.ndarray) -> dict[str, Colour]:
    """Find the corners that one colour other than black fills to a good part."""
    height, width = int(_CORNER * image.shape[0]), int(_CORNER * image.shape[1])
    tops = {"top": image[:height], "bottom": image[-height:]}
    found: dict[str, Colour] = {}
    for vertical, band in tops.items():
        for horizontal, corner in (("left", band[:, :width]), ("right", band[:, -width:])):
            steps = corner.reshape(-1, 3).astype(np.int64) // _STEP
            counts = np.bincount(steps @ np.array([256, 16, 1]))  # 16 steps per channel
            code = int(counts.argmax())
            colour = (code // 256 * _STEP, code // 16 % 16 * _STEP, code % 16 * _STEP)
            if counts.max() >= _FLAT * len(steps) and max(colour) > _BLACK:
                found[f"{vertical} {horizontal}"] = colour
    return found


def overlay_warnings(frames: Sequence[tuple[str, Overlays]]) -> list[str]:
    """Say what is drawn on frames, and on which, for example.

    Args:
        frames: Name and overlays of each.
    """
    warnings = []
    texts = [name for name, own in frames if own.text]
    if texts:
        warnings.append(
            f"{len(texts)} of {len(frames)} frames seem to have text in their border, such as "
            f"{texts[0]}: it may name patients or dates, and a network may learn from it; "
            "--crop-borders cuts borders, look at the contact sheet"
        )
    boxes = Counter((corner, colour) for _, own in frames for corner, colour in own.corners.items())
    fewest = max(_FEWEST, _LEAST_SHARE * len(frames))
    for (corner, colour), count in boxes.most_common():
        if count >= fewest:
            example = next(n for n, own in frames if own.corners.get(corner) == colour)
            warnings.append(
                f"{count} of {len(frames)} frames have the same colour in the {corner} corner, "
                f"such as {example}: a box or logo of the recorder, from which a network may learn"
            )
    return warnings
