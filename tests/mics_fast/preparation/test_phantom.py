"""The phantom: deterministic, and as hard as it is meant to be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mics_fast.preparation.phantom import CLASSES, SIDE, make_scene, render_pair

SEED, PAIRS, TRAIN, MASKED = 7, 720, 480, 360


@pytest.fixture(scope="module")
def frames():
    """(PAIRS, 2, SIDE, SIDE, 3): WLI and NBI."""
    return np.stack([render_pair(SEED, index)[1:] for index in range(PAIRS)])


@pytest.fixture(scope="module")
def lesions():
    """(MASKED, SIDE, SIDE) bool: where the lesion of the first scenes is."""
    return np.stack(
        [
            make_scene(np.random.default_rng([SEED, index]), index % len(CLASSES)).lesion > 0.5
            for index in range(MASKED)
        ]
    )


def classifier():
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))


def test_a_pair_is_two_frames_of_one_size():
    name, wli, nbi = render_pair(SEED, 3)
    assert name == CLASSES[3]
    for frame in (wli, nbi):
        assert frame.shape == (SIDE, SIDE, 3) and frame.dtype == np.uint8


def test_classes_take_turns():
    assert [render_pair(SEED, index)[0] for index in range(6, 12)] == list(CLASSES)


def test_a_pair_depends_on_seed_and_number_alone():
    first = render_pair(SEED, 5)
    render_pair(SEED, 6)
    again = render_pair(SEED, 5)
    assert all((one == two).all() for one, two in zip(first[1:], again[1:], strict=True))


def test_another_seed_or_number_is_another_scene():
    frame = render_pair(SEED, 5)[1].astype(int)
    for other in (render_pair(SEED + 1, 5), render_pair(SEED, 11)):
        assert np.abs(frame - other[1]).mean() > 5


def test_both_frames_show_the_same_folds(frames):
    """Light and shade of one scene agree; those of two scenes do not."""
    shade = np.stack(
        [gaussian_filter(pair.mean(-1), (0, 2, 2)) for pair in frames[:60].astype(float)]
    )
    shade = shade[:, :, 24:72, 24:72].reshape(60, 2, -1)
    shade = shade - shade.mean(-1, keepdims=True)
    shade /= np.linalg.norm(shade, axis=-1, keepdims=True)
    same = (shade[:, 0] * shade[:, 1]).sum(-1).mean()
    other = (shade[:, 0] * np.roll(shade[:, 1], 1, 0)).sum(-1).mean()
    assert same > other + 0.4


def test_frames_are_exposed_like_an_endoscope_s(frames):
    """A dark surround, a lit middle, few pixels burnt out."""
    corners = frames[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() < 10
    middle = frames[:, :, 24:72, 24:72]
    assert (middle.mean((2, 3, 4)) > 40).all()
    burnt = (middle.min(-1) > 250).mean((2, 3))
    assert burnt.mean() < 0.02 and (burnt > 0.2).mean() < 0.03


def test_colour_statistics_do_not_solve_it(frames):
    """Whole-frame means, deviations and histograms of both modalities, all labels.

    Chance is 0.17. Twice as many training pairs add 6 to 10 points.
    """

    def histograms(channel):
        return np.histogram(channel, 16, (0, 256))[0] / channel.size

    features = np.stack(
        [
            np.concatenate(
                [
                    np.concatenate([channel.mean(keepdims=True).ravel(),
                                    channel.std(keepdims=True).ravel(), histograms(channel)])
                    for frame in pair
                    for channel in np.moveaxis(frame, 2, 0)
                ]
            )
            for pair in frames
        ]
    )  # fmt: skip
    label = np.arange(PAIRS) % len(CLASSES)
    model = classifier().fit(features[:TRAIN], label[:TRAIN])
    assert model.score(features[TRAIN:], label[TRAIN:]) < 0.55


def local_features(frame, lesion):
    """Features of a lesion at its known place: colour and texture, relative to the rest."""
    log = np.log(frame.astype(float) + 10)
    near = gaussian_filter(lesion.astype(float), 6) > 0.1
    outside = near & ~lesion
    core = gaussian_filter(lesion.astype(float), 4) > 0.85
    colour = log[lesion].mean(0) - log[outside].mean(0)
    centre = log[core].mean(0) - log[lesion & ~core].mean(0) if core.any() else np.zeros(3)
    texture = []
    for scale in (0.7, 1.4, 2.8):
        band = gaussian_filter(log, (scale, scale, 0)) - gaussian_filter(
            log, (2 * scale, 2 * scale, 0)
        )
        texture += [band[lesion].std(0) - band[outside].std(0)]
        texture += [(band[lesion] ** 3).mean(0) / (band[lesion].std(0) ** 3 + 1e-9)]
    return np.concatenate([colour, centre, *texture])


@pytest.fixture(scope="module")
def separable(frames, lesions):
    """separable(first, second, modality) -> cross-validated accuracy with the lesion known."""
    features = np.stack(
        [
            [local_features(frame, lesion) for frame in pair]
            for pair, lesion in zip(frames, lesions, strict=False)
        ]
    )
    label = np.arange(MASKED) % len(CLASSES)

    def accuracy(first, second, modality):
        of_pair = np.isin(label, [CLASSES.index(first), CLASSES.index(second)])
        chosen = features[of_pair, ("wli", "nbi").index(modality)]
        return cross_val_score(classifier(), chosen, label[of_pair], cv=5).mean()

    return accuracy


def test_only_white_light_tells_the_plaques_apart(separable):
    assert separable("plaque-yellow", "plaque-green", "wli") > 0.9
    assert separable("plaque-yellow", "plaque-green", "nbi") < 0.7


def test_narrow_bands_tell_the_vessel_patterns_apart_far_better(separable):
    assert separable("flat-mesh", "flat-tortuous", "nbi") > 0.9
    assert separable("flat-mesh", "flat-tortuous", "wli") < 0.75
    # NBI sees no pigment, so a plaque is bare mucosa to it: a mesh is more than that.
    assert separable("flat-mesh", "plaque-green", "nbi") > 0.9


def test_both_tell_the_bumps_apart(separable):
    assert separable("bump-diffuse", "bump-rim", "wli") > 0.75
    assert separable("bump-diffuse", "bump-rim", "nbi") > 0.75
