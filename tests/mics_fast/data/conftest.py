"""Real frames, which lie beside the checkout and not in it."""

from __future__ import annotations

from pathlib import Path

import pytest

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
