"""Rotation, shear and erased boxes of the strong view."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.data.augmentation import draw_augmentation
from mics_fast.data.distortions import affine_of, boxes_of, erased, warped
from mics_fast.data.views import Changes, make_view
from mics_fast.options import AugmentConfig, DataConfig, TrainConfig, check_config
from tests.mics_fast.data.loading import NAMES, NO_COLOUR, WHOLE_FRAME, noise, row, save, train

STILL = AugmentConfig(**WHOLE_FRAME, weak=NO_COLOUR, strong=NO_COLOUR)


def draws(config, count=500):
    return [
        draw_augmentation(config, seed=0, epoch=0, sample_id=i, modalities=2) for i in range(count)
    ]


def smooth(side):
    """(side, side, 3) uint8 without edges, so that filters agree."""
    y, x = np.mgrid[:side, :side] / side
    waves = [127 + 100 * np.sin(2 * np.pi * (x * a + y * b)) for a, b in ((1, 1), (2, 1), (1, 2))]
    return np.stack(waves, 2).astype(np.uint8)


@pytest.mark.parametrize("angle", [-150.0, 30.0, 90.0])
def test_a_rotation_is_pillow_s(angle):
    pixels = smooth(64)
    planes = torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]
    ours = warped(planes, torch.from_numpy(affine_of(angle, 0.0))[None])[0]
    theirs = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR)
    y, x = np.mgrid[:64, :64] - 31.5
    inside = np.hypot(x, y) < 30  # in the corners Pillow has black
    error = abs(ours.permute(1, 2, 0).numpy() - np.asarray(theirs, dtype=float))[inside]
    assert error.max() < 3


def test_no_angle_changes_nothing():
    planes = torch.rand(2, 3, 16, 16)
    same = torch.from_numpy(affine_of(0.0, 0.0)).expand(2, -1, -1)
    torch.testing.assert_close(warped(planes, same), planes)


def test_a_shear_moves_rows_by_their_height():
    planes = torch.zeros(1, 3, 33, 33)
    planes[..., 16] = 1.0  # a vertical line through the centre
    sheared = warped(planes, torch.from_numpy(affine_of(0.0, 45.0))[None])[0, 0]
    assert sheared[8:25].argmax(1).tolist() == list(range(24, 7, -1))


def test_what_is_beyond_the_border_mirrors_what_is_inside():
    planes = torch.full((1, 3, 16, 16), 7.0)
    turned = warped(planes, torch.from_numpy(affine_of(45.0, 0.0))[None])
    torch.testing.assert_close(turned, planes)


def test_a_box_is_erased_to_zero_and_the_rest_stays():
    view = torch.rand(2, 3, 8, 8) + 1
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]])
    found = erased(view, boxes)
    expected = view.clone()
    expected[0, :, 2:4, 4:8] = 0
    assert torch.equal(found, expected)


def test_boxes_lie_inside_and_fill_their_range():
    uniform = np.random.default_rng(0).random((4000, 4))
    top, left, bottom, right = boxes_of(0.4, uniform).astype(np.float64).T
    height, width = bottom - top, right - left
    area = height * width
    assert min(top.min(), left.min()) >= 0 and max(bottom.max(), right.max()) <= 1 + 1e-6
    assert area.min() < 0.01 and 0.39 < area.max() <= 0.4 + 1e-6
    assert abs(area.mean() - 0.2) < 4 * 0.4 / np.sqrt(12 * 4000)
    ratio = width / height
    assert 0.5 - 1e-5 <= ratio.min() < 0.51 and 1.98 < ratio.max() <= 2 + 1e-5


def test_a_pair_shares_its_rotation_and_each_modality_has_its_own_box():
    config = replace(STILL, rotation=180.0, shear=10.0, erasing=0.3)
    drawn = draws(config)
    assert len({own.affine.tobytes() for own in drawn}) == len(drawn)
    assert all(own.affine.shape == (2, 3) for own in drawn)
    assert not any((own.boxes[0] == own.boxes[1]).any() for own in drawn)


def test_distortions_leave_all_other_numbers_alone():
    for plain, distorted in zip(draws(AugmentConfig(), 20),
                                draws(AugmentConfig(rotation=90.0, shear=9.0, erasing=0.5), 20),
                                strict=True):  # fmt: skip
        for name in ("anchor", "shape", "flip", "weak", "strong"):
            assert np.array_equal(getattr(plain, name), getattr(distorted, name))


def test_the_strong_view_alone_is_distorted(folder):
    files = [save(noise(k, 32, 32), folder / f"distorted-{k}.png") for k in range(2)]
    rows = [row(i, *files) for i in range(4)]
    options = {"image_size": 32, "batch_size": 4, "strong": True}
    config = replace(STILL, rotation=60.0, shear=10.0, erasing=0.3)
    plain = next(train(rows, augment=STILL, **options))
    batch = next(train(rows, augment=config, **options))
    for column, name in enumerate(NAMES):
        assert torch.equal(batch.views[name], plain.views[name])
        for k, i in enumerate(batch.sample_id.tolist()):
            drawn = draw_augmentation(config, seed=0, epoch=0, sample_id=i, modalities=2)
            affine = torch.from_numpy(drawn.affine)[None]
            box = torch.from_numpy(drawn.boxes[column])[None]
            grey = plain.strong[name][k : k + 1]
            expected = erased(warped(grey, affine), box)
            torch.testing.assert_close(batch.strong[name][k : k + 1], expected)


def test_a_batch_is_changed_as_its_samples_one_by_one():
    planes = 255 * torch.rand(3, 3, 16, 16)
    drawn = draws(AugmentConfig(rotation=90.0, erasing=0.5), 3)
    changes = Changes(
        torch.eye(3).expand(3, -1, -1),
        torch.zeros(3),
        torch.from_numpy(np.array([own.affine for own in drawn])),
        torch.from_numpy(np.array([own.boxes[0] for own in drawn])),
    )
    data = DataConfig(normalize="image")
    whole = make_view(planes, "wli", data, changes)
    for k in range(3):
        one = make_view(planes[k : k + 1], "wli", data, changes.of_sample(k))
        torch.testing.assert_close(whole[k : k + 1], one)
        assert (one == 0).all(1).any(), "the box is 0 after normalisation"


@pytest.mark.parametrize(("name", "value"), [("rotation", 181.0), ("shear", -1.0), ("erasing", 2)])
def test_distortions_out_of_range_are_refused(name, value):
    config = TrainConfig()
    setattr(config.finetune.augment, name, value)
    with pytest.raises(InputError, match=f"finetune.augment.{name} is {value}, wanted"):
        check_config(config)
