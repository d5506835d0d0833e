"""The resize on a CPU equals a numpy reference and DALI, for any number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import PairGraph, new_pipeline, resized
from mics_fast.data.image_threads import image_workers
from mics_fast.data.loaders import EvalLoader, TrainLoader
from mics_fast.data.manifest import Row
from mics_fast.data.resize import blurred, resized_square
from mics_fast.options import AugmentConfig, CacheConfig
from tests.mics_fast.data.loading import CPU, GREY_LEVELS, NAMES, NO_COLOUR

WHOLE = (0.0, 0.0, 1.0, 1.0)
PART = (0.13, 0.52, 0.71, 0.94)
REGIONS = (WHOLE, (1.0, 0.0, 0.0, 1.0), PART, (0.71, 0.94, 0.13, 0.52))
SIZES = ((576, 720), (90, 120), (20, 31), (16, 16), (1, 1), (2, 40), (7, 3000))
# Grey levels. Rounding alone is 0.5; float32 moves what is half way between two levels.
ROUNDING = 0.5 + 1e-3


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def square(pixels, side, region=WHOLE):
    found = resized_square(torch.from_numpy(pixels), side, np.array(region, np.float32))
    return found.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("side", [16, 97])
def test_a_square_is_that_of_the_reference_but_for_rounding(size, region, side, reference_resize):
    pixels = noise(*size)
    expected = reference_resize(pixels, side, np.array(region, np.float32).astype(np.float64))
    assert abs(square(pixels, side, region) - expected).max() <= ROUNDING


def test_a_region_narrower_than_a_pixel_is_read(reference_resize):
    pixels, region = noise(5, 9), (0.30, 0.41, 0.31, 0.45)
    expected = reference_resize(pixels, 8, np.array(region, np.float32).astype(np.float64))
    assert abs(square(pixels, 8, region) - expected).max() <= ROUNDING


def test_a_square_is_that_of_dali_but_for_ties(kvasir_mini5):
    from nvidia.dali import fn

    frames = [noise(*size) for size in SIZES]
    frames += [np.array(Image.open(path)) for path in sorted(kvasir_mini5.glob("*/*.jpg"))[:6]]
    for region in REGIONS:
        pipeline = new_pipeline(CPU, threads=1, batch_size=len(frames), prefetch=1)
        with pipeline:
            frame = fn.external_source(name="frame", layout="HWC")
            pipeline.set_outputs(resized(frame, 64, np.array(region, np.float32)))
        pipeline.build()
        (outputs,) = pipeline.run(frame=frames)
        for frame, output in zip(frames, outputs, strict=True):
            apart = abs(square(frame, 64, region) - np.asarray(output).astype(float))
            # Values half way between two levels may be rounded either way.
            assert apart.max() <= 1 and (apart > 0).mean() <= 0.01


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.4, 4.0])
@pytest.mark.parametrize("size", [(40, 40), (3, 3), (1, 1)])
def test_blur_is_a_gaussian_mirrored_at_the_border(sigma, size):
    planes = noise(*size).transpose(2, 0, 1).astype(np.float32)
    found = blurred(torch.from_numpy(planes), sigma).numpy()
    reach = int(np.ceil(3 * sigma))
    if sigma == 0:
        assert (found == planes).all()
    else:
        expected = gaussian_filter(
            planes.astype(np.float64), (0, sigma, sigma), mode="mirror", radius=(0, reach, reach)
        )
        assert abs(found - expected).max() <= ROUNDING


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Five pairs of smooth noise, the NBI of one missing."""
    folder = tmp_path_factory.mktemp("images")
    made = []
    for number in range(5):
        files = {}
        for place, name in enumerate(NAMES):
            image = Image.fromarray(noise(9 + number, 12 + place)).resize((150, 110))
            files[name] = folder / f"{number}-{name}.jpg"
            image.save(files[name])
        made.append(Row(number, str(number), 0, True, number, "train", (), files))
    made[3].files["nbi"] = None
    return made


def batches(rows, mode="none", augment=None, **changes):
    """Two batches of training, and those of evaluation; pixels in grey levels."""
    data = replace(GREY_LEVELS, cache=CacheConfig(mode), **changes)
    cache = None
    if mode != "none":
        cache = FrameCache(rows, NAMES, data=data, image_size=48, device=CPU)
    loader = TrainLoader(
        rows, NAMES, data=data, augment=augment or AugmentConfig(), image_size=48, batch_size=4,
        seed=1, strong=True, device=CPU, cache=cache,
    )  # fmt: skip
    evaluation = EvalLoader(rows, NAMES, data=data, image_size=48, batch_size=4, device=CPU)
    return [next(loader), next(loader), *evaluation]


def views(batch):
    return [each[name] for each in (batch.views, batch.strong) if each for name in NAMES]


@pytest.mark.parametrize("mode", ["none", "host"])
def test_the_graph_that_resizes_on_a_gpu_gives_the_same_views(rows, mode, monkeypatch):
    """It runs on a CPU here, blur included; colours are off, which would multiply the rounding."""
    augment = AugmentConfig(weak=NO_COLOUR, strong=replace(NO_COLOUR, blur=1.5))
    ours = batches(rows, mode, augment)
    monkeypatch.setattr(PairGraph, "resizes", True)
    theirs = batches(rows, mode, augment)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.sample_id, b.sample_id) and torch.equal(a.present, b.present)
        for x, y in zip(views(a), views(b), strict=True):
            apart = (x - y).abs()
            assert apart.max() <= 1.001 and (apart > 0.5).float().mean() <= 0.01


@pytest.mark.parametrize("mode", ["none", "host"])
def test_the_threads_of_torch_and_of_the_loader_change_nothing(rows, mode, set_threads):
    made = []
    for of_torch, of_loader in ((1, 1), (2, 3)):
        set_threads(of_torch)
        made.append(batches(rows, mode, threads=of_loader))
    for a, b in zip(*made, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(views(a), views(b), strict=True))


def test_workers_use_one_thread_each_and_leave_the_others_their_number(set_threads):
    set_threads(3)
    with image_workers(2) as workers:
        assert list(workers.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 3
