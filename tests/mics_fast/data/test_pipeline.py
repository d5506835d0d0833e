"""From rows to batches: what a batch holds, and that nothing but (seed, step) decides it."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from mics_fast.config import AugmentConfig, CacheConfig, ColourConfig, DataConfig
from mics_fast.data.augment import BLUR, draw_augmentation
from mics_fast.data.cache import FrameCache
from mics_fast.data.manifest import Row
from mics_fast.data.pipeline import EvalLoader, TrainLoader
from mics_fast.errors import InputError

CPU = torch.device("cpu")
NAMES = ("wli", "nbi")
NO_COLOUR = ColourConfig(0, 0, 0, 0, 0)
GREY_LEVELS = DataConfig(
    mean=dict.fromkeys(NAMES, (0.0, 0.0, 0.0)), std=dict.fromkeys(NAMES, (1 / 255,) * 3), threads=2
)
"""A normalisation that leaves pixels as they are, 0..255."""
WHOLE_FRAME = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}


def row(index, wli, nbi, **changes):
    plain = Row(index, f"pair-{index}", index % 3, index % 2 == 0, 10 + index, "train", (), {})
    return replace(plain, files={"wli": wli, "nbi": nbi}, **changes)


def save(pixels, path):
    Image.fromarray(pixels).save(path)
    return path


def noise(seed, height=24, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def rows(folder):
    """Seven pairs of noise; manifest rows 100 to 106."""
    return [
        row(
            100 + i,
            save(noise(2 * i), folder / f"{i}-wli.png"),
            save(noise(2 * i + 1), folder / f"{i}-nbi.png"),
        )
        for i in range(7)
    ]


def train(rows, **changes):
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
    options = {"data": GREY_LEVELS, "image_size": 16, "batch_size": 4, "device": CPU}
    return EvalLoader(rows, NAMES, **(options | changes))


def take(loader, count):
    return [next(loader) for _ in range(count)]


def tensors(batch):
    """All that a batch holds, by name."""
    plain = ("present", "label", "labelled", "sample_id", "group_id")
    found = {name: getattr(batch, name) for name in plain}
    found |= {f"weak {name}": view for name, view in batch.views.items()}
    return found | {f"strong {name}": view for name, view in (batch.strong or {}).items()}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What a batch holds


@pytest.mark.parametrize("strong", [False, True])
def test_a_training_batch_has_the_promised_shapes_and_types(rows, strong):
    batch = next(train(rows, strong=strong))
    assert list(batch.views) == list(NAMES)
    assert (batch.strong is not None) == strong
    for name, value in tensors(batch).items():
        if name.startswith(("weak", "strong")):
            assert value.shape == (4, 3, 16, 16) and value.dtype == torch.float32
    assert batch.present.shape == (4, 2) and batch.present.dtype == torch.bool
    assert batch.labelled.shape == (4,) and batch.labelled.dtype == torch.bool
    for value in (batch.label, batch.sample_id, batch.group_id):
        assert value.shape == (4,) and value.dtype == torch.int64


def test_labels_and_ids_are_those_of_the_rows(rows):
    rows = [replace(rows[0], label=-1), *rows[1:]]
    by_index = {row.index: row for row in rows}
    for batch in (*take(train(rows), 4), *evaluate(rows)):
        found = [by_index[i] for i in batch.sample_id.tolist()]
        assert batch.label.tolist() == [row.label for row in found]
        assert batch.labelled.tolist() == [row.labelled for row in found]
        assert batch.group_id.tolist() == [row.group for row in found]


def test_the_images_are_those_of_the_row(rows):
    config = AugmentConfig(**WHOLE_FRAME, weak=NO_COLOUR)
    whole = {
        i: {name: batch.views[name][k] for name in NAMES}
        for batch in evaluate(rows)
        for k, i in enumerate(batch.sample_id.tolist())
    }
    for batch in take(train(rows, augment=config), 4):
        for k, i in enumerate(batch.sample_id.tolist()):
            for name in NAMES:
                assert torch.equal(batch.views[name][k], whole[i][name])


def test_a_missing_modality_is_zero_and_marked_absent(rows):
    some = [
        replace(rows[0], files={"wli": rows[0].files["wli"], "nbi": None}),
        replace(rows[1], files={"wli": None, "nbi": rows[1].files["nbi"]}),
        rows[2],
    ]
    data = DataConfig()
    expected = {100: [True, False], 101: [False, True], 102: [True, True]}
    training = train(some, data=data, strong=True, batch_size=3)
    for batch in (next(training), *evaluate(some, data=data)):
        for k, i in enumerate(batch.sample_id.tolist()):
            assert batch.present[k].tolist() == expected[i]
            for column, name in enumerate(NAMES):
                for views in filter(None, (batch.views, batch.strong)):
                    assert views[name][k].any() == expected[i][column]


def test_a_missing_modality_does_not_change_the_other(rows):
    alone = [replace(row, files={**row.files, "nbi": None}) for row in rows]
    a, b = next(train(rows)), next(train(alone))
    assert torch.equal(a.views["wli"], b.views["wli"])


def test_a_batch_keeps_its_values_when_the_next_ones_are_made(rows):
    loader = train(rows, strong=True)
    batch = next(loader)
    before = {name: value.clone() for name, value in tensors(batch).items()}
    take(loader, 5)
    assert all(torch.equal(value, before[name]) for name, value in tensors(batch).items())


def test_one_modality_and_three_work_as_two_do(rows):
    three = [replace(row, files={**row.files, "blue": row.files["wli"]}) for row in rows]
    for names in (("wli",), ("blue", "nbi", "wli")):
        loader = TrainLoader(
            three,
            names,
            data=DataConfig(),
            augment=AugmentConfig(),
            image_size=8,
            batch_size=2,
            seed=0,
            strong=True,
            device=CPU,
        )
        batch = next(loader)
        assert tuple(batch.views) == tuple(batch.strong) == names
        assert batch.present.shape == (2, len(names))


# The training stream


def test_every_row_comes_once_an_epoch_and_batches_run_over_its_end(rows):
    ids = torch.cat([batch.sample_id for batch in take(train(rows), 7)]).reshape(4, 7)
    assert ids.sort(1).values.tolist() == [list(range(100, 107))] * 4
    assert len({tuple(epoch) for epoch in ids.tolist()}) > 1


def test_a_batch_may_be_larger_than_the_number_of_rows(rows):
    batch = next(train(rows[:2], batch_size=9))
    assert torch.bincount(batch.sample_id - 100).tolist() in ([4, 5], [5, 4])


def test_a_row_is_changed_anew_each_time_it_comes(rows):
    views = next(train(rows[:1], batch_size=8)).views["wli"]
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_the_stream_is_decided_by_the_seed(rows):
    a, b, c = (take(train(rows, seed=seed), 2) for seed in (5, 5, 6))
    assert all(map(same, a, b))
    assert not any(map(same, a, c))


def test_the_seed_decides_the_changes_too_not_only_the_order(rows):
    a, b = (next(train(rows[:1], seed=seed)) for seed in (5, 6))
    assert torch.equal(a.sample_id, b.sample_id)
    assert not any(
        torch.equal(a.views[name][i], b.views[name][i]) for name in NAMES for i in range(4)
    )


def test_ranks_share_the_batches_of_one_process(rows):
    whole = take(train(rows, strong=True), 3)
    ranks = [take(train(rows, strong=True, rank=r, world_size=2), 3) for r in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for name, value in tensors(batch).items():
            assert torch.equal(value, torch.cat([tensors(part)[name] for part in parts]))


def test_ranks_share_each_part_of_a_batch_that_is_worked_on_in_parts(rows):
    options = {"strong": True, "batch_size": 8, "parts": 2}
    whole = take(train(rows, **options), 2)
    ranks = [take(train(rows, rank=r, world_size=2, **options), 2) for r in range(2)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        for part, *own in zip(batch.split(2), *(share.split(2) for share in shares), strict=True):
            for name, value in tensors(part).items():
                assert torch.equal(value, torch.cat([tensors(each)[name] for each in own]))


def test_the_number_of_threads_changes_nothing(rows):
    one, three = (
        take(train(rows, strong=True, data=replace(GREY_LEVELS, threads=n)), 3) for n in (1, 3)
    )
    assert all(map(same, one, three))


def test_a_stream_goes_on_where_it_was_left(rows):
    whole = take(train(rows, strong=True), 6)
    assert all(map(same, whole[3:], take(train(rows, strong=True, step=3), 3)))


def test_a_loader_resumes_from_its_state(rows):
    loader = train(rows)
    take(loader, 3)
    assert loader.step == 3
    state = loader.state_dict()
    expected = take(loader, 2)
    other = train(rows)
    next(other)
    other.load_state_dict(state)
    assert other.step == 3
    assert all(map(same, expected, take(other, 2)))


@pytest.mark.parametrize(
    ("changes", "named"), [({"seed": 1}, "seed 0"), ({"batch_size": 2}, "batch_size 4")]
)
def test_the_state_of_another_stream_is_refused(rows, changes, named):
    with pytest.raises(InputError, match=named):
        train(rows, **changes).load_state_dict(train(rows).state_dict())


def test_the_state_of_other_rows_is_refused(rows):
    with pytest.raises(InputError, match="rows_checksum"):
        train(rows[::-1]).load_state_dict(train(rows).state_dict())


def test_the_strong_view_changes_nothing_else(rows):
    a, b = next(train(rows, strong=False)), next(train(rows, strong=True))
    b.strong = None
    assert same(a, b)


# Geometry: images that hold their own coordinates


def coordinates(channels, side, scale=1):
    """A square image whose two given channels are x and y in units of the larger image."""
    ramp = ((np.arange(side) + 0.5) * scale - 0.5).round().astype(np.uint8)
    pixels = np.full((side, side, 3), 128, np.uint8)
    pixels[..., channels[0]] = ramp
    pixels[..., channels[1]] = ramp[:, None]
    return pixels


@pytest.fixture(scope="module")
def coordinate_rows(folder):
    """Sixteen copies of one pair: the same 256 x 256 coordinates, in other channels."""
    wli = save(coordinates((0, 1), 256), folder / "xy-wli.png")
    nbi = save(coordinates((2, 0), 256), folder / "xy-nbi.png")
    return [row(i, wli, nbi) for i in range(16)]


STILL = AugmentConfig(crop_scale=(0.1, 0.9), crop_ratio=(0.5, 2.0), weak=NO_COLOUR)


def test_a_pair_is_cropped_and_flipped_as_one(coordinate_rows):
    batch = next(train(coordinate_rows, augment=STILL, image_size=64, batch_size=16))
    wli, nbi = batch.views["wli"], batch.views["nbi"]
    assert torch.equal(wli[:, [0, 1]], nbi[:, [2, 0]])
    ramps = wli[:, 0, 0, -1] - wli[:, 0, 0, 0], wli[:, 1, -1, 0] - wli[:, 1, 0, 0]
    assert all((ramp < 0).any() and (ramp > 0).any() for ramp in ramps)


def test_a_pair_of_unequal_sizes_shows_the_same_part_of_the_scene(folder, coordinate_rows):
    small = save(coordinates((2, 0), 128, scale=2), folder / "xy-nbi-small.png")
    some = [replace(r, files={**r.files, "nbi": small}) for r in coordinate_rows]
    batch = next(train(some, augment=STILL, image_size=64, batch_size=16))
    difference = (batch.views["wli"][:, [0, 1]] - batch.views["nbi"][:, [2, 0]]).abs()
    assert difference.max() <= 3.0  # both crops begin and end at whole pixels, one of them of 2


def test_the_crop_and_the_flips_are_those_that_were_drawn(coordinate_rows):
    batch = next(train(coordinate_rows, augment=STILL, image_size=64, batch_size=16))
    centres = (np.arange(64) + 0.5) / 64
    for k, i in enumerate(batch.sample_id.tolist()):
        drawn = draw_augmentation(STILL, seed=0, epoch=0, sample_id=i, modalities=2)
        found = batch.views["wli"][k, 0, 32], batch.views["wli"][k, 1, :, 32]
        for axis in range(2):
            place = centres[::-1] if drawn.flip[axis] else centres
            expected = (drawn.anchor[axis] + place * drawn.shape[axis]) * 256 - 0.5
            assert abs(found[axis].numpy() - expected)[2:-2].max() <= 1.5


def test_weak_and_strong_views_share_their_geometry(coordinate_rows):
    config = replace(STILL, strong=NO_COLOUR)
    batch = next(train(coordinate_rows, augment=config, image_size=64, batch_size=16, strong=True))
    assert all(torch.equal(batch.views[name], batch.strong[name]) for name in NAMES)


EVERYTHING = AugmentConfig(
    crop_scale=(0.2, 1.0),
    crop_ratio=(0.5, 2.0),
    weak=ColourConfig(0.3, 0.3, 0.3, hue=20.0),
    strong=ColourConfig(0.4, 0.4, 0.4, hue=30.0, blur=1.5),
)


@pytest.fixture(scope="module")
def block_rows(folder):
    """Sixteen copies of a pair that shows one pattern of large blocks, in other colours."""
    pattern = np.kron(np.random.default_rng(5).integers(0, 2, (9, 9)), np.ones((28, 28), int))
    files = []
    for name, dark, bright in (
        ("wli", (60, 40, 30), (200, 150, 140)),
        ("nbi", (30, 60, 70), (90, 180, 190)),
    ):
        pixels = np.where(pattern[..., None], bright, dark).astype(np.uint8)
        files.append(save(pixels, folder / f"blocks-{name}.png"))
    return [row(i, *files) for i in range(16)]


def bright(view):
    """Where an image is brighter than half way between its blocks, (H, W) bool."""
    grey = view.float().sum(0)
    return grey > (grey.min() + grey.max()) / 2


def near_an_edge(mask):
    """The pixels of a mask with another value among their eight neighbours."""
    padded = torch.nn.functional.pad(mask[None, None].float(), (1, 1, 1, 1), mode="replicate")
    highest = torch.nn.functional.max_pool2d(padded, 3, 1)[0, 0]
    lowest = -torch.nn.functional.max_pool2d(-padded, 3, 1)[0, 0]
    return highest != lowest


@pytest.mark.parametrize("mode", ["none", "host"])
def test_every_augmentation_leaves_a_pair_aligned_to_a_pixel(block_rows, mode):
    data = replace(GREY_LEVELS, cache=CacheConfig(mode))
    cache = None
    if mode == "host":
        cache = FrameCache(block_rows, NAMES, data=data, image_size=96, device=CPU)
    loader = train(
        block_rows, augment=EVERYTHING, data=data, image_size=96, batch_size=16, strong=True,
        cache=cache,
    )  # fmt: skip
    shares = []
    for batch in take(loader, 3):
        for k in range(16):
            masks = [
                bright(views[name][k]) for views in (batch.views, batch.strong) for name in NAMES
            ]
            for mask in masks[1:]:
                differs = mask != masks[0]
                # The outermost pixels may show a sliver of the next block in one view alone.
                assert not (differs & ~near_an_edge(masks[0]))[1:-1, 1:-1].any()
                shares.append(differs.float().mean().item())
    # a shift by one pixel would move all of the edges: 4 % of the pixels
    assert np.mean(shares) < 0.01


def test_the_views_are_those_of_a_reference_in_numpy(folder, reference_resize):
    """Crop, resize, flips, blur, colour and normalisation, one after the other in float64."""
    means, stds = {"wli": (0.5, 0.4, 0.3), "nbi": (0.2, 0.3, 0.4)}, {"wli": (0.2, 0.3, 0.4)}
    data = DataConfig(mean=means, std=stds)
    pixels = {name: noise(40 + k, 90, 120) for k, name in enumerate(NAMES)}
    files = [save(pixels[name], folder / f"reference-{name}.png") for name in NAMES]
    config = replace(EVERYTHING, crop_scale=(0.4, 0.9), crop_ratio=(0.8, 1.25))
    batch = next(train([row(3, *files)], augment=config, data=data, strong=True, image_size=32,
                       batch_size=6))  # fmt: skip
    worst = 0.0
    for epoch in range(6):
        drawn = draw_augmentation(config, seed=0, epoch=epoch, sample_id=3, modalities=2)
        for place, name in enumerate(NAMES):
            left, top = (round(float(drawn.anchor[k] * (120, 90)[k])) for k in range(2))
            ends = [float((drawn.anchor[k] + drawn.shape[k]) * (120, 90)[k]) for k in range(2)]
            crop = pixels[name][top : round(ends[1]), left : round(ends[0])]
            square = np.rint(reference_resize(crop, 32))
            square = square[:, ::-1] if drawn.flip[0] else square
            square = square[::-1] if drawn.flip[1] else square
            mean = np.array(means[name])
            std = np.array(stds.get(name, (0.229, 0.224, 0.225)))
            for views, values in ((batch.views, drawn.weak), (batch.strong, drawn.strong)):
                numbers = values[place].astype(np.float64)
                frame = square
                if values is drawn.strong:
                    sigma, reach = numbers[BLUR], int(np.ceil(3 * numbers[BLUR]))
                    frame = gaussian_filter(
                        square, (sigma, sigma, 0), mode="mirror", radius=(reach, reach, 0)
                    )
                expected = twisted(np.rint(frame), *numbers[:BLUR])
                found = views[name][epoch].permute(1, 2, 0).double().numpy() * std + mean
                worst = max(worst, abs(255 * found - expected).max())
    # Grey levels. After resize and blur they are rounded, which may go the other way by one; colour
    # then multiplies that by up to 1.4 * 1.4 * 1.9.
    assert worst <= 2.5


# Colour


@pytest.fixture(scope="module")
def same_rows(folder):
    """Eight rows with one file in both modalities."""
    path = save(noise(77, 32, 32), folder / "same.png")
    return [row(i, path, path) for i in range(8)]


def twisted(pixels, brightness, contrast, saturation, hue):
    """The documented formula in float64."""
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    cosine, sine = np.cos(np.radians(hue)), np.sin(np.radians(hue))
    rotation = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    matrix = np.linalg.inv(yiq) @ rotation @ np.diag([1, saturation, saturation]) @ yiq
    changed = brightness * (contrast * pixels @ matrix.T + 128 * (1 - contrast))
    return np.clip(changed, 0, 255)


def test_the_modalities_of_a_pair_have_their_own_colours(same_rows):
    batch = next(train(same_rows, batch_size=8, strong=True))
    for views in (batch.views, batch.strong):
        assert ((views["wli"] - views["nbi"]).flatten(1).abs().amax(1) > 2).all()
    assert ((batch.views["wli"] - batch.strong["wli"]).flatten(1).abs().amax(1) > 2).all()


def test_colours_follow_the_documented_formula(same_rows):
    config = AugmentConfig(
        **WHOLE_FRAME,
        weak=ColourConfig(0.3, 0.3, 0.3, hue=30.0),
        strong=ColourConfig(0.8, 0.8, 0.8, hue=90.0),
    )
    batch = next(train(same_rows, augment=config, image_size=32, batch_size=8, strong=True))
    pixels = noise(77, 32, 32).astype(np.float64)
    for k, i in enumerate(batch.sample_id.tolist()):
        drawn = draw_augmentation(config, seed=0, epoch=0, sample_id=i, modalities=2)
        for views, values in ((batch.views, drawn.weak), (batch.strong, drawn.strong)):
            for name, numbers in zip(NAMES, values, strict=True):
                expected = twisted(pixels, *numbers[:BLUR].astype(np.float64))
                found = views[name][k].permute(1, 2, 0).numpy()
                assert abs(found - expected).max() <= 2e-4  # grey levels; float32


def test_the_strong_view_is_blurred_by_the_drawn_gaussian(same_rows):
    config = AugmentConfig(**WHOLE_FRAME, weak=NO_COLOUR, strong=replace(NO_COLOUR, blur=2.0))
    batch = next(train(same_rows, augment=config, image_size=32, batch_size=8, strong=True))
    for k, i in enumerate(batch.sample_id.tolist()):
        drawn = draw_augmentation(config, seed=0, epoch=0, sample_id=i, modalities=2)
        for name, numbers in zip(NAMES, drawn.strong, strict=True):
            sigma = float(numbers[BLUR])
            expected = gaussian_filter(
                batch.views[name][k].double().numpy(),
                (0, sigma, sigma),
                mode="mirror",
                radius=(0, int(np.ceil(3 * sigma)), int(np.ceil(3 * sigma))),
            )
            assert abs(batch.strong[name][k].numpy() - expected).max() <= 0.6


# Normalisation


def test_the_whole_frame_at_its_own_size_is_normalised_exactly(rows, folder):
    mean, std = {"wli": (0.5, 0.4, 0.3)}, {"wli": (0.25, 0.2, 0.3)}
    pixels = noise(5, 16, 16)
    path = save(pixels, folder / "square.png")
    (batch,) = evaluate([row(0, path, path)], data=DataConfig(mean=mean, std=std))
    scaled = pixels.transpose(2, 0, 1) / 255
    for name, m, s in (
        ("wli", mean["wli"], std["wli"]),
        ("nbi", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        expected = (scaled - np.reshape(m, (3, 1, 1))) / np.reshape(s, (3, 1, 1))
        np.testing.assert_allclose(batch.views[name][0].numpy(), expected, atol=2e-6)


def test_per_image_normalisation_takes_mean_and_spread_away(rows):
    data = DataConfig(normalize="image")
    for batch in (next(train(rows, data=data)), *evaluate(rows, data=data)):
        for view in batch.views.values():
            assert view.mean((2, 3)).abs().max() < 1e-5
            assert (view.std((2, 3), correction=0) - 1).abs().max() < 2e-3


def test_per_image_normalisation_is_that_of_the_strong_view_too(rows):
    plain = next(train(rows, strong=True)).strong
    normalised = next(train(rows, strong=True, data=DataConfig(normalize="image"))).strong
    for name in NAMES:
        pixels = plain[name].double()
        variance, mean = torch.var_mean(pixels, (2, 3), correction=0, keepdim=True)
        expected = (pixels - mean) / (variance + 1).sqrt()
        torch.testing.assert_close(normalised[name].double(), expected, atol=1e-5, rtol=0)


def test_per_image_normalisation_leaves_a_flat_image_at_zero(folder):
    path = save(np.full((16, 16, 3), 200, np.uint8), folder / "flat.png")
    (batch,) = evaluate([row(0, path, path)], data=DataConfig(normalize="image"))
    assert not batch.views["wli"].any()


# Evaluation


def test_evaluation_goes_once_through_the_rows_in_order_any_number_of_times(rows):
    loader = evaluate(rows)
    assert len(loader) == 2
    next(iter(loader))  # a pass that is given up
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.label) for batch in batches] == [4, 3]
        assert [len(batch.views["nbi"]) for batch in batches] == [4, 3]
        assert torch.cat([batch.sample_id for batch in batches]).tolist() == list(range(100, 107))


def test_evaluation_does_not_depend_on_the_batch_size(rows):
    whole = torch.cat([batch.views["wli"] for batch in evaluate(rows, batch_size=50)])
    single = torch.cat([batch.views["wli"] for batch in evaluate(rows, batch_size=1)])
    assert torch.equal(whole, single)


def test_nothing_to_evaluate_is_no_batch():
    assert len(evaluate([])) == 0 and list(evaluate([])) == []


def test_the_evaluation_view_is_the_whole_frame(folder):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :32, 0] = 255
    wide[16:, :, 1] = 255
    path = save(wide, folder / "wide.png")
    (batch,) = evaluate([row(0, path, path)])
    red, green, _ = batch.views["wli"][0]
    assert (red[:, :7] == 255).all() and (red[:, 9:] == 0).all()
    assert (green[:7] == 0).all() and (green[9:] == 255).all()


def test_a_smaller_image_is_averaged_not_sampled(folder):
    path = save(noise(9, 64, 64), folder / "large-noise.png")
    (batch,) = evaluate([row(0, path, path)], image_size=8)
    # noise of 74 grey levels: 37 where four pixels are interpolated, 6 where a triangle filter of
    # 16 pixels takes the mean
    assert batch.views["wli"].std() < 12


# Files


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
        take(iter(loader(some, **options)), 2)
    message = str(caught.value)
    assert str(path) in message and "'lesion 5'" in message and "nbi" in message
    assert "\n" not in message


def test_without_dali_a_sentence_says_what_to_install(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for loader in (train, evaluate):
        with pytest.raises(InputError, match=r"pip install 'mics-fast\[train\]'"):
            loader(rows)


def test_no_rows_cannot_be_trained_on():
    with pytest.raises(InputError, match="no rows"):
        train([])


def test_a_batch_that_ranks_cannot_share_is_refused(rows):
    with pytest.raises(InputError, match=r"batch of 4 .* 3 processes"):
        train(rows, world_size=3)
    with pytest.raises(InputError, match=r"batch of 4 .* 2 processes in 4 parts"):
        train(rows, world_size=2, parts=4)


def test_a_standard_deviation_of_zero_is_refused(rows):
    with pytest.raises(InputError, match=r"data\.std of nbi"):
        train(rows, data=DataConfig(std={"nbi": (0.2, 0.0, 0.2)}))


def test_crops_of_large_frames_never_leave_the_frame(folder):
    path = save(np.zeros((1072, 1920, 3), np.uint8), folder / "large.bmp")
    config = AugmentConfig(crop_scale=(0.01, 1.0), crop_ratio=(0.2, 5.0))
    loader = train([row(0, Path(path), None)], augment=config, batch_size=64)
    assert len(take(loader, 2)[1].label) == 64
