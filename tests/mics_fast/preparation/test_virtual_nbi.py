"""Virtual NBI: blood turns dark and brown, and nothing is added to WLI."""

from __future__ import annotations

import numpy as np
import pytest

from mics_fast.preparation.virtual_nbi import virtual_nbi

MUCOSA, VESSEL = (196, 120, 104), (158, 66, 58)


@pytest.fixture
def vessel():
    """A white-light frame of mucosa with a redder vessel across it, and the vessel's mask."""
    mask = np.zeros((40, 60), bool)
    mask[18:22] = True
    return np.where(mask[..., None], VESSEL, MUCOSA).astype(np.uint8), mask


def luminance(image):
    return image @ np.array([0.2126, 0.7152, 0.0722])


def test_the_image_keeps_its_shape_and_type(vessel):
    image = virtual_nbi(vessel[0])
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8


def test_a_vessel_is_darker_than_the_mucosa_and_by_more_than_in_white_light(vessel):
    wli, mask = vessel

    def contrast(image):
        light = luminance(image.astype(float))
        return light[mask].mean() / light[~mask].mean()

    assert contrast(virtual_nbi(wli)) < 0.75 * contrast(wli) < 1


def test_a_vessel_is_browner_than_the_mucosa(vessel):
    wli, mask = vessel
    image = virtual_nbi(wli).astype(float)
    redness = image[..., 0] / image[..., 2]
    assert redness[mask].mean() > 1.1 * redness[~mask].mean()
    assert (image[mask][:, 0] > image[mask][:, 2]).all()


def test_more_blood_is_darker(vessel):
    wli, _ = vessel
    wli = np.concatenate([wli] + [np.full((1, 60, 3), MUCOSA, np.uint8)] * 7)
    for row in range(7):
        wli[40 + row] = np.array(MUCOSA) * [1, 1 - 0.08 * row, 1 - 0.08 * row]
    light = luminance(virtual_nbi(wli)[40:].astype(float))[:, 0]
    assert (np.diff(light) < 0).all()


def test_415_nm_is_shown_as_green_and_blue(vessel):
    image = virtual_nbi(vessel[0])
    assert (image[..., 1] == image[..., 2]).all()


@pytest.mark.filterwarnings("error")
def test_black_stays_black_and_glare_stays_white(vessel):
    wli = vessel[0].copy()
    wli[:4], wli[-4:] = 0, 255
    image = virtual_nbi(wli)
    assert image[:4].max() < 16 and image[-4:].min() > 230
    assert virtual_nbi(np.zeros((2, 2, 3), np.uint8)).max() < 16


def test_it_is_a_function_of_the_frame_pixel_by_pixel(vessel):
    """Equal colours stay equal, wherever they are; a flip of the frame flips the result."""
    wli, mask = vessel
    image = virtual_nbi(wli)
    assert len(np.unique(image[mask], axis=0)) == len(np.unique(image[~mask], axis=0)) == 1
    assert (virtual_nbi(wli[:, ::-1]) == image[:, ::-1]).all()
