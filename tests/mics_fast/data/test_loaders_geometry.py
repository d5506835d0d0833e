"""Crops and flips, seen in images that hold their own coordinates: a pair moves as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mics_fast.data.augmentation import draw_augmentation
from mics_fast.data.cache import FrameCache
from mics_fast.options import AugmentConfig, CacheConfig
from tests.mics_fast.data.loading import (
    CPU,
    EVERYTHING,
    GREY_LEVELS,
    NAMES,
    NO_COLOUR,
    row,
    save,
    take,
    train,
)


def coordinates(channels, side, scale=1):
    """A square image whose two given channels are x and y in units of the larger image."""
    ramp = ((np.arange(side) + 0.5) * scale - 0.5).round().astype(np.uint8)
    pixels = np.full((side, side, 3), 128, np.uint8)
    pixels[..., channels[0]] = ramp
    pixels[..., channels[1]] = ramp[:, None]
    return pixels


@pytest.fixture(scope="module")
def coordinate_rows(folder):
    """Sixteen copies of one pair: the same 256 x 256 coordinates, in other channels."""
    wli = save(coordinates((0, 1), 256), folder / "xy-wli.png")
    nbi = save(coordinates((2, 0), 256), folder / "xy-nbi.png")
    return [row(i, wli, nbi) for i in range(16)]


STILL = AugmentConfig(crop_scale=(0.1, 0.9), crop_ratio=(0.5, 2.0), weak=NO_COLOUR)


def test_a_pair_is_cropped_and_flipped_as_one(coordinate_rows):
    batch = next(train(coordinate_rows, augment=STILL, image_size=64, batch_size=16))
    wli, nbi = batch.views["wli"], batch.views["nbi"]
    assert torch.equal(wli[:, [0, 1]], nbi[:, [2, 0]])
    ramps = wli[:, 0, 0, -1] - wli[:, 0, 0, 0], wli[:, 1, -1, 0] - wli[:, 1, 0, 0]
    assert all((ramp < 0).any() and (ramp > 0).any() for ramp in ramps)


def test_a_pair_of_unequal_sizes_shows_the_same_part_of_the_scene(folder, coordinate_rows):
    small = save(coordinates((2, 0), 128, scale=2), folder / "xy-nbi-small.png")
    some = [replace(r, files={**r.files, "nbi": small}) for r in coordinate_rows]
    batch = next(train(some, augment=STILL, image_size=64, batch_size=16))
    difference = (batch.views["wli"][:, [0, 1]] - batch.views["nbi"][:, [2, 0]]).abs()
    assert difference.max() <= 3.0  # both crops begin and end at whole pixels, one of them of 2


def test_the_crop_and_the_flips_are_those_that_were_drawn(coordinate_rows):
    batch = next(train(coordinate_rows, augment=STILL, image_size=64, batch_size=16))
    centres = (np.arange(64) + 0.5) / 64
    for k, i in enumerate(batch.sample_id.tolist()):
        drawn = draw_augmentation(STILL, seed=0, epoch=0, sample_id=i, modalities=2)
        found = batch.views["wli"][k, 0, 32], batch.views["wli"][k, 1, :, 32]
        for axis in range(2):
            place = centres[::-1] if drawn.flip[axis] else centres
            expected = (drawn.anchor[axis] + place * drawn.shape[axis]) * 256 - 0.5
            assert abs(found[axis].numpy() - expected)[2:-2].max() <= 1.5


def test_weak_and_strong_views_share_their_geometry(coordinate_rows):
    config = replace(STILL, strong=NO_COLOUR)
    batch = next(train(coordinate_rows, augment=config, image_size=64, batch_size=16, strong=True))
    assert all(torch.equal(batch.views[name], batch.strong[name]) for name in NAMES)


def test_crops_of_large_frames_never_leave_the_frame(folder):
    path = save(np.zeros((1072, 1920, 3), np.uint8), folder / "large.bmp")
    config = AugmentConfig(crop_scale=(0.01, 1.0), crop_ratio=(0.2, 5.0))
    loader = train([row(0, path, None)], augment=config, batch_size=64)
    assert len(take(loader, 2)[1].label) == 64


@pytest.fixture(scope="module")
def block_rows(folder):
    """Sixteen copies of a pair that shows one pattern of large blocks, in other colours."""
    pattern = np.kron(np.random.default_rng(5).integers(0, 2, (9, 9)), np.ones((28, 28), int))
    files = []
    for name, dark, bright in (
        ("wli", (60, 40, 30), (200, 150, 140)),
        ("nbi", (30, 60, 70), (90, 180, 190)),
    ):
        pixels = np.where(pattern[..., None], bright, dark).astype(np.uint8)
        files.append(save(pixels, folder / f"blocks-{name}.png"))
    return [row(i, *files) for i in range(16)]


def bright(view):
    """Mark the pixels brighter than half way between an image's blocks, (H, W) bool."""
    grey = view.float().sum(0)
    return grey > (grey.min() + grey.max()) / 2


def near_an_edge(mask):
    """The pixels of a mask with another value among their eight neighbours."""
    padded = torch.nn.functional.pad(mask[None, None].float(), (1, 1, 1, 1), mode="replicate")
    highest = torch.nn.functional.max_pool2d(padded, 3, 1)[0, 0]
    lowest = -torch.nn.functional.max_pool2d(-padded, 3, 1)[0, 0]
    return highest != lowest


@pytest.mark.parametrize("mode", ["none", "host"])
def test_every_augmentation_leaves_a_pair_aligned_to_a_pixel(block_rows, mode):
    data = replace(GREY_LEVELS, cache=CacheConfig(mode))
    cache = None
    if mode == "host":
        cache = FrameCache(block_rows, NAMES, data=data, image_size=96, device=CPU)
    loader = train(
        block_rows, augment=EVERYTHING, data=data, image_size=96, batch_size=16, strong=True,
        cache=cache,
    )  # fmt: skip
    shares = []
    for batch in take(loader, 3):
        for k in range(16):
            masks = [
                bright(views[name][k]) for views in (batch.views, batch.strong) for name in NAMES
            ]
            for mask in masks[1:]:
                differs = mask != masks[0]
                # The outermost pixels may show a sliver of the next block in one view alone.
                assert not (differs & ~near_an_edge(masks[0]))[1:-1, 1:-1].any()
                shares.append(differs.float().mean().item())
    # a shift by one pixel would move all of the edges: 4 % of the pixels
    assert np.mean(shares) < 0.01
