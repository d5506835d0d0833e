"""The numbers of training: what they depend on, what they do not, and their ranges."""

import numpy as np
import pytest

from mics_fast.data.augmentation import BLUR, HUE, draw_augmentation, epoch_order
from mics_fast.options import AugmentConfig, ColourConfig


def draw(config=None, seed=0, epoch=0, sample_id=0, modalities=2):
    return draw_augmentation(
        config or AugmentConfig(),
        seed=seed,
        epoch=epoch,
        sample_id=sample_id,
        modalities=modalities,
    )


def test_an_order_visits_every_row_once():
    assert sorted(epoch_order(seed=3, epoch=1, rows=100)) == list(range(100))


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(epoch_order(s, e, 50)) for s in (0, 1, -1, 2**63) for e in range(5)}
    assert len(orders) == 20


def test_every_row_comes_first_equally_often():
    first = [epoch_order(0, epoch, 5)[0] for epoch in range(2000)]
    counts = np.bincount(first, minlength=5)
    assert abs(counts - 400).max() < 4 * np.sqrt(2000 * 0.2 * 0.8)


def test_numbers_are_the_same_on_every_machine_and_numpy_version():
    assert epoch_order(7, 1, 8).tolist() == [2, 5, 7, 1, 3, 4, 0, 6]
    drawn = draw(seed=7, epoch=1, sample_id=6)
    np.testing.assert_allclose(drawn.anchor, [0.168752, 0.029888], atol=1e-6)
    np.testing.assert_allclose(drawn.shape, [0.796644, 0.969596], atol=1e-6)
    strong = [0.97834, 0.88567, 0.89134, 3.75921, 1.24916]
    np.testing.assert_allclose(drawn.strong[1], strong, atol=1e-5)
    assert drawn.flip.tolist() == [0, 0]


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"sample_id": 1}])
def test_numbers_change_with_seed_epoch_and_sample(other):
    assert not np.isin(draw(**other).strong, draw().strong).any()


def test_a_modality_keeps_its_numbers_when_others_are_added_after_it():
    two, three = draw(modalities=2), draw(modalities=3)
    assert (two.weak == three.weak[:2]).all()
    assert (two.strong == three.strong[:2]).all()
    assert (two.anchor == three.anchor).all()


def test_modalities_and_views_have_their_own_colours():
    one = AugmentConfig(strong=ColourConfig())
    augmentation = draw(one)
    rows = np.concatenate([augmentation.weak, augmentation.strong])[:, :BLUR]
    assert len(np.unique(rows)) == rows.size


def test_crops_keep_to_area_and_aspect_ratio_and_stay_inside_the_frame():
    config = AugmentConfig(crop_scale=(0.2, 0.5), crop_ratio=(0.8, 1.25))
    boxes = [draw(config, sample_id=i) for i in range(2000)]
    width, height = np.array([box.shape for box in boxes], dtype=np.float64).T
    area, ratio = width * height, width / height
    assert 0.2 - 1e-6 <= area.min() < 0.203 and 0.497 < area.max() <= 0.5 + 1e-6
    assert 0.8 - 1e-6 <= ratio.min() < 0.805 and 1.24 < ratio.max() <= 1.25 + 1e-6
    assert abs(area.mean() - 0.35) < 4 * 0.3 / np.sqrt(12 * 2000)
    anchors = np.array([box.anchor for box in boxes], dtype=np.float64)
    ends = anchors + np.stack([width, height], 1)
    assert anchors.min() >= 0 and ends.max() <= 1 + 1e-6
    place = anchors / (1 - np.stack([width, height], 1))
    assert abs(place.mean(0) - 0.5).max() < 4 / np.sqrt(12 * 2000)


def test_a_crop_of_the_whole_area_is_the_whole_frame():
    whole = draw(AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)))
    assert whole.anchor.tolist() == [0, 0] and whole.shape.tolist() == [1, 1]


def test_flips_come_with_their_probability_and_independently():
    flips = np.array([draw(AugmentConfig(flip=0.3), sample_id=i).flip for i in range(2000)])
    assert abs(flips.mean(0) - 0.3).max() < 4 * np.sqrt(0.3 * 0.7 / 2000)
    assert abs(flips.prod(1).mean() - 0.09) < 4 * np.sqrt(0.09 * 0.91 / 2000)
    assert not draw(AugmentConfig(flip=0.0)).flip.any()
    assert draw(AugmentConfig(flip=1.0)).flip.all()


def test_colour_numbers_fill_their_ranges():
    config = AugmentConfig(weak=ColourConfig(0.2, 0.3, 0.4, hue=12.0, blur=1.5))
    weak = np.concatenate([draw(config, sample_id=i).weak for i in range(1000)])
    low, high = np.array([0.8, 0.7, 0.6, -12, 0]), np.array([1.2, 1.3, 1.4, 12, 1.5])
    margin = 0.01 * (high - low)
    assert (low - 1e-6 <= weak.min(0)).all() and (weak.min(0) < low + margin).all()
    assert (weak.max(0) <= high + 1e-6).all() and (high - margin < weak.max(0)).all()


def test_no_colour_ranges_mean_no_change():
    still = draw(AugmentConfig(weak=ColourConfig(0, 0, 0, 0, 0)))
    assert still.weak.tolist() == [[1, 1, 1, 0, 0]] * 2
    assert (still.strong[:, HUE] != 0).all()
