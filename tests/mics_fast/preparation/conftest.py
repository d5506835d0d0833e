"""Images to prepare, painted for a test."""

from __future__ import annotations

import pytest

from tests.mics_fast.preparation.preparing import paint


@pytest.fixture
def kvasir(tmp_path):
    """Kvasir's own layout: 10 frames of one class, 6 of another, 1 of a third."""
    source = tmp_path / "kvasir"
    for label, count in (("polyps", 10), ("esophagitis", 6), ("z, line", 1)):
        for number in range(count):
            paint(source / label / f"{label[0]}{number}.jpg", (150 + 5 * number, 100, 90))
    return source


@pytest.fixture
def pairs(tmp_path):
    """The published pair layout; names sort differently in the two folders."""
    source = tmp_path / "pairs"
    for number in range(5):
        paint(source / "polyps_WLI" / f"{number}.png", (200, 10 * number, 0))
        paint(source / "polyps_NBI" / f"{number}.png", (0, 10 * number, 200))
    return source
