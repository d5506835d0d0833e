"""Pairs in tar shards: nothing is lost, and the stream is as exact as from files."""

from __future__ import annotations

import itertools
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mics_fast import prepare
from mics_fast.common.errors import InputError
from mics_fast.data.cache import FrameCache
from mics_fast.data.image_files import ImageFiles
from mics_fast.data.loaders import EvalLoader, TrainLoader
from mics_fast.data.manifest import read_manifest
from mics_fast.data.sampling import shards_of
from mics_fast.data.shards import read_image, read_index, shard_order
from mics_fast.options import AugmentConfig, CacheConfig, DataConfig
from tests.mics_fast.data.loading import CPU, NAMES, same, take


@pytest.fixture
def manifests(tmp_path):
    """The manifest of 30 pairs in files, one without NBI, and that of the same pairs in shards."""
    source = tmp_path / "pairs"
    for number, place in itertools.product(range(30), range(2)):
        folder = source / f"{'ab'[number % 2]}_{NAMES[place].upper()}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(2 * number + place).integers(0, 256, (40, 50, 3), np.uint8)
        if (number, place) != (11, 1):
            Image.fromarray(pixels).save(folder / f"x.{number}{'.png' if place else '.jpg'}")
    for out, options in (("files", []), ("shards", ["--to-shards", "4"])):
        prepare.main([str(source), "--out", str(tmp_path / out), "--keep-orphans", *options])
    return [read_manifest(tmp_path / out / "manifest.csv") for out in ("files", "shards")]


def train(rows, data=None, **changes):
    options = {"augment": AugmentConfig(), "image_size": 16, "batch_size": 6, "seed": 2}
    return TrainLoader(
        rows, NAMES, data=data or DataConfig(), device=CPU, strong=True, **(options | changes)
    )


def test_the_rows_are_the_same_and_so_are_the_bytes_of_their_images(manifests):
    files, shards = manifests
    assert len(files.rows) == len(shards.rows) == 30
    for a, b in zip(files.rows, shards.rows, strict=True):
        assert (a.id, a.label, a.split, a.labelled) == (b.id, b.label, b.split, b.labelled)
        for name in NAMES:
            if a.files[name] is None:
                assert b.files[name] is None and a.id == "b/x.11"
            else:
                assert a.files[name].read_bytes() == read_image(b.files[name]).tobytes()


def test_a_shard_is_of_one_split_and_of_at_most_so_many_rows(manifests):
    _, shards = manifests
    members = {}
    for row in shards.rows:
        shard = {path.parent for path in row.files.values() if path}.pop()
        assert shard.name.startswith(f"{row.split}-")
        members.setdefault(shard, []).append(row)
    assert len(members) == sum(-(-len(shards.select(split)) // 4) for split in ("train", "val",
                                                                               "test"))  # fmt: skip
    assert max(map(len, members.values())) == 4


def test_a_shard_can_be_read_by_other_tools(manifests):
    _, shards = manifests
    row = shards.rows[3]
    with tarfile.open(row.files["wli"].parent) as tar:
        names = tar.getnames()
        about = json.load(tar.extractfile(f"{row.index:06d}.json"))
    assert about == {"id": row.id, "label": shards.classes[row.label], "split": row.split}
    keys = [name.split(".")[0] for name in names]
    assert [key for key, _ in itertools.groupby(keys)] == list(dict.fromkeys(keys))
    index = row.files["wli"].parent.with_suffix(".idx").read_text().splitlines()
    assert index[0] == f"v1.2 {len(set(keys))}" and len(index) == 1 + len(set(keys))


def test_an_order_takes_shard_after_shard_and_mixes_both(manifests):
    _, shards = manifests
    rows = shards.select("train")
    of = [row.files["wli"].parent for row in rows]
    numbers = shards_of(rows)
    orders = [shard_order(0, epoch, numbers).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(len(rows)))
        runs = [shard for shard, _ in itertools.groupby(of[place] for place in order)]
        assert len(runs) == len(set(of))
    assert len({tuple(order) for order in orders}) == 3
    assert len({of[order[0]] for order in (shard_order(0, e, numbers) for e in range(20))}) > 1


def test_training_takes_one_shard_after_the_other(manifests):
    _, shards = manifests
    rows = {row.index: row for row in shards.select("train")}
    order = torch.cat([batch.sample_id for batch in take(train(list(rows.values())), 3)]).tolist()
    of = [next(filter(None, rows[index].files.values())).parent for index in order]
    changes = [name for name, _ in itertools.groupby(of[: len(rows)])]
    assert len(changes) == len(set(changes)) > 1


@pytest.mark.parametrize("mode", ["none", "host"])
def test_after_40_batches_a_rebuilt_loader_gives_the_next_8_bit_for_bit(manifests, mode):
    _, shards = manifests
    rows = shards.select("train")
    data = DataConfig(cache=CacheConfig(mode))

    def loader(step=0):
        cache = None
        if mode == "host":
            cache = FrameCache(rows, NAMES, data=data, image_size=16, device=CPU)
        return train(rows, data, cache=cache, step=step)

    first = loader()
    take(first, 40)
    expected = take(first, 8)
    assert all(map(same, expected, take(loader(step=40), 8)))


