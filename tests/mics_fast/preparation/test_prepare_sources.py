"""Preparation: the rows made from files of folders and tables."""

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
        ("(", "not a regular expression"),
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
    """A table beside its images: 12 rows, two per group, the last without NBI."""
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


# Names as people give them


def folders(source, *names, count=3):
    for number, name in enumerate(names):
        for k in range(count):
            (source / name).mkdir(parents=True, exist_ok=True)
            scenery(10 * k + number).save(source / name / f"{k}.png")
    return source


def manifest_of(*arguments, out):
    run(*arguments, "--out", out)
    return read_manifest(out / "manifest.csv")


@pytest.mark.parametrize("names", [("polyp_wli", "polyp_nbi"), ("polyp_Wli", "polyp_NBI")])
def test_the_modality_in_a_folder_s_name_may_be_in_any_case(tmp_path, names):
    manifest = manifest_of(folders(tmp_path / "in", *names), out=tmp_path / "out")
    assert manifest.modalities == ("wli", "nbi") and manifest.classes == ("polyp",)
    assert len(manifest.rows) == 3


def test_three_modalities_work_as_pairs_do(tmp_path):
    names = [f"{label}_{kind}" for label in ("a", "b") for kind in ("WLI", "NBI", "BLI")]
    manifest = manifest_of(folders(tmp_path / "in", *names), out=tmp_path / "out")
    assert manifest.modalities == ("wli", "nbi", "bli") and manifest.classes == ("a", "b")
    assert all(None not in row.files.values() for row in manifest.rows)


def test_modalities_of_other_names_are_capitals_that_every_class_has(tmp_path):
    source = folders(tmp_path / "in", "nevus_CLINIC", "nevus_DERM", "mole_CLINIC", "mole_DERM")
    assert manifest_of(source, out=tmp_path / "out").modalities == ("clinic", "derm")
    folders(source, "wart_CLINIC")
    manifest = manifest_of(source, out=tmp_path / "other")
    assert manifest.modalities == ("wli",) and len(manifest.classes) == 5


def test_one_modality_twice_is_refused(tmp_path):
    source = folders(tmp_path / "in", "polyp_WLI", "polyp_wli", "polyp_NBI")
    with pytest.raises(InputError, match="holds polyp_WLI and polyp_wli, wanted one"):
        run(source, "--out", tmp_path / "out")


def test_brackets_and_control_characters_in_names_are_shown_as_they_are(tmp_path, capsys):
    names = ("polyp [small]_WLI", "polyp [small]_NBI", "x[b]_WLI", "x[b]_NBI", "a\x1b[2J_WLI",
             "a\x1b[2J_NBI")  # fmt: skip
    manifest = manifest_of(folders(tmp_path / "in", *names), out=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "polyp [small]" in printed and "x[b]" in printed and "\x1b" not in printed
    assert manifest.classes == ("a\x1b[2J", "polyp [small]", "x[b]")


@pytest.mark.parametrize("suffix", [".jfif", ".jpe"])
def test_other_suffixes_of_jpeg_are_read(tmp_path, suffix):
    (tmp_path / "in" / "polyps").mkdir(parents=True)
    scenery(0).save(tmp_path / "in" / "polyps" / f"x{suffix}", "JPEG")
    assert len(manifest_of(tmp_path / "in", out=tmp_path / "out").rows) == 1


def test_files_of_unknown_suffixes_are_listed(kvasir, tmp_path, capsys):
    for name in ("x.heic", "y.heic", "README"):
        (kvasir / "polyps" / name).write_bytes(b"?")
    run(kvasir, "--out", tmp_path / "out")
    assert "unknown suffix, see rejected.csv: 3 files (.heic 2, no suffix 1)" in (
        capsys.readouterr().out
    )
    listed = {line["file"] for line in rejected(tmp_path / "out")}
    assert listed == {str(kvasir / "polyps" / name) for name in ("x.heic", "y.heic", "README")}


def test_labels_that_differ_in_case_alone_are_refused_before_anything_is_written(tmp_path):
    source = folders(tmp_path / "in", "polyp", "Polyp")
    with pytest.raises(InputError, match="'Polyp' and 'polyp' differ only in case"):
        run(source, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.csv").exists()


@pytest.mark.parametrize(("separator", "name"), [(";", "list.csv"), ("\t", "list.tsv")])
def test_tables_of_semicolons_and_tabs_are_read(table, tmp_path, separator, name):
    other = table.with_name(name)
    other.write_text(table.read_text().replace(",", separator))
    assert len(manifest_of(other, *COLUMNS, out=tmp_path / "out").rows) == 11


def test_ids_and_an_official_split_come_from_columns(table, tmp_path, capsys):
    lines = table.read_text().splitlines()
    splits = ["Training", "valid", "TEST"]
    extra = [f",{'1.2.840.' + str(k)},{splits[k % 3]}" for k in range(12)]
    table.write_text("\n".join([lines[0] + ",uid,part", *map(str.__add__, lines[1:], extra)]))
    options = (*COLUMNS, "--id-column", "uid", "--split-column", "part", "--group-column", "uid")
    manifest = manifest_of(table, *options, out=tmp_path / "out")
    assert [row.id for row in manifest.rows] == [f"1.2.840.{k}" for k in range(11)]
    assert [row.split for row in manifest.rows] == [
        ("train", "val", "test")[k % 3] for k in range(11)
    ]
    assert "warning" not in capsys.readouterr().out
    table.write_text(table.read_text().replace("Training", "holdout"))
    with pytest.raises(InputError, match="line 2: split is 'holdout', wanted one of train"):
        run(table, "--out", tmp_path / "out", *options)


def test_a_group_that_an_official_split_tears_apart_is_refused(table, tmp_path):
    lines = table.read_text().splitlines()
    parts = [",part", *((",train", ",test")[k % 2] for k in range(12))]
    table.write_text("\n".join(map(str.__add__, lines, parts)))
    options = (*COLUMNS, "--group-column", "lesion", "--split-column", "part")
    with pytest.raises(InputError, match="are of one group"):
        run(table, "--out", tmp_path / "out", *options)


def test_a_split_without_rows_is_warned_about(table, tmp_path, capsys):
    run(table, "--out", tmp_path / "out", *COLUMNS, "--split", "0.8", "0", "0.2")
    assert (
        "warning: " in (printed := capsys.readouterr().out)
        and "no row is in the split val" in printed
    )


@pytest.mark.parametrize("name", ["1.2.840.1", "case.7"])
def test_only_the_suffix_of_an_image_is_cut_from_a_path(tmp_path, name):
    scenery(0).save(tmp_path / name, "PNG")
    (tmp_path / "l.csv").write_text(f"f\n{name}\n")
    manifest = manifest_of(tmp_path / "l.csv", "--column", "wli=f", out=tmp_path / "out")
    assert [row.id for row in manifest.rows] == [name]


def test_an_id_cannot_lead_out_of_the_folder(tmp_path):
    scenery(0).save(tmp_path / "x.png")
    lines = ["f,i", "x.png,../../evil", "x.png,/evil/x", "x.png,a//b"]
    (tmp_path / "l.csv").write_text("\n".join(lines))
    options = ("--column", "wli=f", "--id-column", "i", "--store-side", "32")
    manifest = manifest_of(tmp_path / "l.csv", *options, out=tmp_path / "out")
    stored = [row.files["wli"].resolve() for row in manifest.rows]
    assert len(set(stored)) == 3
    assert all(path.is_relative_to((tmp_path / "out" / "wli").resolve()) for path in stored)


def test_the_manifest_is_there_when_nobody_reads_the_report(kvasir, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        run(kvasir, "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 17
