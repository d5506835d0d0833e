"""Images in ``prepare``: full decoding, black borders, smaller copies, saving."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mics_fast.common.errors import InputError
from mics_fast.common.files import make_private, renamed
from mics_fast.data.image_header import RefusedImage
from mics_fast.data.shards import read_image

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # whatever the suffix; training decodes the same

# A row or column is content if a tenth of its pixels are brighter than this: the black of JPEG
# frames is noisy, and text in a border is thin.
_BLACK, _BRIGHT_SHARE = 24, 0.1

Box = tuple[float, float, float, float]
"""Box: left, top, right, bottom as fractions of the frame."""


def decode(path: Path) -> np.ndarray:
    """Decode an image fully to (H, W, 3) uint8, upright.

    Raises:
        InputError: the file is missing, not an image, or broken.
    """
    try:
        encoded = read_image(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except RefusedImage as error:
        raise InputError(f"{path} {error}") from None
    return pixels_of(encoded.tobytes(), path)


def pixels_of(data: bytes, path: Path) -> np.ndarray:
    """Decode an image that ``check_image`` has accepted, as ``decode`` does.

    Args:
        data: all bytes of the file.
        path: for error messages.

    Raises:
        InputError: the image cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)  # as the image pipeline does
            if upright.mode.startswith("I"):  # 16 bits, which convert() would clip
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds of errors for broken metadata
        raise InputError(f"{path} cannot be decoded as an image: {error}") from None


def save(image: np.ndarray, target: Path) -> None:
    """Write an image atomically; JPEG without chroma subsampling, which would blur vessels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with renamed(target) as partial:
        Image.fromarray(image).save(partial, quality=95, subsampling=0)
        make_private(partial)


def content_box(image: np.ndarray) -> Box:
    """Return the box inside the black border of an (H, W, 3) uint8 frame; all of it if black."""
    bright = image.max(2) > _BLACK
    box = [0.0, 0.0, 1.0, 1.0]
    for axis in range(2):  # columns give left and right, rows top and bottom
        inside = np.flatnonzero(bright.mean(axis) > _BRIGHT_SHARE)
        if len(inside):
            count = bright.shape[1 - axis]
            box[axis], box[2 + axis] = inside[0] / count, (inside[-1] + 1) / count
    return box[0], box[1], box[2], box[3]


def around(boxes: Iterable[Box]) -> Box:
    """Return the smallest box that contains all boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """Cut a box out of an (H, W, 3) image, to the nearest pixel."""
    height, width = image.shape[:2]
    left, top, right, bottom = box
    return image[round(top * height) : round(bottom * height),
                 round(left * width) : round(right * width)]  # fmt: skip


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Shrink the image to a shorter side of ``side`` pixels; a smaller one is returned as it is."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
