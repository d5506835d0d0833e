"""Shared by the tests of the loaders: pairs of noise, loaders of them, what is in a batch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from mics_fast.data.loaders import EvalLoader, TrainLoader
from mics_fast.data.manifest import Row
from mics_fast.options import AugmentConfig, ColourConfig, DataConfig

CPU = torch.device("cpu")
NAMES = ("wli", "nbi")
NO_COLOUR = ColourConfig(0, 0, 0, 0, 0)
GREY_LEVELS = DataConfig(
    mean=dict.fromkeys(NAMES, (0.0, 0.0, 0.0)), std=dict.fromkeys(NAMES, (1 / 255,) * 3), threads=2
)
"""A normalisation that leaves pixels as they are, 0..255."""
WHOLE_FRAME = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
EVERYTHING = AugmentConfig(
    crop_scale=(0.2, 1.0),
    crop_ratio=(0.5, 2.0),
    weak=ColourConfig(0.3, 0.3, 0.3, hue=20.0),
    strong=ColourConfig(0.4, 0.4, 0.4, hue=30.0, blur=1.5),
)


def row(index, wli, nbi, **changes):
    """A row of a manifest, of a group of its own."""
    plain = Row(index, f"pair-{index}", index % 3, index % 2 == 0, 10 + index, "train", (), {})
    return replace(plain, files={"wli": wli, "nbi": nbi}, **changes)


def save(pixels, path):
    """Write an image, and return its path."""
    Image.fromarray(pixels).save(path)
    return path


def noise(seed, height=24, width=32):
    """(height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def train(rows, **changes):
    """A loader of training batches: 4 pairs at 16 pixels."""
    options = {
        "data": GREY_LEVELS,
        "augment": AugmentConfig(),
        "image_size": 16,
        "batch_size": 4,
        "seed": 0,
        "device": CPU,
    }
    return TrainLoader(rows, NAMES, **(options | changes))


def evaluate(rows, **changes):
    """A loader of evaluation batches: 4 pairs at 16 pixels."""
    options = {"data": GREY_LEVELS, "image_size": 16, "batch_size": 4, "device": CPU}
    return EvalLoader(rows, NAMES, **(options | changes))


def take(loader, count):
    """The next batches."""
    return list(itertools.islice(loader, count))


def tensors(batch):
    """Return all tensors of a batch, by name."""
    plain = ("present", "label", "labelled", "sample_id", "group_id")
    found = {name: getattr(batch, name) for name in plain}
    found |= {f"weak {name}": view for name, view in batch.views.items()}
    found |= {f"strong {name}": view for name, view in (batch.strong or {}).items()}
    return found | {f"teacher {name}": view for name, view in (batch.teacher or {}).items()}


def same(a, b):
    """Return True if two batches have the same bits."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
