"""Preparing data: which files of folders and tables become which rows."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from tests.mics_fast.preparation.preparing import paint, rejected, run, scenery


def test_a_folder_a_class_becomes_rows_of_white_light(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    assert manifest.modalities == ("wli",)
    assert manifest.classes == ("esophagitis", "polyps", "z, line")
    assert len(manifest.rows) == 17
    for row in manifest.rows:
        assert row.id == f"{manifest.classes[row.label]}/{row.files['wli'].stem}"
        assert row.files["wli"].resolve().parent == kvasir / manifest.classes[row.label]
        assert row.virtual == ()


@pytest.mark.parametrize(
    "suffix", [".jpg", ".JPG", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"]
)
def test_every_common_image_format_is_found(suffix, tmp_path):
    paint(tmp_path / "in" / "polyps" / f"x{suffix}")
    run(tmp_path / "in", "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 1


def test_hidden_files_and_folders_are_no_images(kvasir, tmp_path):
    (kvasir / "polyps" / "._p3.jpg").write_bytes(b"what some systems put beside a file")
    (kvasir / ".cache").mkdir()
    run(kvasir, "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 17


def test_a_folder_without_class_folders_is_refused(tmp_path):
    paint(tmp_path / "in" / "loose.jpg")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "in"))):
        run(tmp_path / "in", "--out", tmp_path / "out")


def test_a_class_folder_without_images_is_refused(kvasir, tmp_path):
    (kvasir / "ulcer").mkdir()
    with pytest.raises(InputError, match="ulcer holds no image"):
        run(kvasir, "--out", tmp_path / "out")


def test_two_images_of_one_name_are_refused(kvasir, tmp_path):
    paint(kvasir / "polyps" / "p3.png")
    with pytest.raises(InputError, match=r"polyps.*p3"):
        run(kvasir, "--out", tmp_path / "out")


def test_a_file_name_that_is_not_utf_8_is_refused(kvasir, tmp_path):
    os.rename(kvasir / "polyps" / "p3.jpg", os.fsencode(kvasir) + b"/polyps/\xe9.jpg")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        run(kvasir, "--out", tmp_path / "out")
    str(caught.value).encode()


def test_pairs_are_matched_by_name(pairs, tmp_path):
    # Without these two, the sorted lists are of one length and every pair is off by one.
    (pairs / "polyps_WLI" / "4.png").unlink()
    (pairs / "polyps_NBI" / "0.png").unlink()
    run(pairs, "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    assert manifest.modalities == ("wli", "nbi") and manifest.classes == ("polyps",)
    assert [row.id for row in manifest.rows] == ["polyps/1", "polyps/2", "polyps/3"]
    for row in manifest.rows:
        wli, nbi = (np.asarray(Image.open(row.files[name]))[0, 0] for name in ("wli", "nbi"))
        assert wli[0] == nbi[2] == 200 and wli[1] == nbi[1]


def test_images_without_a_partner_are_left_out_and_named(pairs, tmp_path, capsys):
    (pairs / "polyps_NBI" / "2.png").unlink()
    paint(pairs / "polyps_NBI" / "extra.png")
    run(pairs, "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 4
    printed = capsys.readouterr().out
    for orphan in ("polyps_WLI/2.png", "polyps_NBI/extra.png"):
        assert str(pairs / orphan) in printed


def test_pairs_may_differ_in_their_suffix(pairs, tmp_path):
    paint(pairs / "polyps_WLI" / "7.jpg")
    paint(pairs / "polyps_NBI" / "7.webp")
    run(pairs, "--out", tmp_path / "out")
    assert "polyps/7" in {row.id for row in read_manifest(tmp_path / "out" / "manifest.csv").rows}


def test_pairs_and_single_folders_are_not_mixed(pairs, tmp_path):
    paint(pairs / "ulcer" / "x.jpg")
    with pytest.raises(InputError, match=r"polyps_NBI and ulcer, wanted .* not both"):
        run(pairs, "--out", tmp_path / "out")


def test_a_class_without_its_second_folder_is_refused(pairs, tmp_path):
    paint(pairs / "ulcer_WLI" / "x.png")
    with pytest.raises(InputError, match=r"ulcer_WLI has no partner, wanted ulcer_NBI"):
        run(pairs, "--out", tmp_path / "out")


def test_pairs_without_a_common_name_are_refused(tmp_path):
    paint(tmp_path / "in" / "polyps_WLI" / "1.png")
    paint(tmp_path / "in" / "polyps_NBI" / "2.png")
    with pytest.raises(InputError, match="no WLI and NBI image of the same name"):
        run(tmp_path / "in", "--out", tmp_path / "out")


def test_pairs_are_matched_by_the_id_that_a_pattern_finds(tmp_path):
    for case, shade in (("7", 70), ("12", 120)):
        paint(tmp_path / "in" / "polyps_WLI" / f"case{case}_white_{shade}.png", (200, shade, 0))
        paint(tmp_path / "in" / "polyps_NBI" / f"{shade + 1}-case{case}.jpg", (0, shade, 200))
    run(tmp_path / "in", "--out", tmp_path / "out", "--pair-pattern", r"case(\d+)")
    rows = read_manifest(tmp_path / "out" / "manifest.csv").rows
    assert [row.id for row in rows] == ["polyps/12", "polyps/7"]
    for row in rows:
        case = f"case{row.id.removeprefix('polyps/')}"
        assert all(case in row.files[name].name for name in ("wli", "nbi"))


def test_a_pattern_without_a_group_is_the_id_itself(tmp_path):
    paint(tmp_path / "in" / "polyps_WLI" / "a-17-w.png")
    paint(tmp_path / "in" / "polyps_NBI" / "b-17-n.png")
    run(tmp_path / "in", "--out", tmp_path / "out", "--pair-pattern", r"\d+")
    assert [r.id for r in read_manifest(tmp_path / "out" / "manifest.csv").rows] == ["polyps/17"]


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("(", "no regular expression"),
        ("x", r"finds no id in .*polyps_NBI.0\.png"),
        (".*?(z?)", "finds no id"),
        ("(.)?", r"polyps_WLI holds 2 images named 1"),
    ],
)
def test_a_pattern_that_finds_no_pairs_is_refused(pairs, tmp_path, pattern, complaint):
    paint(pairs / "polyps_WLI" / "12.png")
    with pytest.raises(InputError, match=complaint):
        run(pairs, "--out", tmp_path / "out", "--pair-pattern", pattern)


@pytest.fixture
def table(tmp_path):
    """A table beside its images: 12 rows, two a group, the last without NBI."""
    lines = ["file,narrow,kind,lesion"]
    for number in range(12):
        for folder in ("white", "narrow"):
            (tmp_path / "t" / folder).mkdir(parents=True, exist_ok=True)
            scenery(number).save(tmp_path / "t" / folder / f"{number}.png")
        narrow = f"narrow/{number}.png" if number < 11 else ""
        lines.append(f"white/{number}.png,{narrow},{'ab'[number // 6]},{number // 2}")
    (tmp_path / "t" / "list.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "t" / "list.csv"


COLUMNS = ("--column", "wli=file", "--column", "nbi=narrow", "--label-column", "kind")


def test_a_table_becomes_rows(table, tmp_path):
    out = tmp_path / "out"
    run(table, "--out", out, *COLUMNS, "--group-column", "lesion", "--keep-orphans")
    manifest = read_manifest(out / "manifest.csv")
    assert manifest.modalities == ("wli", "nbi") and manifest.classes == ("a", "b")
    assert [row.id for row in manifest.rows] == [f"white/{number}" for number in range(12)]
    assert manifest.rows[11].files["nbi"] is None
    assert [row.group for row in manifest.rows] == [number // 2 for number in range(12)]
    for a, b in zip(manifest.rows[::2], manifest.rows[1::2], strict=True):
        assert a.split == b.split
    run(table, "--out", out, *COLUMNS)
    assert len(read_manifest(out / "manifest.csv").rows) == 11


def test_one_column_of_a_table_and_virtual_nbi(table, tmp_path):
    run(table, "--out", tmp_path / "out", *COLUMNS[:2], "--virtual-nbi")
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    assert manifest.modalities == ("wli", "nbi") and manifest.classes == ()
    assert all(row.virtual == ("nbi",) and row.label == -1 for row in manifest.rows)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "--column MODALITY=COLUMN"),
        (["--column", "wli"], "--column is 'wli'"),
        (["--column", "wli=file", "--column", "wli=narrow"], "--column is 'wli=narrow'"),
        (["--column", "label=file"], "--column is 'label=file'"),
        (["--column", "wli=path"], "no column 'path', only file, narrow"),
        (["--column", "nbi=narrow"], "line 13: no path in narrow"),
        ([*COLUMNS, "--group-column", "patient"], "no column 'patient'"),
        ([*COLUMNS, "--virtual-nbi"], "--virtual-nbi"),
        ([*COLUMNS, "--pair-pattern", "x"], "--pair-pattern"),
    ],
)
def test_a_table_that_does_not_fit_its_options_is_refused(table, tmp_path, options, complaint):
    with pytest.raises(InputError, match=complaint):
        run(table, "--out", tmp_path / "out", *options)


def test_a_file_that_a_table_names_twice_or_in_vain_is_told(table, tmp_path):
    text = table.read_text()
    table.write_text(text + "white/3.png,narrow/3.png,a,1\n")
    with pytest.raises(InputError, match=r"line 14: image white/3\.png .* id of another"):
        run(table, "--out", tmp_path / "out", *COLUMNS)
    table.write_text(text + "white/nowhere.png,narrow/3.png,a,1\n")
    run(table, "--out", tmp_path / "out", *COLUMNS)
    (reason,) = {line["reason"] for line in rejected(tmp_path / "out") if "nowhere" in line["file"]}
    assert "No such file" in reason


def test_columns_are_for_tables_alone(kvasir, tmp_path):
    with pytest.raises(InputError, match="--label-column is for a CSV file"):
        run(kvasir, "--out", tmp_path / "out", "--label-column", "kind")
