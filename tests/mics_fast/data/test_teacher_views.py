"""The teacher's views: another crop, flip and colour of the frames the student sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mics_fast.data import decoding
from mics_fast.data.augmentation import draw_augmentation
from mics_fast.data.cache import FrameCache
from mics_fast.data.image_files import ImageFiles
from mics_fast.options import AugmentConfig, CacheConfig
from tests.mics_fast.data.loading import (
    CPU,
    GREY_LEVELS,
    NAMES,
    NO_COLOUR,
    row,
    same,
    save,
    take,
    tensors,
    train,
)

STILL = AugmentConfig(crop_scale=(0.1, 0.9), crop_ratio=(0.5, 2.0), weak=NO_COLOUR)
CENTRES = (np.arange(64) + 0.5) / 64


@pytest.fixture(scope="module")
def coordinate_rows(folder):
    """Sixteen copies of one pair of 256 x 256 pixels, which hold their own x and y."""
    ramp = np.arange(256, dtype=np.uint8)
    pixels = np.full((256, 256, 3), 128, np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp, ramp[:, None]
    wli = save(pixels, folder / "teacher-wli.png")
    nbi = save(pixels[..., [1, 2, 0]], folder / "teacher-nbi.png")
    return [row(i, wli, nbi) for i in range(16)]


@pytest.fixture(params=["none", "host"])
def loading(request, coordinate_rows):
    """Loads the coordinates at 64 pixels, from files or from kept frames."""

    def load(**changes):
        cache = None
        if request.param == "host":
            data = replace(GREY_LEVELS, cache=CacheConfig("host", side=256))
            cache = FrameCache(coordinate_rows, NAMES, data=data, image_size=64, device=CPU)
        options = {"augment": STILL, "image_size": 64, "batch_size": 16, "cache": cache}
        return train(coordinate_rows, **(options | changes))

    return load


def error_of(view, drawn):
    """Largest distance, in pixels of the frame, between where a view is and where it should be."""
    worst = 0.0
    for axis, found in enumerate((view[0, 32], view[1, :, 32])):
        place = CENTRES[::-1] if drawn.flip[axis] else CENTRES
        expected = (drawn.anchor[axis] + place * drawn.shape[axis]) * 256 - 0.5
        worst = max(worst, abs(found.numpy() - expected)[2:-2].max())
    return worst


def test_student_and_teacher_have_the_crops_and_flips_that_were_drawn_for_each(loading):
    batch = next(loading(teacher=True))
    apart = []
    for k, i in enumerate(batch.sample_id.tolist()):
        student, teacher = (
            draw_augmentation(STILL, seed=0, epoch=0, sample_id=i, modalities=2, teacher=own)
            for own in (False, True)
        )
        assert error_of(batch.views["wli"][k], student) <= 1.5
        assert error_of(batch.teacher["wli"][k], teacher) <= 1.5
        apart.append(error_of(batch.teacher["wli"][k], student))
    assert np.median(apart) > 50


def test_the_teacher_sees_both_modalities_of_a_pair_in_one_crop(loading):
    teacher = next(loading(teacher=True)).teacher
    assert torch.equal(teacher["wli"][:, [0, 1]], teacher["nbi"][:, [2, 0]])


def test_the_teacher_s_view_leaves_the_student_s_as_it_is(loading):
    alone, beside = next(loading()), next(loading(teacher=True))
    for name in NAMES:
        # A larger part of the file is decoded, and its border falls on another whole pixel.
        assert (alone.views[name] - beside.views[name]).abs().max() <= 2.0


def test_kept_frames_give_the_student_the_same_bits_with_and_without_a_teacher(rows):
    data = replace(GREY_LEVELS, cache=CacheConfig("host"))
    cache = FrameCache(rows, NAMES, data=data, image_size=16, device=CPU)
    alone, beside = next(train(rows, cache=cache)), next(train(rows, cache=cache, teacher=True))
    beside.teacher = None
    assert same(alone, beside)


def test_an_image_is_read_and_decoded_once_for_both_views(rows, monkeypatch):
    counts = []
    original, read = decoding.decoded, ImageFiles.read
    for teacher in (False, True):
        decoders, reads = [], []
        monkeypatch.setattr(decoding, "decoded", lambda *a, d=decoders: d.append(a) or original(*a))
        monkeypatch.setattr(ImageFiles, "read", lambda *a, r=reads: r.append(a) or read(*a))
        take(train(rows, teacher=teacher), 3)
        counts.append((len(decoders), len(reads)))
    assert counts[0] == counts[1] and counts[0][0] == 2


def test_colours_of_student_and_teacher_are_independent(coordinate_rows):
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    batch = next(train(coordinate_rows, augment=whole, batch_size=16, teacher=True))
    student, teacher = (v["wli"].mean((1, 2, 3)) for v in (batch.views, batch.teacher))
    assert torch.corrcoef(torch.stack([student, teacher]))[0, 1].abs() < 0.7
    assert (student != teacher).all()


def test_the_teacher_s_views_depend_on_no_rank_thread_or_resume_point(rows):
    whole = take(train(rows, teacher=True), 4)
    data = replace(GREY_LEVELS, threads=3)
    assert all(map(same, whole, take(train(rows, teacher=True, data=data), 4)))
    assert all(map(same, whole[2:], take(train(rows, teacher=True, step=2), 2)))
    ranks = [take(train(rows, teacher=True, rank=r, world_size=2), 4) for r in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for name, value in tensors(batch).items():
            assert torch.equal(value, torch.cat([tensors(part)[name] for part in parts]))


def test_a_missing_modality_is_missing_for_the_teacher_too(folder, rows):
    some = [replace(rows[0], files={**rows[0].files, "nbi": None})]
    batch = next(train(some, batch_size=2, teacher=True))
    assert (batch.teacher["nbi"] == 0).all() and (batch.teacher["wli"] != 0).any()
