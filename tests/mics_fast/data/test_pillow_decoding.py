"""Pillow in place of DALI: the same frames, the same batches, the same sentences."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import decoder_of
from mics_fast.data.image_files import SingleDecoder
from mics_fast.data.pillow_decoding import frame_of
from mics_fast.options import CacheConfig, DataConfig
from tests.mics_fast.data.loading import (
    CPU,
    EVERYTHING,
    GREY_LEVELS,
    NAMES,
    evaluate,
    noise,
    same,
    take,
    train,
)

DALI, PILLOW = (replace(GREY_LEVELS, decoder=name) for name in ("dali", "cpu"))


def encoded(pixels, suffix):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, quality=90)
    return np.frombuffer(file.getvalue(), np.uint8)


@pytest.mark.parametrize(("suffix", "most"), [("PNG", 0), ("BMP", 0), ("JPEG", 1)])
def test_a_crop_has_the_pixels_that_dali_gives(suffix, most):
    random, dali = np.random.default_rng(0), SingleDecoder(CPU, "dali")
    for number in range(60):
        height, width = random.integers(1, 90, 2)
        file = encoded(noise(number, height, width), suffix)
        size = random.uniform(0, 1, 2).astype(np.float32)
        start = random.random(2, np.float32) * (1 - size)
        crop = np.concatenate([start, size])
        wanted = np.array(dali._decode(file, crop).as_cpu()[0])
        made = frame_of(file, crop)
        assert made.shape == wanted.shape
        assert np.abs(made.astype(int) - wanted).max() <= most


def cache(rows, data):
    data = replace(data, cache=CacheConfig("host"))
    return FrameCache(rows, NAMES, data=data, image_size=16, device=CPU)


@pytest.mark.parametrize("cached", [False, True])
def test_batches_have_the_bits_that_dali_gives(rows, cached):
    options = {"augment": EVERYTHING, "strong": True, "teacher": True}
    dali, pillow = (
        train(rows, data=data, cache=cache(rows, data) if cached else None, **options)
        for data in (DALI, PILLOW)
    )
    pairs = zip(take(dali, 5), take(pillow, 5), strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_evaluated_batches_have_the_bits_that_dali_gives(rows):
    pairs = zip(evaluate(rows, data=DALI), evaluate(rows, data=PILLOW), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("content", [b"no image", b"", b"\x89PNG\r\n\x1a\n" + bytes(200)])
def test_a_bad_file_is_named_or_skipped_as_with_dali(rows, tmp_path, content):
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    rows = [*rows[:5], replace(rows[5], files={**rows[5].files, "nbi": bad}), *rows[6:]]
    with pytest.raises(InputError, match=r"bad\.png .*; it is the nbi image of sample 'pair-105'"):
        take(train(rows, data=PILLOW), 3)
    skipping = (replace(data, on_bad_file="skip") for data in (DALI, PILLOW))
    dali, pillow = (take(train(rows, data=data), 5) for data in skipping)
    assert all(same(a, b) for a, b in zip(dali, pillow, strict=True))


def test_a_gpu_decodes_with_dali():
    with pytest.raises(InputError, match=r"data\.decoder is cpu, wanted auto or dali on a GPU"):
        decoder_of(DataConfig(decoder="cpu"), torch.device("cuda"))
