"""The random numbers of training: the order of the rows, and how each image pair is changed.

Every number is a pure function of (seed, epoch, sample id): the raw 64-bit words of numpy's
Philox4x64, keyed by the seed and what the numbers are for, counted from (sample id, epoch). So
they depend on no worker, rank, thread or resume point, and raw words, unlike the methods of
``numpy.random.Generator``, stay the same from one numpy version to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from mics_fast.data.distortions import affine_of, boxes_of
from mics_fast.options import AugmentConfig, ColourConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE, BLUR = range(5)
"""Columns of ``Augmentation.weak`` and ``Augmentation.strong``."""

_ORDER, _AUGMENT, CLASS_ORDER, CLASS_ROWS, _DISTORT, _TEACHER = range(6)  # what numbers are for
_GEOMETRY_NUMBERS, _COLOUR_NUMBERS, _BOX_NUMBERS = 6, 5, 4

View = Literal["weak", "strong", "teacher"]
"""What an image is made into: the weak view (in evaluation, the only one, it is the whole frame),
the strong view of the same crop, or the weak view of another crop for the teacher."""


@dataclass(frozen=True)
class Augmentation:
    """How one pair is changed in one epoch.

    Args:
        anchor: (2,) float32, left and top of the crop as fractions of the frame.
        shape: (2,) float32, width and height of the crop as fractions of the frame.
        flip: (2,) int32, 1 = flipped horizontally, vertically.
        weak: (M, 5) float32, one row per modality: brightness, contrast and saturation factors, hue
            in degrees, blur in pixels.
        strong: the same of the strong view.
        affine: (2, 3) float32, rotation and shear of the strong view (``distortions.py``).
        boxes: (M, 4) float32, what is erased of the strong view of each modality.
    """

    anchor: np.ndarray
    shape: np.ndarray
    flip: np.ndarray
    weak: np.ndarray
    strong: np.ndarray
    affine: np.ndarray
    boxes: np.ndarray

    def colours(self, view: View) -> np.ndarray:
        """(M, 5) colour numbers of a view."""
        return self.strong if view == "strong" else self.weak

    def crop(self) -> np.ndarray:
        """(4,) float32: left, top, width and height of the crop."""
        return np.concatenate([self.anchor, self.shape])

    def flips(self) -> np.ndarray:
        """(4,) float32: the region of the crop, top, left, bottom, right, that is all of it; a
        flipped axis runs backwards."""
        start = self.flip[::-1].astype(np.float32)
        return np.concatenate([start, 1 - start])

    def region(self) -> np.ndarray:
        """(4,) float32: the region of the frame that the crop is, flipped in the same way."""
        flips = self.flips()
        return np.tile(self.anchor[::-1], 2) + flips * np.tile(self.shape[::-1], 2)

    def region_in(self, crop: np.ndarray) -> np.ndarray:
        """(4,) float32: the same region as fractions of a larger crop, (4,) as ``crop`` gives."""
        corner, shape = np.tile(crop[1::-1], 2), np.tile(crop[:1:-1], 2)
        return (self.region() - corner) / shape


def draw_augmentation(
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    modalities: int,
    teacher: bool = False,
) -> Augmentation:
    """The changes of one pair: one crop and one flip for all, colour for each modality.

    The strong view is also rotated and sheared, for all alike, and a box of each modality erased.

    The crop's area is uniform in ``crop_scale``, the logarithm of its aspect ratio in
    ``crop_ratio``, its place uniform in the frame; a side that would be longer than the frame's is
    the frame's.

    Args:
        config: the ranges.
        seed: of the run.
        epoch: how often the row has been drawn before.
        sample_id: manifest row.
        modalities: M, in a fixed order; a modality keeps its numbers when others are added after
            it, whether its image exists or not and whether the strong view is used or not.
        teacher: draw the crop, flip and colour of the teacher's view, independent of the others.
    """
    words = _GEOMETRY_NUMBERS + 2 * _COLOUR_NUMBERS * modalities
    purpose = _TEACHER if teacher else _AUGMENT
    uniform = (_raw(seed, purpose, epoch, sample_id, words) >> np.uint64(11)) * 2.0**-53
    area = _between(config.crop_scale, uniform[0])
    ratio = np.exp(_between(tuple(np.log(config.crop_ratio)), uniform[1]))
    shape = np.minimum(np.sqrt([area * ratio, area / ratio]), 1.0)
    colour = uniform[_GEOMETRY_NUMBERS:].reshape(modalities, 2, _COLOUR_NUMBERS)
    words = 2 + _BOX_NUMBERS * modalities
    distort = (_raw(seed, _DISTORT, epoch, sample_id, words) >> np.uint64(11)) * 2.0**-53
    angle, shear = (2 * distort[:2] - 1) * [config.rotation, config.shear]
    return Augmentation(
        anchor=(uniform[2:4] * (1 - shape)).astype(np.float32),
        shape=shape.astype(np.float32),
        flip=(uniform[4:6] < config.flip).astype(np.int32),
        weak=_colour(config.weak, colour[:, 0]),
        strong=_colour(config.strong, colour[:, 1]),
        affine=affine_of(angle, shear),
        boxes=boxes_of(config.erasing, distort[2:].reshape(modalities, _BOX_NUMBERS)),
    )


def union(crops: Sequence[np.ndarray]) -> np.ndarray:
    """(4,) float32: the smallest crop that holds some crops; left, top, width and height."""
    corners = np.array([np.concatenate([crop[:2], crop[:2] + crop[2:]]) for crop in crops])
    start, end = corners[:, :2].min(0), corners[:, 2:].max(0)
    return np.concatenate([start, end - start])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """(rows,) a permutation of the row positions, uniform over permutations."""
    order = draw_order(seed, _ORDER, epoch, 0, rows)
    order.flags.writeable = False
    return order


def draw_order(seed: int, purpose: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """(count,) a permutation, uniform over permutations, for one purpose of its own."""
    return np.argsort(_raw(seed, purpose, epoch, stream, count), kind="stable")


def _colour(config: ColourConfig, uniform: np.ndarray) -> np.ndarray:
    """(M, 5) colour numbers from (M, 5) uniform ones."""
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    numbers = np.empty_like(uniform)
    numbers[:, :BLUR] = (2 * uniform[:, :BLUR] - 1) * spread + [1, 1, 1, 0]
    numbers[:, BLUR] = uniform[:, BLUR] * config.blur
    return numbers.astype(np.float32)


def _between(bounds: tuple[float, float], uniform: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def _raw(seed: int, purpose: int, epoch: int, sample_id: int, count: int) -> np.ndarray:
    key = np.array([seed & (2**64 - 1), purpose], dtype=np.uint64)
    counter = np.array([0, 0, sample_id, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