def test_ranks_share_the_batches_of_one_process(manifests):
    _, shards = manifests
    rows = shards.select("train")
    whole = take(train(rows), 5)
    parts = [take(train(rows, rank=rank, world_size=2), 5) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name in NAMES:
            assert torch.equal(batch.views[name], torch.cat([half.views[name] for half in halves]))


def test_evaluation_reads_shards_too(manifests):
    views = [
        torch.cat(
            [
                batch.views["nbi"]
                for batch in EvalLoader(
                    manifest.rows, NAMES, data=DataConfig(), image_size=16, batch_size=8, device=CPU
                )
            ]
        )
        for manifest in manifests
    ]
    assert torch.equal(*views)


def spoil(row, name):
    """Overwrite the second half of an image within its shard."""
    offset, size = read_index(row.files[name].parent)[0][row.files[name].name]
    with open(row.files[name].parent, "r+b") as file:
        file.seek(offset + size // 2)
        file.write(bytes(size - size // 2))


def test_a_bad_image_in_a_shard_is_named_or_skipped(manifests):
    _, shards = manifests
    rows = shards.select("train")
    bad = next(row for row in rows if row.files["nbi"])
    before = take(train(rows), 8)
    spoil(bad, "nbi")
    with pytest.raises(InputError) as caught:
        take(train(rows), 8)
    assert str(bad.files["nbi"]) in str(caught.value) and repr(bad.id) in str(caught.value)
    skipped = take(train(rows, DataConfig(on_bad_file="skip")), 8)
    seen = 0
    for a, b in zip(before, skipped, strict=True):
        own = b.sample_id == bad.index
        seen += int(own.sum())
        assert torch.equal(a.sample_id, b.sample_id) and not b.present[own][:, 1].any()
        assert torch.equal(a.views["wli"], b.views["wli"])
        assert torch.equal(a.views["nbi"][~own], b.views["nbi"][~own])
    assert seen > 1


def test_a_member_that_a_shard_does_not_have_is_told(manifests):
    _, shards = manifests
    manifest = shards.path
    text = manifest.read_text()
    row = shards.rows[0]
    manifest.write_text(text.replace(row.files["wli"].name, "999999.wli.jpg"))
    with pytest.raises(InputError, match=r"line 2: the wli image .*999999\.wli\.jpg does not"):
        read_manifest(manifest)
    lost = read_manifest(manifest, files_exist=False).rows[0]
    with pytest.raises(InputError, match=r"999999\.wli\.jpg cannot be read \(not in the shard"):
        ImageFiles("error", CPU, "dali").read(lost, "wli")


def test_shards_and_folds_do_not_go_together(tmp_path):
    for options in (["--to-shards", "0"], ["--to-shards", "5", "--folds", "3"]):
        with pytest.raises(InputError, match="--to-shards"):
            prepare.main(["phantom", "--out", str(tmp_path / "out"), *options])


# Shards that are not whole, or not honest


def cut(shards, share=0.6):
    """Cut the end off the shard of the first train row; return its rows."""
    path = next(filter(None, shards.select("train")[0].files.values())).parent
    with open(path, "r+b") as file:
        file.truncate(int(share * path.stat().st_size))
    read_index.cache_clear()
    own = [row for row in shards.rows if any(p and p.parent == path for p in row.files.values())]
    return path, own


def test_a_shard_cut_short_costs_the_rows_beyond_its_end_alone(manifests):
    _, shards = manifests
    path, own = cut(shards)
    data = DataConfig(on_bad_file="skip")
    loader = EvalLoader(own, NAMES, data=data, image_size=16, batch_size=8, device=CPU)
    read = torch.cat([batch.sample_id for batch in loader]).tolist()
    assert 0 < len(read) < len(own)
    with pytest.raises(
        InputError, match=f"{path}.* of a shard of .*: is it a whole copy"
    ) as caught:
        list(EvalLoader(own, NAMES, data=DataConfig(), image_size=16, batch_size=8, device=CPU))
    assert "\n" not in str(caught.value)


def test_a_manifest_that_leads_into_a_shard_cut_short_is_refused(manifests):
    _, shards = manifests
    cut(shards)
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(shards.path)


@pytest.mark.parametrize(
    "index",
    ["", "v1.2 1\nwli 0 5", "v1.2 1\nwli zero 5 000000.wli.jpg", "v1.2 1\nwli -9 5 000000.wli.jpg",
     "v1.2 1\nwli 0 99999999999999999999 000000.wli.jpg", b"\xff\xfe\x00"],
)  # fmt: skip
def test_a_broken_index_is_one_sentence(manifests, index):
    _, shards = manifests
    row = next(row for row in shards.rows if row.files["wli"])
    target = row.files["wli"].parent.with_suffix(".idx")
    target.write_bytes(index if isinstance(index, bytes) else index.encode())
    read_index.cache_clear()
    with pytest.raises(InputError) as caught:
        ImageFiles("error", CPU, "dali").read(row, "wli")
    assert str(row.files["wli"]) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".v1 final"])
def test_blanks_and_dots_in_names_survive(tmp_path, suffix):
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"f.{number}{suffix}", "PNG")
    lines = [f"f.{2 * k}{suffix},f.{2 * k + 1}{suffix},{'ab'[k % 2]}" for k in range(6)]
    (tmp_path / "l.csv").write_text("\n".join(["w,n,c", *lines]))
    columns = ["--column", "white light/v1.0=w", "--column", "nbi=n", "--label-column", "c"]
    out = tmp_path / "out"
    arguments = [str(tmp_path / "l.csv"), "--out", str(out), *columns, "--to-shards", "2"]
    prepare.main(arguments)
    manifest = read_manifest(out / "manifest.csv")
    assert manifest.modalities == ("white light/v1.0", "nbi")
    for row in manifest.rows:
        for number, path in enumerate(row.files.values()):
            source = tmp_path / f"f.{2 * row.index + number}{suffix}"
            assert read_image(path).tobytes() == source.read_bytes()
            with tarfile.open(path.parent) as tar:
                assert tar.extractfile(path.name).read() == source.read_bytes()
