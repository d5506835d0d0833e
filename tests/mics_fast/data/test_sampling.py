"""Class-balanced sampling: the frequency of classes and rows, and its dependence on the seed."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from mics_fast import prepare
from mics_fast.data.loaders import TrainLoader
from mics_fast.data.manifest import Row, read_manifest
from mics_fast.data.sampling import BalancedOrder
from mics_fast.options import AugmentConfig, DataConfig

LABELS = [0] * 90 + [2] * 9 + [5]  # one class of ninety rows, one of nine, one of a single row


def drawn(count, start=0, seed=0, labels=LABELS):
    order = BalancedOrder(seed, labels)
    return [order.row(number) for number in range(start, start + count)]


def test_every_class_comes_equally_often_in_any_stretch():
    """To within one sample at either end, where the stretch cuts a block."""
    for start, count in ((0, 300), (7, 100), (100, 16)):
        counts = Counter(LABELS[place] for place, _ in drawn(count, start))
        assert sum(counts.values()) == count
        assert all(abs(counts[label] - count / 3) < 2 for label in (0, 2, 5))


def test_a_class_goes_through_its_rows_before_one_comes_again():
    own = defaultdict(list)
    for place, before in drawn(3 * 180):
        own[LABELS[place]].append((place, before))
    for label, size in ((0, 90), (2, 9), (5, 1)):
        for number in range(180 // size):
            of_pass = own[label][number * size : (number + 1) * size]
            assert len({place for place, _ in of_pass}) == size
            assert {before for _, before in of_pass} == {number}


def test_neither_classes_nor_rows_come_in_a_fixed_order():
    found = drawn(3 * 18)
    blocks = [tuple(LABELS[p] for p, _ in found[i : i + 3]) for i in range(0, 54, 3)]
    assert len(set(blocks)) > 3
    nines = [place for place, _ in found if LABELS[place] == 2]
    assert nines[:9] != nines[9:]
    assert drawn(30, seed=1) != drawn(30)


def test_a_sample_depends_on_its_number_alone():
    assert drawn(50, start=123) == drawn(173)[123:]


def test_the_order_is_the_same_on_every_machine_and_numpy_version():
    places = [place for place, _ in drawn(9, seed=7, labels=[0, 0, 0, 1, 1, 2])]
    assert places == [2, 3, 5, 4, 0, 5, 5, 3, 1]


def test_a_class_without_a_row_is_left_out():
    assert {place for place, _ in drawn(8, labels=[4, 4, 9])} == {0, 1, 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight rows of class 0 and one of class 1."""
    folder, found = tmp_path_factory.mktemp("images"), []
    for number in range(9):
        file = folder / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        label = int(number == 8)
        found.append(Row(number, str(number), label, True, number, "train", (), {"wli": file}))
    return found


def loader(rows, data=None, **changes):
    return TrainLoader(
        rows, ["wli"], data=data or DataConfig(threads=1), augment=AugmentConfig(), image_size=16,
        batch_size=4, seed=0, balanced=True, device=torch.device("cpu"), **changes,
    )  # fmt: skip


def test_half_of_every_batch_is_of_the_rare_class(rows):
    batches = loader(rows)
    for _ in range(4):
        assert next(batches).label.tolist().count(1) == 2


def test_a_row_that_comes_twice_in_an_epoch_is_augmented_anew(rows):
    batch = next(loader(rows))
    first, second = batch.views["wli"][batch.label == 1]
    assert not torch.equal(first, second)


def test_a_balanced_stream_goes_on_at_any_step_and_is_shared_by_ranks(rows):
    whole = [next(stream) for stream in [loader(rows)] for _ in range(5)]
    resumed = next(loader(rows, step=4))
    assert torch.equal(resumed.sample_id, whole[4].sample_id)
    assert torch.equal(resumed.views["wli"], whole[4].views["wli"])
    parts = [next(loader(rows, step=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.sample_id for p in parts]), whole[3].sample_id)
    assert torch.equal(torch.cat([p.views["wli"] for p in parts]), whole[3].views["wli"])


def test_in_the_place_of_a_bad_row_comes_another(rows, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    worse = [*rows[:8], Row(8, "8", 1, True, 8, "train", (), {"wli": broken})]
    batches = loader(worse, data=DataConfig(threads=1, on_bad_file="skip"))
    assert next(batches).label.tolist() == [0, 0, 0, 0]


def test_a_balanced_stream_of_shards_is_that_of_files(tmp_path):
    streams = []
    for name, options in (("files", []), ("shards", ["--to-shards", "4"])):
        folder = tmp_path / name
        prepare.main(["phantom", "--out", str(folder), "--pairs", "20", *options])
        rows = read_manifest(folder / "manifest.csv", ["wli"]).select("train")
        streams.append(loader(rows))
    for _ in range(5):
        files, shards = (next(stream) for stream in streams)
        assert torch.equal(files.sample_id, shards.sample_id)
        assert torch.equal(files.views["wli"], shards.views["wli"])
