"""Preparation: splits, labels, and rows that must stay together."""

from __future__ import annotations

import csv
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from tests.mics_fast.preparation.preparing import run, scenery


def test_few_labels_stay_one_a_class_and_only_on_train_rows(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    labelled = read_manifest(tmp_path / "out" / "manifest.csv").select(labelled=True)
    assert sorted(row.label for row in labelled) == [0, 1, 2]
    assert {row.split for row in labelled} == {"train"}


def test_split_label_fraction_and_seed_are_obeyed(kvasir, tmp_path):
    def rows(*options):
        run(kvasir, "--out", tmp_path / "out", *options)
        return list(read_manifest(tmp_path / "out" / "manifest.csv").rows)

    half = rows("--split", "0.5", "0", "0.5", "--label-fraction", "1")
    polyps = [row for row in half if row.id.startswith("polyps")]
    assert sum(row.split == "train" for row in polyps) == 5
    assert {row.split for row in half} == {"train", "test"}
    assert all(row.labelled == (row.split == "train") for row in half)
    assert rows("--seed", "1") == rows("--seed", "1") != rows("--seed", "2")


def test_every_row_is_tested_in_one_fold(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out", "--folds", 3)
    folds = [read_manifest(tmp_path / "out" / f"fold-{k}.csv").rows for k in (1, 2, 3)]
    assert len(list((tmp_path / "out").glob("fold-*.csv"))) == 3
    tested = [row.id for rows in folds for row in rows if row.split == "test"]
    assert sorted(tested) == sorted(row.id for row in folds[0])
    for rows in folds:
        assert {row.split for row in rows if row.id.startswith("polyps")} == {
            "train", "val", "test",
        }  # fmt: skip
        assert {row.split for row in rows if row.labelled} == {"train"}


def test_a_class_is_held_out_of_the_manifest_into_one_of_its_own(tmp_path):
    run("phantom", "--out", tmp_path, "--pairs", 14, "--hold-out", "bump-rim")
    manifest = read_manifest(tmp_path / "manifest.csv")
    apart = read_manifest(tmp_path / "held-out.csv")
    assert len(manifest.rows) == 12 and len(manifest.classes) == 5
    assert apart.classes == ("bump-rim",) and [row.id for row in apart.rows] == ["000005", "000011"]
    assert {(row.split, row.labelled) for row in apart.rows} == {("test", False)}
    assert apart.modalities == manifest.modalities


def test_a_class_that_is_not_there_cannot_be_held_out(tmp_path):
    with pytest.raises(InputError, match=r"--hold-out is ulcer, wanted .* there: plaque-green, "):
        run("phantom", "--out", tmp_path, "--pairs", 2, "--hold-out", "ulcer")
    with pytest.raises(InputError, match="--hold-out is plaque-yellow, wanted one of several"):
        run("phantom", "--out", tmp_path, "--pairs", 1, "--hold-out", "plaque-yellow")


@pytest.fixture
def copies(tmp_path):
    """Forty unlike frames of one class; the last ten are copies, at half size, of the first."""
    folder = tmp_path / "copies" / "polyps"
    folder.mkdir(parents=True)
    for number in range(40):
        frame = scenery(number % 30)
        if number >= 30:
            frame = frame.resize((128, 96))
        frame.save(folder / f"{number:02d}.jpg")
    return tmp_path / "copies"


def pairs_apart(out):
    splits = {row.id: row.split for row in read_manifest(out / "manifest.csv").rows}
    names = [(f"polyps/{k:02d}", f"polyps/{k + 30:02d}") for k in range(10)]
    return {pair for pair in names if splits[pair[0]] != splits[pair[1]]}


def test_near_duplicates_on_two_sides_of_the_split_are_reported(copies, tmp_path, capsys):
    run(copies, "--out", tmp_path / "out")
    with open(tmp_path / "out" / "near_duplicates.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    apart = pairs_apart(tmp_path / "out")
    assert apart and {(line["id"], line["other_id"]) for line in lines} == apart
    assert all(line["split"] != line["other_split"] for line in lines)
    printed = capsys.readouterr().out
    assert f"{len(apart)} pairs" in printed and "--group-near-duplicates" in printed


def test_near_duplicates_are_kept_together_on_request(copies, tmp_path, capsys):
    run(copies, "--out", tmp_path / "out")
    run(copies, "--out", tmp_path / "out", "--group-near-duplicates")
    assert not pairs_apart(tmp_path / "out")
    assert not (tmp_path / "out" / "near_duplicates.csv").exists()
    rows = read_manifest(tmp_path / "out" / "manifest.csv").rows
    assert len({row.group for row in rows}) == 30
    assert {row.split for row in rows} == {"train", "val", "test"}


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=25),
    fraction=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_a_manifest_keeps_its_promises(tmp_path_factory, kinds, fraction, seed):
    folder = tmp_path_factory.mktemp("table")
    lines = ["file,kind,lesion"]
    for number, (label, group) in enumerate(kinds):
        Image.new("RGB", (2, 2), (9 * number, 0, 0)).save(folder / f"{number}.bmp")
        # groups of one class; group 0 is no group
        lines.append(f"{number}.bmp,{label},{f'{label}{group}' if group else ''}")
    (folder / "list.csv").write_text("\n".join(lines))
    options = ("--column", "wli=file", "--label-column", "kind", "--group-column", "lesion",
               "--seed", seed, "--label-fraction", fraction)  # fmt: skip
    for out in ("one", "two"):
        run(folder / "list.csv", "--out", folder / out, *options)
    manifest = read_manifest(folder / "one" / "manifest.csv")
    text = (folder / "one" / "manifest.csv").read_text()
    assert text == (folder / "two" / "manifest.csv").read_text()
    assert len({row.id for row in manifest.rows}) == len(manifest.rows) == len(kinds)
    split_of = {}
    for row in manifest.rows:
        assert split_of.setdefault(row.group, row.split) == row.split
    for label in range(len(manifest.classes)):
        train = [row for row in manifest.select("train") if row.label == label]
        sizes = Counter(row.group for row in train)
        wanted = max(1, round(fraction * len(train))) if train else 0
        labelled = sum(row.labelled for row in train)
        assert wanted <= labelled < wanted + max(sizes.values(), default=1)
