"""The index of a large manifest: the same rows as its CSV, made once, and never trusted blindly."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mics_fast.common.errors import InputError
from mics_fast.data import manifest_index
from mics_fast.data.manifest import read_manifest
from mics_fast.data.manifest_checks import check_manifest

HEADER = "id,label,labelled,group,split,virtual,wli,nbi"
LINES = (
    "one,polyp,1,g,train,nbi,a.png,b.png",
    'zwei – 2,"ulcer, flat",0,,val,,a.png,',
    "3,,0,h,test,,,b.png",
    "4,polyp,0,g,train,,,b.png",
    "5,polyp,0,h,test,,a.png,",
)


@pytest.fixture(autouse=True)
def indexed(monkeypatch):
    monkeypatch.setattr(manifest_index, "INDEXED_FROM", 0)


@pytest.fixture
def path(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not read")
    return written(tmp_path / "manifest.csv", LINES)


def written(path, lines):
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return path


def facts(manifest):
    """Everything that a manifest states."""
    rows = [astuple(row) for row in manifest.rows]
    return rows, manifest.classes, manifest.modalities, manifest.digest()


def unread(*_):
    raise AssertionError("the CSV was read again")


@pytest.mark.parametrize("modalities", [None, ["wli"], ["nbi"], ["nbi", "wli"]])
def test_rows_of_an_index_are_those_of_the_csv(path, monkeypatch, modalities):
    with monkeypatch.context() as context:
        context.setattr(manifest_index, "INDEXED_FROM", 1 << 30)
        plain = facts(read_manifest(path, modalities))
    assert not path.with_name("manifest.csv.index").exists()
    made = facts(read_manifest(path, modalities))
    monkeypatch.setattr(manifest_index, "read_csv", unread)
    assert facts(read_manifest(path, modalities)) == made == plain
    assert [row[0] for row in plain[0]] == ([0, 1, 4] if modalities == ["wli"] else
                                            [0, 2, 3] if modalities == ["nbi"] else
                                            [0, 1, 2, 3, 4])  # fmt: skip


def test_another_content_of_the_csv_gets_another_index(path):
    read_manifest(path)
    written(path, LINES[:2])
    assert [row.id for row in read_manifest(path).rows] == ["one", "zwei – 2"]


def test_an_index_moves_with_its_manifest(path, tmp_path, monkeypatch):
    read_manifest(path)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("manifest.csv", "manifest.csv.index"):
        (tmp_path / name).rename(other / name)
    monkeypatch.setattr(manifest_index, "read_csv", unread)
    assert read_manifest(other / "manifest.csv").rows[0].files["wli"] == other / "a.png"


def test_files_are_looked_for_once_and_only_where_they_must_exist(path, monkeypatch):
    written(path, [*LINES, "6,polyp,0,,train,,absent.png,b.png"])
    assert len(read_manifest(path, files_exist=False).rows) == 6
    for _ in range(2):
        with pytest.raises(InputError, match=r"line 7: the wli image .*absent\.png does not exist"):
            read_manifest(path)
    assert len(read_manifest(path, ["nbi"]).rows) == 4
    (path.parent / "absent.png").touch()
    assert len(read_manifest(path).rows) == 6
    monkeypatch.setattr(manifest_index, "read_csv", unread)
    for modalities in (None, ["nbi"]):
        assert read_manifest(path, modalities).rows


def test_looking_for_the_files_of_another_modality_does_not_read_the_csv_again(path, monkeypatch):
    written(path, [*LINES, "6,polyp,0,,train,,absent.png,b.png"])
    read_manifest(path, ["nbi"])
    with monkeypatch.context() as context:
        context.setattr(manifest_index, "read_csv", unread)
        with pytest.raises(InputError, match=r"line 7: the wli image .*absent\.png does not exist"):
            read_manifest(path, ["wli"])
        (path.parent / "absent.png").touch()
        for _ in range(2):
            made = facts(read_manifest(path))
    path.with_name("manifest.csv.index").unlink()
    assert facts(read_manifest(path)) == made


def test_a_damaged_index_is_made_anew(path):
    whole = facts(read_manifest(path))
    index = path.with_name("manifest.csv.index")
    good = index.read_bytes()
    random = np.random.default_rng(0)
    for cut in (0, 7, 100, len(good) - 1):
        index.write_bytes(good[:cut])
        assert facts(read_manifest(path)) == whole
    for _ in range(20):
        broken = bytearray(good)
        broken[random.integers(8)] ^= 1 << random.integers(8)  # the length of the header
        index.write_bytes(broken)
        assert facts(read_manifest(path)) == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label", np.array([2, 0, 0, 0, 0], np.int32)),
        ("label", np.zeros(5, np.int64)),
        ("label", np.zeros(4, np.int32)),
        ("group", np.array([-1, 0, 0, 0, 0], np.int32)),
        ("split", np.array([0, 0, 0, 0, 3], np.int8)),
        ("id bounds", np.array([0, 3, 2, 13, 14, 15], np.int64)),
        ("id bounds", np.array([0, 3, 4, 5, 6, 10**6], np.int64)),
        ("id bounds", np.zeros(0, np.int64)),
        ("file wli text", np.zeros(0, np.uint8)),
        ("virtual bounds", None),
    ],
)
def test_an_index_whose_values_are_out_of_range_is_made_anew(path, name, value):
    whole = facts(read_manifest(path))
    index = path.with_name("manifest.csv.index")
    with safe_open(index, "np") as opened:
        meta = opened.metadata()
    arrays = {**load_file(index), name: value}
    save_file({own: array for own, array in arrays.items() if array is not None}, index, meta)
    assert facts(read_manifest(path)) == whole


def test_who_may_read_the_manifest_may_read_its_index(path):
    path.chmod(0o640)
    read_manifest(path)
    assert path.with_name("manifest.csv.index").stat().st_mode & 0o777 == 0o640
    assert not list(path.parent.glob(".partial*"))


def test_without_the_right_to_write_an_index_the_csv_is_read(path, monkeypatch):
    def refused(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(manifest_index, "renamed", refused)
    assert len(read_manifest(path).rows) == 5


def test_a_large_manifest_opens_in_little_time_and_memory(tmp_path, monkeypatch):
    """Row objects took 25 us and 1.5 kB per row, before their checks and digests."""
    count = 20_000
    path = written(tmp_path / "manifest.csv", (
        f"hospital-a/{row:08d},class {row % 23},{int(row % 20 == 0)},lesion-{row // 4},"
        f"{('train', 'val', 'test')[row // 4 % 3]},,images/{row:08d}-wli.jpg,images/{row:08d}.jpg"
        for row in range(count)
    ))  # fmt: skip
    read_manifest(path, files_exist=False)
    monkeypatch.setattr(manifest_index, "read_csv", unread)
    start = time.process_time()
    manifest = read_manifest(path, files_exist=False)
    assert not check_manifest(manifest)
    assert len(manifest.select("train", labelled=True)) == 334
    manifest.digest()
    assert time.process_time() - start < 12e-6 * count
    tracemalloc.start()
    try:
        again = read_manifest(path, files_exist=False)
        train = again.select("train")
        assert tracemalloc.get_traced_memory()[0] < 100 * count
        assert train[0].id == "hospital-a/00000000"
    finally:
        tracemalloc.stop()
