"""Shared by the trainer's tests: tiny networks and batches that need no file."""

from __future__ import annotations

import pytest
import torch

from mics_fast.data.pipeline import PairBatch
from mics_fast.models.sizes import Size

TINY = Size(
    image=16, patch=4, width=16, depth=2, heads=2,
    decoder_width=16, decoder_depth=1, decoder_heads=2,
    discriminator_width=16, discriminator_depth=2, discriminator_heads=2,
)  # fmt: skip


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def make_batch():
    """make_batch(rows, ...) -> PairBatch of two modalities."""

    def make(rows, classes=3, first_id=0, strong=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def images():
            return torch.randn(rows, 3, TINY.image, TINY.image, generator=generator)

        identity = torch.arange(first_id, first_id + rows)
        return PairBatch(
            views={"wli": images(), "nbi": images()},
            strong={"wli": images(), "nbi": images()} if strong else None,
            present=torch.ones(rows, 2, dtype=torch.bool),
            label=identity % classes,
            labelled=torch.ones(rows, dtype=torch.bool),
            sample_id=identity,
            group_id=identity,
        )

    return make
