"""Random numbers of training: the order of the rows and the augmentation of each image pair.

Every number is a pure function of (seed, epoch, sample id): a raw 64-bit word of numpy's
Philox4x64, keyed by the seed and the purpose of the number, counted from (sample id, epoch). It
does not depend on workers, ranks, threads or resume points. Raw words, unlike the methods of
``numpy.random.Generator``, stay the same across numpy versions.
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

_ORDER, _AUGMENT, CLASS_ORDER, CLASS_ROWS, _DISTORT, _TEACHER = range(6)  # purposes of numbers
_GEOMETRY_NUMBERS, _COLOUR_NUMBERS, _BOX_NUMBERS = 6, 5, 4

View = Literal["weak", "strong", "teacher"]
"""A view of an image: weak (in evaluation the only view, of the whole frame), strong (of the same
crop), or teacher (a weak view of another crop)."""


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of one pair in one epoch.

    Args:
        anchor: (2,) float32, left and top of the crop as fractions of the frame.
        shape: (2,) float32, width and height of the crop as fractions of the frame.
        flip: (2,) int32, 1 = flipped horizontally, vertically.
        weak: (M, 5) float32, one row per modality: brightness, contrast and saturation factors, hue
            in degrees, blur in pixels.
        strong: the same for the strong view.
        affine: (2, 3) float32, rotation and shear of the strong view (``distortions.py``).
        boxes: (M, 4) float32, box erased from the strong view of each modality.
    """

    anchor: np.ndarray
    shape: np.ndarray
    flip: np.ndarray
    weak: np.ndarray
    strong: np.ndarray
    affine: np.ndarray
    boxes: np.ndarray

    def colours(self, view: View) -> np.ndarray:
        """Return the (M, 5) colour numbers of a view."""
        return self.strong if view == "strong" else self.weak

    def crop(self) -> np.ndarray:
        """Return the crop, (4,) float32: left, top, width and height."""
        return np.concatenate([self.anchor, self.shape])

    def flips(self) -> np.ndarray:
        """Return the whole crop as a region, (4,) float32: top, left, bottom, right; start and end
        of a flipped axis are swapped."""
        start = self.flip[::-1].astype(np.float32)
        return np.concatenate([start, 1 - start])

    def region(self) -> np.ndarray:
        """Return the crop as a region of the frame, (4,) float32, flipped in the same way."""
        flips = self.flips()
        return np.tile(self.anchor[::-1], 2) + flips * np.tile(self.shape[::-1], 2)

    def region_in(self, crop: np.ndarray) -> np.ndarray:
        """Return the same region as fractions of a larger crop, (4,) as from ``crop``."""
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
    """Draw the augmentation of one pair: crop and flip for the pair, colour per modality.

    The strong view is also rotated and sheared, equally for all modalities, and loses a box per
    modality.

    The crop's area is uniform in ``crop_scale``, the logarithm of its aspect ratio is uniform over
    ``crop_ratio`` and its position is uniform in the frame. Sides are clipped to the frame's.

    Args:
        config: the ranges.
        seed: of the run.
        epoch: number of earlier draws of the row.
        sample_id: manifest row.
        modalities: M, in a fixed order. A modality keeps its numbers when others are appended,
            whether or not its image exists, and whether or not the strong view is used.
        teacher: draw crop, flip and colour of the teacher's view, independent of the others.
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
    """Return the smallest crop that contains all crops, (4,) float32: left, top, width, height."""
    corners = np.array([np.concatenate([crop[:2], crop[:2] + crop[2:]]) for crop in crops])
    start, end = corners[:, :2].min(0), corners[:, 2:].max(0)
    return np.concatenate([start, end - start])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Draw a uniform permutation of the row positions, (rows,)."""
    order = draw_order(seed, _ORDER, epoch, 0, rows)
    order.flags.writeable = False
    return order


def draw_order(seed: int, purpose: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """Draw a uniform permutation, (count,), for one purpose."""
    return np.argsort(_raw(seed, purpose, epoch, stream, count), kind="stable")


def _colour(config: ColourConfig, uniform: np.ndarray) -> np.ndarray:
    """Map (M, 5) uniform numbers to colour numbers."""
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
