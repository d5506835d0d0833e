"""The files that loaders read: the usual formats, upright and in colour, or a sentence."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.options import AugmentConfig, DataConfig
from tests.mics_fast.data.loading import WHOLE_FRAME, evaluate, noise, row, save, take, train


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
def test_the_usual_formats_are_read(folder, suffix):
    pixels = np.full((20, 20, 3), (180, 90, 60), np.uint8)
    path = save(pixels, folder / f"flat.{suffix}")
    (batch,) = evaluate([row(0, path, path)])
    expected = torch.tensor([180.0, 90, 60]).reshape(3, 1, 1)
    assert (batch.views["wli"][0] - expected).abs().max() <= 4  # JPEG and WebP lose some


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("L", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("I;16", "png")],
)
def test_images_of_other_modes_become_rgb(folder, mode, suffix):
    path = folder / f"mode-{mode.replace(';', '')}.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.full((20, 20), 255 * 257, np.uint16)).save(path)
    else:
        Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    (batch,) = evaluate([row(0, path, path)])
    assert (batch.views["nbi"] - 255).abs().max() <= 1


def test_a_rotated_photograph_stands_upright(folder):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    path = folder / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    (batch,) = evaluate([row(0, path, path)])
    assert batch.views["wli"][0, :, :7].max() < 10 and batch.views["wli"][0, :, 9:].min() > 245


def broken(kind, path):
    jpeg = path.with_name("whole.jpg")
    Image.fromarray(noise(1, 64, 64)).save(jpeg)
    contents = {
        "text": b"this is not an image",
        "truncated": jpeg.read_bytes()[: jpeg.stat().st_size // 2],
        "empty": b"",
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "folder", "absent"])
@pytest.mark.parametrize("loader", [train, evaluate])
def test_a_bad_file_is_named_with_its_row(rows, tmp_path, kind, loader):
    path = broken(kind, tmp_path / "bad.jpg")
    some = list(rows)
    some[5] = replace(rows[5], id="lesion 5", files={**rows[5].files, "nbi": path})
    options = {"augment": AugmentConfig(**WHOLE_FRAME)} if loader is train else {}
    with pytest.raises(InputError) as caught:
        take(loader(some, **options), 2)
    message = str(caught.value)
    assert str(path) in message and "'lesion 5'" in message and "nbi" in message
    assert "\n" not in message


def test_a_decoder_that_is_asked_for_and_missing_is_named(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for loader in (train, evaluate):
        with pytest.raises(InputError, match=r"pip install 'mics-fast\[dali\]'"):
            loader(rows, data=DataConfig(decoder="dali"))


def test_no_rows_cannot_be_trained_on():
    with pytest.raises(InputError, match="no rows"):
        train([])
