"""Image files as ``prepare`` reads and writes them: full decode, black borders, smaller copies."""

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
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # whatever the suffix; what training decodes

# A line of pixels belongs to the picture where a tenth of it is brighter than this: the black of
# JPEG frames is noisy, and a line of text in a border is thin.
_BLACK, _BRIGHT_SHARE = 24, 0.1

Box = tuple[float, float, float, float]
"""left, top, right, bottom as fractions of the frame."""


def decode(path: Path) -> np.ndarray:
    """The image as (H, W, 3) uint8, upright, after a full decode.

    Raises:
        InputError: the file is missing, no image, or a broken one.
    """
    try:
        encoded = read_image(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except RefusedImage as error:
        raise InputError(f"{path} {error}") from None
    return pixels_of(encoded.tobytes(), path)


def pixels_of(data: bytes, path: Path) -> np.ndarray:
    """The pixels of an image that ``check_image`` has accepted, as ``decode`` gives them.

    Args:
        data: all bytes of its file.
        path: names it in a refusal.

    Raises:
        InputError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)  # as the image pipeline does
            if upright.mode.startswith("I"):  # 16 bits, which convert() would clip
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))
    except Exception as error:  # Pillow raises whatever broken metadata make of its code
        raise InputError(f"{path} cannot be decoded as an image: {error}") from None


def save(image: np.ndarray, target: Path) -> None:
    """Write an image under a temporary name, then rename it; JPEG in full chroma, for vessels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with renamed(target) as partial:
        Image.fromarray(image).save(partial, quality=95, subsampling=0)
        make_private(partial)


def content_box(image: np.ndarray) -> Box:
    """Box inside the black border of a (H, W, 3) uint8 frame; the whole frame if all is black."""
    bright = image.max(2) > _BLACK
    box = [0.0, 0.0, 1.0, 1.0]
    for axis in range(2):  # columns give left and right, rows top and bottom
        inside = np.flatnonzero(bright.mean(axis) > _BRIGHT_SHARE)
        if len(inside):
            count = bright.shape[1 - axis]
            box[axis], box[2 + axis] = inside[0] / count, (inside[-1] + 1) / count
    return box[0], box[1], box[2], box[3]


def around(boxes: Iterable[Box]) -> Box:
    """The smallest box around some boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """The part of an (H, W, 3) image inside a box, to the nearest pixel."""
    height, width = image.shape[:2]
    left, top, right, bottom = box
    return image[round(top * height) : round(bottom * height),
                 round(left * width) : round(right * width)]  # fmt: skip


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """The image with a shorter side of ``side`` pixels, averaged; a smaller one stays as it is."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
