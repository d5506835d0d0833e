"""The frame cache: the same stream whatever is cached, and memory checked in advance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.data import cache as cache_module
from mics_fast.data.augmentation import draw_augmentation
from mics_fast.data.cache import FrameCache, check_memory, free_host_memory
from mics_fast.data.loaders import TrainLoader
from mics_fast.data.manifest import Row
from mics_fast.data.shards import read_image
from mics_fast.options import AugmentConfig, CacheConfig
from tests.mics_fast.data.loading import CPU, GREY_LEVELS, NAMES, NO_COLOUR, same, take


def data(mode, side=None):
    return replace(GREY_LEVELS, cache=CacheConfig(mode, side))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Nineteen pairs of noise of different sizes; one misses its NBI."""
    folder = tmp_path_factory.mktemp("images")
    made = []
    for number in range(19):
        files = {}
        for place, name in enumerate(NAMES):
            generator = np.random.default_rng(2 * number + place)
            pixels = generator.integers(0, 256, (40 + number, 50, 3), np.uint8)
            files[name] = folder / f"{number}-{name}.png"
            Image.fromarray(pixels).save(files[name])
        if number == 7:
            files["nbi"] = None
        made.append(Row(number, str(number), 0, True, number, "train", (), files))
    return made


def keep(rows, mode="host", side=None):
    return FrameCache(rows, NAMES, data=data(mode, side), image_size=32, device=CPU)


def train(rows, mode="host", kept=None, **changes):
    options = {"augment": AugmentConfig(), "image_size": 32, "batch_size": 8, "seed": 3}
    if mode != "none":
        options["cache"] = kept or keep(rows, mode)
    return TrainLoader(rows, NAMES, data=data(mode), strong=True, device=CPU, **(options | changes))


@pytest.mark.parametrize("mode", ["none", "host", "device"])
def test_after_40_batches_a_rebuilt_loader_gives_the_next_8_bit_for_bit(rows, mode):
    loader = train(rows, mode)
    take(loader, 40)
    assert loader.step == 40 and loader.epoch == 40 * 8 // 19
    expected = take(loader, 8)
    assert all(map(same, expected, take(train(rows, mode, step=40), 8)))


def test_a_frame_that_was_kept_before_changes_no_batch(rows):
    full = keep(rows)
    full.fill(rows)
    assert all(map(same, take(train(rows), 6), take(train(rows, kept=full), 6)))


def test_host_and_device_memory_give_the_same_batches(rows):
    assert all(map(same, take(train(rows, "host"), 4), take(train(rows, "device"), 4)))


def test_ranks_share_the_batches_of_one_process_from_memory_too(rows):
    whole = take(train(rows), 4)
    parts = [take(train(rows, rank=rank, world_size=2), 4) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name in NAMES:
            assert torch.equal(batch.views[name], torch.cat([half.views[name] for half in halves]))


def test_no_file_is_opened_after_the_first_epoch(rows, monkeypatch):
    opened = []

    def watched(path):
        opened.append(path)
        return read_image(path)

    monkeypatch.setattr("mics_fast.data.image_files.read_image", watched)
    take(train(rows), 12)
    assert len(opened) == len(set(opened)) == 2 * len(rows) - 1


def test_loaders_of_both_stages_share_the_frames(rows, monkeypatch):
    kept = keep(rows)
    take(train(rows, kept=kept), 5)
    monkeypatch.setattr("mics_fast.data.image_files.read_image", None)
    take(train(rows[3:9], kept=kept), 3)


def test_a_missing_modality_stays_missing(rows):
    for batch in take(train(rows), 6):
        there = batch.sample_id != 7
        assert batch.present[:, 0].all() and torch.equal(batch.present[:, 1], there)
        assert not batch.views["nbi"][~there].any() and not batch.strong["nbi"][~there].any()


def test_kept_frames_are_256_224ths_of_the_views_or_as_large_as_asked(rows):
    assert keep(rows).side == 37 and keep(rows, side=50).side == 50
    kept = FrameCache(rows[:1], NAMES, data=data("host"), image_size=224, device=CPU)
    kept.fill(rows[:1])
    frame, problem = kept.frame(rows[0], "wli")
    assert frame.shape == (256, 256, 3) and frame.dtype == np.uint8 and not problem


def test_a_kept_frame_is_cropped_flipped_and_resized_as_drawn(rows, reference_resize):
    config = AugmentConfig(crop_scale=(0.1, 0.9), crop_ratio=(0.5, 2.0), weak=NO_COLOUR)
    kept = keep(rows)
    for batch in take(train(rows, kept=kept, augment=config), 2):
        for k, i in enumerate(batch.sample_id.tolist()):
            drawn = draw_augmentation(config, seed=3, epoch=0, sample_id=i, modalities=2)
            for name in NAMES[: 1 + int(i != 7)]:
                frame, _ = kept.frame(rows[i], name)
                expected = reference_resize(frame, 32, drawn.region().astype(np.float64))
                found = batch.views[name][k].permute(1, 2, 0).numpy()
                assert abs(found - expected).max() <= 0.51  # rounding


def test_what_does_not_fit_is_refused_with_its_size(rows, monkeypatch):
    monkeypatch.setattr(cache_module, "free_host_memory", lambda: 3 * 2**30)
    with pytest.raises(InputError) as caught:
        keep(rows, side=6000)
    message = str(caught.value)
    assert "data.cache.mode needs 3.8 GiB for 19 rows of 2 frames of 6000 x 6000" in message
    assert "3.0 GiB of main memory are free" in message and "data.cache.side" in message
    check_memory((19, 2, 5000, 5000, 3), CPU)


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(cache_module, "free_host_memory", lambda: 4 * 2**30)
    needs_two = (2**11, 1, 2**10, 2**10, 1)  # GiB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_memory(needs_two, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"1\.3 GiB of main .* for each of the 3 processes"):
        check_memory(needs_two, CPU)


def test_the_free_memory_is_that_of_the_control_group_where_it_has_less(tmp_path, monkeypatch):
    whole = free_host_memory()
    assert 2**20 < whole < 2**50
    monkeypatch.setattr(cache_module, "Path", lambda _: tmp_path)
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.max").write_text("1400\n")
    assert free_host_memory() == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_memory() > 2**20


def test_views_may_be_bfloat16(rows):
    one, half = (
        next(
            TrainLoader(
                rows, NAMES, data=replace(data("none"), dtype=dtype), augment=AugmentConfig(),
                image_size=32, batch_size=8, seed=3, device=CPU, strong=True,
            )
        )
        for dtype in ("fp32", "bf16")
    )  # fmt: skip
    for name in NAMES:
        for a, b in ((one.views[name], half.views[name]), (one.strong[name], half.strong[name])):
            assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_the_number_of_batches_in_flight_changes_nothing(rows, prefetch):
    def batches(count):
        return take(
            TrainLoader(
                rows, NAMES, data=replace(data("none"), prefetch=count), augment=AugmentConfig(),
                image_size=32, batch_size=8, seed=3, device=CPU, strong=True,
            ),
            5,
        )  # fmt: skip

    assert all(map(same, batches(2), batches(prefetch)))
