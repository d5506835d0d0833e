"""Images to prepare and to load: made for a test, or real frames beside the checkout."""

from __future__ import annotations

import numpy as np
import pytest

from tests.mics_fast.data.loading import noise, row, save


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
