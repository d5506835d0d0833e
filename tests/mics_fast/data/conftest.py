"""Images to prepare and to load: made for a test, or real frames beside the checkout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.mics_fast.data.loading import noise, row, save
from tests.mics_fast.data.preparing import paint

FRAMES = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture(scope="session")
def kvasir_seg():
    """Folder of the Kvasir-SEG frames and their labels.csv."""
    if not (FRAMES / "kvasir_seg").is_dir():
        pytest.skip(f"{FRAMES / 'kvasir_seg'} is not there")
    return FRAMES / "kvasir_seg"


@pytest.fixture(scope="session")
def kvasir_mini5():
    """Folder of a folder a class of native Kvasir frames."""
    if not (FRAMES / "kvasir_mini5").is_dir():
        pytest.skip(f"{FRAMES / 'kvasir_mini5'} is not there")
    return FRAMES / "kvasir_mini5"


@pytest.fixture(scope="session")
def reference_resize():
    """reference_resize(pixels (H, W, C), side, region) -> (side, side, C) float64.

    A triangle filter that widens with the scale, in numpy; beyond its border the image goes on as
    its last pixel. The region is (top, left, bottom, right) in fractions of the image, and runs
    backwards where the result is flipped.
    """

    def weights(length, side, start, end):
        """(side, length): what each pixel of a line contributes to each of the result."""
        step = (end - start) * length / side
        centres = start * length + (np.arange(side) + 0.5) * step - 0.5
        reach = max(1.0, abs(step))
        first = int(np.floor(-reach)) - 1
        taps = np.arange(first, length - first)  # pixels of the image, and some beyond
        tent = np.maximum(0.0, 1 - abs(taps[None] - centres[:, None]) / reach)
        tent /= tent.sum(1, keepdims=True)
        matrix = np.zeros((side, length))
        for column, tap in enumerate(taps.clip(0, length - 1)):
            matrix[:, tap] += tent[:, column]
        return matrix

    def resize(pixels, side, region=(0, 0, 1, 1)):
        rows = weights(pixels.shape[0], side, region[0], region[2])
        columns = weights(pixels.shape[1], side, region[1], region[3])
        return np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)

    return resize


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def rows(folder):
    """Seven pairs of noise; manifest rows 100 to 106."""
    return [
        row(
            100 + i,
            save(noise(2 * i), folder / f"{i}-wli.png"),
            save(noise(2 * i + 1), folder / f"{i}-nbi.png"),
        )
        for i in range(7)
    ]
