"""Colour, blur and normalisation: every value equals the documented formula in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from mics_fast.common.errors import InputError
from mics_fast.data.augmentation import BLUR, draw_augmentation
from mics_fast.options import AugmentConfig, ColourConfig, DataConfig
from tests.mics_fast.data.loading import (
    EVERYTHING,
    NAMES,
    NO_COLOUR,
    WHOLE_FRAME,
    evaluate,
    noise,
    row,
    save,
    train,
)


def twisted(pixels, brightness, contrast, saturation, hue):
    """The documented formula in float64."""
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    cosine, sine = np.cos(np.radians(hue)), np.sin(np.radians(hue))
    rotation = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    matrix = np.linalg.inv(yiq) @ rotation @ np.diag([1, saturation, saturation]) @ yiq
    changed = brightness * (contrast * pixels @ matrix.T + 128 * (1 - contrast))
    return np.clip(changed, 0, 255)


def test_the_views_are_those_of_a_reference_in_numpy(folder, reference_resize):
    """Crop, resize, flips, blur, colour and normalisation, one after the other in float64."""
    means, stds = {"wli": (0.5, 0.4, 0.3), "nbi": (0.2, 0.3, 0.4)}, {"wli": (0.2, 0.3, 0.4)}
    data = DataConfig(mean=means, std=stds)
    pixels = {name: noise(40 + k, 90, 120) for k, name in enumerate(NAMES)}
    files = [save(pixels[name], folder / f"reference-{name}.png") for name in NAMES]
    config = replace(EVERYTHING, crop_scale=(0.4, 0.9), crop_ratio=(0.8, 1.25))
    batch = next(train([row(3, *files)], augment=config, data=data, strong=True, image_size=32,
                       batch_size=6))  # fmt: skip
    worst = 0.0
    for epoch in range(6):
        drawn = draw_augmentation(config, seed=0, epoch=epoch, sample_id=3, modalities=2)
        for place, name in enumerate(NAMES):
            left, top = (round(float(drawn.anchor[k] * (120, 90)[k])) for k in range(2))
            ends = [float((drawn.anchor[k] + drawn.shape[k]) * (120, 90)[k]) for k in range(2)]
            crop = pixels[name][top : round(ends[1]), left : round(ends[0])]
            square = np.rint(reference_resize(crop, 32))
            square = square[:, ::-1] if drawn.flip[0] else square
            square = square[::-1] if drawn.flip[1] else square
            mean = np.array(means[name])
            std = np.array(stds.get(name, (0.229, 0.224, 0.225)))
            for views, values in ((batch.views, drawn.weak), (batch.strong, drawn.strong)):
                numbers = values[place].astype(np.float64)
                frame = square
                if values is drawn.strong:
                    sigma, reach = numbers[BLUR], int(np.ceil(3 * numbers[BLUR]))
                    frame = gaussian_filter(
                        square, (sigma, sigma, 0), mode="mirror", radius=(reach, reach, 0)
                    )
                expected = twisted(np.rint(frame), *numbers[:BLUR])
                found = views[name][epoch].permute(1, 2, 0).double().numpy() * std + mean
                worst = max(worst, abs(255 * found - expected).max())
    # Grey levels. After resize and blur they are rounded, which may go the other way by one; colour
    # then multiplies that by up to 1.4 * 1.4 * 1.9.
    assert worst <= 2.5


@pytest.fixture(scope="module")
def same_rows(folder):
    """Eight rows with one file in both modalities."""
    path = save(noise(77, 32, 32), folder / "same.png")
    return [row(i, path, path) for i in range(8)]


def test_the_modalities_of_a_pair_have_their_own_colours(same_rows):
    batch = next(train(same_rows, batch_size=8, strong=True))
    for views in (batch.views, batch.strong):
        assert ((views["wli"] - views["nbi"]).flatten(1).abs().amax(1) > 2).all()
    assert ((batch.views["wli"] - batch.strong["wli"]).flatten(1).abs().amax(1) > 2).all()


def test_colours_follow_the_documented_formula(same_rows):
    config = AugmentConfig(
        **WHOLE_FRAME,
        weak=ColourConfig(0.3, 0.3, 0.3, hue=30.0),
        strong=ColourConfig(0.8, 0.8, 0.8, hue=90.0),
    )
    batch = next(train(same_rows, augment=config, image_size=32, batch_size=8, strong=True))
    pixels = noise(77, 32, 32).astype(np.float64)
    for k, i in enumerate(batch.sample_id.tolist()):
        drawn = draw_augmentation(config, seed=0, epoch=0, sample_id=i, modalities=2)
        for views, values in ((batch.views, drawn.weak), (batch.strong, drawn.strong)):
            for name, numbers in zip(NAMES, values, strict=True):
                expected = twisted(pixels, *numbers[:BLUR].astype(np.float64))
                found = views[name][k].permute(1, 2, 0).numpy()
                assert abs(found - expected).max() <= 2e-4  # grey levels; float32


def test_the_strong_view_is_blurred_by_the_drawn_gaussian(same_rows):
    config = AugmentConfig(**WHOLE_FRAME, weak=NO_COLOUR, strong=replace(NO_COLOUR, blur=2.0))
    batch = next(train(same_rows, augment=config, image_size=32, batch_size=8, strong=True))
    for k, i in enumerate(batch.sample_id.tolist()):
        drawn = draw_augmentation(config, seed=0, epoch=0, sample_id=i, modalities=2)
        for name, numbers in zip(NAMES, drawn.strong, strict=True):
            sigma = float(numbers[BLUR])
            expected = gaussian_filter(
                batch.views[name][k].double().numpy(),
                (0, sigma, sigma),
                mode="mirror",
                radius=(0, int(np.ceil(3 * sigma)), int(np.ceil(3 * sigma))),
            )
            assert abs(batch.strong[name][k].numpy() - expected).max() <= 0.6


def test_the_whole_frame_at_its_own_size_is_normalised_exactly(rows, folder):
    mean, std = {"wli": (0.5, 0.4, 0.3)}, {"wli": (0.25, 0.2, 0.3)}
    pixels = noise(5, 16, 16)
    path = save(pixels, folder / "square.png")
    (batch,) = evaluate([row(0, path, path)], data=DataConfig(mean=mean, std=std))
    scaled = pixels.transpose(2, 0, 1) / 255
    for name, m, s in (
        ("wli", mean["wli"], std["wli"]),
        ("nbi", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        expected = (scaled - np.reshape(m, (3, 1, 1))) / np.reshape(s, (3, 1, 1))
        np.testing.assert_allclose(batch.views[name][0].numpy(), expected, atol=2e-6)


def test_per_image_normalisation_takes_mean_and_spread_away(rows):
    data = DataConfig(normalize="image")
    for batch in (next(train(rows, data=data)), *evaluate(rows, data=data)):
        for view in batch.views.values():
            assert view.mean((2, 3)).abs().max() < 1e-5
            assert (view.std((2, 3), correction=0) - 1).abs().max() < 2e-3


def test_per_image_normalisation_is_that_of_the_strong_view_too(rows):
    plain = next(train(rows, strong=True)).strong
    normalised = next(train(rows, strong=True, data=DataConfig(normalize="image"))).strong
    for name in NAMES:
        pixels = plain[name].double()
        variance, mean = torch.var_mean(pixels, (2, 3), correction=0, keepdim=True)
        expected = (pixels - mean) / (variance + 1).sqrt()
        torch.testing.assert_close(normalised[name].double(), expected, atol=1e-5, rtol=0)


def test_per_image_normalisation_leaves_a_flat_image_at_zero(folder):
    path = save(np.full((16, 16, 3), 200, np.uint8), folder / "flat.png")
    (batch,) = evaluate([row(0, path, path)], data=DataConfig(normalize="image"))
    assert not batch.views["wli"].any()


def test_a_standard_deviation_of_zero_is_refused(rows):
    with pytest.raises(InputError, match=r"data\.std of nbi"):
        train(rows, data=DataConfig(std={"nbi": (0.2, 0.0, 0.2)}))
