"""Shared by the tests of ``mics_fast.prepare``: small images, and the command."""

from __future__ import annotations

import csv

import numpy as np
from PIL import Image

from mics_fast import prepare


def paint(path, colour=(180, 110, 90)):
    """Write a small image; its first pixel has the colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((12, 16, 3), colour, np.uint8)
    pixels[4:] //= 2
    Image.fromarray(pixels).save(path)


def scenery(seed, height=192, width=256):
    """A random picture with detail of a dozen pixels, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(40, 256, (16, 20, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def damaged(file, how):
    """Replace an image by a broken one."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    # Cut short in the middle of the scan: the header is whole.
    whole = file.read_bytes()
    contents = {"text": b"not an image", "empty": b"", "cut": whole[: len(whole) // 2]}
    file.write_bytes(contents[how])


def run(*arguments):
    """``python -m mics_fast.prepare`` with these arguments."""
    prepare.main([str(argument) for argument in arguments])


def rejected(out):
    """The lines of ``rejected.csv``."""
    with open(out / "rejected.csv", newline="") as file:
        return list(csv.DictReader(file))
