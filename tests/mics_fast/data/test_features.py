"""Batches of kept features: the rows of the training stream, in its order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.data.features import FeatureLoader, FeaturePass, FeatureRows, Features
from mics_fast.data.loaders import TrainLoader
from mics_fast.data.manifest import read_manifest
from mics_fast.options import AugmentConfig, DataConfig

CPU = torch.device("cpu")


@pytest.fixture
def rows(phantom_manifest):
    return read_manifest(Path(phantom_manifest)).select("train")


def numbered(rows, views=3):
    """Features that name their row, and, augmented, their view: [row, view + 1], plain [row, 0]."""
    index = torch.tensor([row.index for row in rows], dtype=torch.float32)
    plain = torch.stack([index, torch.zeros_like(index)], 1)
    augmented = plain.repeat_interleave(views, 0)
    augmented[:, 1] = 1 + torch.arange(views).repeat(len(rows))
    present = torch.ones(len(rows), 2, dtype=torch.bool)
    both = (dict.fromkeys(("wli", "nbi"), own) for own in (plain, augmented))
    return Features(rows, present, *both)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 2)])
def test_the_stream_is_that_of_images(rows, balanced, ranks, parts):
    rows = [row for row in rows if row.labelled]
    how = {"seed": 5, "step": 2, "balanced": balanced, "world_size": ranks, "parts": parts}
    for rank in range(ranks):
        images = TrainLoader(rows, ("wli", "nbi"), data=DataConfig(), augment=AugmentConfig(),
                             image_size=16, batch_size=8, device=CPU, rank=rank, **how)  # fmt: skip
        kept = FeatureLoader(FeatureRows(numbered(rows), rows, CPU), 8, rank=rank, **how)
        for _ in range(4):
            ours, theirs = next(kept), next(images)
            for name in ("sample_id", "label", "labelled", "group_id", "present"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_each_row_brings_its_own_features_and_the_view_of_its_epoch(rows):
    loader = FeatureLoader(FeatureRows(numbered(rows), rows, CPU), 6, seed=1, strong=True)
    seen = torch.zeros(len(rows), dtype=torch.int64)
    place = {row.index: number for number, row in enumerate(rows)}
    for _ in range(20):
        batch = next(loader)
        for name in ("wli", "nbi"):
            assert torch.equal(batch.views[name][:, 0].long(), batch.sample_id)
            assert torch.equal(batch.strong[name][:, 0].long(), batch.sample_id)
            assert not batch.views[name][:, 1].any()
        for number, sample in enumerate(batch.sample_id.tolist()):
            assert batch.strong["wli"][number, 1] == 1 + seen[place[sample]] % 3
            seen[place[sample]] += 1


def test_without_augmented_views_the_strong_view_is_the_plain_one(rows):
    loader = FeatureLoader(FeatureRows(numbered(rows, views=0), rows, CPU), 6, seed=1, strong=True)
    batch = next(loader)
    assert torch.equal(batch.strong["nbi"], batch.views["nbi"])


def test_a_pass_holds_every_row_once_in_order(rows):
    batches = list(FeaturePass(FeatureRows(numbered(rows), rows, CPU), 7))
    assert torch.cat([b.sample_id for b in batches]).tolist() == [row.index for row in rows]


def test_rows_without_features_are_left_out(rows):
    source = FeatureRows(numbered(rows[3:]), rows, CPU)
    assert [row.index for row in source.rows] == [row.index for row in rows[3:]]
    with pytest.raises(InputError, match="none of 2 rows"):
        FeatureRows(numbered(rows), [replace(row, index=10**6) for row in rows[:2]], CPU)
