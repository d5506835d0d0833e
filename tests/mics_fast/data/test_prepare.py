"""Preparing data: which files become which rows, and what is refused in one sentence."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mics_fast import prepare
from mics_fast.data import phantom
from mics_fast.data.manifest import read_manifest
from mics_fast.errors import InputError

LISTS = ("manifest.csv", "contact_sheet.png", "near_duplicates.csv")
"""What is left beside stored frames; flat test images look alike."""


def paint(path, colour=(180, 110, 90), mode="RGB"):
    """Write a small image; its first pixel has the colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((12, 16, 3), colour, np.uint8)
    pixels[4:] //= 2
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def kvasir(tmp_path):
    """Kvasir's own layout: 10 frames of one class, 6 of another, 1 of a third."""
    source = tmp_path / "kvasir"
    for label, count in (("polyps", 10), ("esophagitis", 6), ("z, line", 1)):
        for number in range(count):
            paint(source / label / f"{label[0]}{number}.jpg", (150 + 5 * number, 100, 90))
    return source


@pytest.fixture
def pairs(tmp_path):
    """The published pair layout; names sort differently in the two folders."""
    source = tmp_path / "pairs"
    for number in range(5):
        paint(source / "polyps_WLI" / f"{number}.png", (200, 10 * number, 0))
        paint(source / "polyps_NBI" / f"{number}.png", (0, 10 * number, 200))
    return source


def run(*arguments):
    prepare.main([str(argument) for argument in arguments])


def refusal(*arguments):
    """The sentence on stderr of a command that must end with status 2 and nothing else."""
    command = [sys.executable, "-m", "mics_fast.prepare", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()


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


def test_the_source_images_are_referred_to_not_copied(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    assert {"manifest.csv"} <= set(os.listdir(tmp_path / "out")) <= set(LISTS)
    text = (tmp_path / "out" / "manifest.csv").read_text()
    assert str(tmp_path) not in text and "../kvasir/polyps/p0.jpg" in text


@pytest.mark.parametrize(
    "suffix", [".jpg", ".JPG", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"]
)
def test_every_common_image_format_is_found(suffix, tmp_path):
    paint(tmp_path / "in" / "polyps" / f"x{suffix}")
    run(tmp_path / "in", "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 1


def test_virtual_nbi_is_rendered_and_marked(kvasir, tmp_path, capsys):
    run(kvasir, "--out", tmp_path / "out", "--virtual-nbi")
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    assert manifest.modalities == ("wli", "nbi")
    for row in manifest.rows:
        assert row.virtual == ("nbi",)
        assert row.files["nbi"].is_relative_to(tmp_path / "out" / "nbi")
        wli, nbi = (Image.open(row.files[name]) for name in ("wli", "nbi"))
        assert wli.size == nbi.size and nbi.mode == "RGB"
    assert "virtual NBI" in capsys.readouterr().out


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


def test_few_labels_stay_one_a_class_and_only_on_train_rows(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    labelled = read_manifest(tmp_path / "out" / "manifest.csv").select(labelled=True)
    assert sorted(row.label for row in labelled) == [0, 1, 2]
    assert {row.split for row in labelled} == {"train"}


def test_split_label_fraction_and_seed_are_obeyed(kvasir, tmp_path):
    def rows(*options):
        run(kvasir, "--out", tmp_path / "out", *options)
        return read_manifest(tmp_path / "out" / "manifest.csv").rows

    half = rows("--split", "0.5", "0", "0.5", "--label-fraction", "1")
    polyps = [row for row in half if row.id.startswith("polyps")]
    assert sum(row.split == "train" for row in polyps) == 5
    assert {row.split for row in half} == {"train", "test"}
    assert all(row.labelled == (row.split == "train") for row in half)
    assert rows("--seed", "1") == rows("--seed", "1") != rows("--seed", "2")


def test_the_summary_counts_classes_splits_and_labels(kvasir, tmp_path, capsys):
    run(kvasir, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "polyps" in line)
    assert [int(word) for word in re.findall(r"\d+", line)] == [7, 1, 2, 1]
    assert "17 samples" in printed and str(tmp_path / "out" / "manifest.csv") in printed


def test_the_phantom_is_rendered_in_pairs_and_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        run("phantom", "--out", tmp_path / name, "--pairs", 14, "--seed", 3)
    manifest = read_manifest(tmp_path / "one" / "manifest.csv")
    assert manifest.modalities == ("wli", "nbi") and len(manifest.classes) == 6
    assert len(manifest.rows) == 14
    for file in sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert (
            file.read_bytes()
            == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
        )
    assert len(list((tmp_path / "one").rglob("??????.png"))) == 28
    for row in manifest.rows:
        name, *frames = phantom.render_pair(3, row.index)
        assert name == manifest.classes[row.label]
        for modality, frame in zip(("wli", "nbi"), frames, strict=True):
            assert (np.asarray(Image.open(row.files[modality])) == frame).all()


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


def scenery(seed, height=192, width=256):
    """A random picture with detail of a dozen pixels, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(40, 256, (16, 20, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def rejected(out):
    with open(out / "rejected.csv", newline="") as file:
        return list(csv.DictReader(file))


def damaged(file, how):
    """Replace an image by a broken one."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    # Cut short in the middle of the scan: the header is whole.
    whole = file.read_bytes()
    contents = {"text": b"not an image", "empty": b"", "cut": whole[: len(whole) // 2]}
    file.write_bytes(contents[how])


@pytest.mark.parametrize("how", ["text", "empty", "cut"])
@pytest.mark.parametrize("options", [[], ["--virtual-nbi"], ["--keep-orphans"]])
def test_a_broken_image_is_no_row_and_listed_with_its_reason(kvasir, tmp_path, how, options):
    file = kvasir / "polyps" / "p3.jpg"
    damaged(file, how)
    run(kvasir, "--out", tmp_path / "out", *options)
    rows = read_manifest(tmp_path / "out" / "manifest.csv").rows
    assert len(rows) == 16 and "polyps/p3" not in {row.id for row in rows}
    (line,) = rejected(tmp_path / "out")
    assert line["id"] == "polyps/p3" and line["file"] == str(file)
    assert str(file) in line["reason"] and "image" in line["reason"]


def test_the_partner_of_a_broken_image_is_kept_on_request(pairs, tmp_path):
    damaged(pairs / "polyps_NBI" / "2.png", "cut")
    run(pairs, "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 4
    broken, partner = rejected(tmp_path / "out")
    assert broken["file"] == str(pairs / "polyps_NBI" / "2.png")
    assert partner["file"] == str(pairs / "polyps_WLI" / "2.png")
    assert "no NBI image" in partner["reason"]
    run(pairs, "--out", tmp_path / "out", "--keep-orphans")
    rows = {row.id: row for row in read_manifest(tmp_path / "out" / "manifest.csv").rows}
    assert len(rows) == 5 and rows["polyps/2"].files["nbi"] is None
    assert [line["file"] for line in rejected(tmp_path / "out")] == [broken["file"]]


def test_a_list_of_rejected_files_does_not_outlive_its_reason(kvasir, tmp_path):
    damaged(kvasir / "polyps" / "p3.jpg", "text")
    run(kvasir, "--out", tmp_path / "out")
    paint(kvasir / "polyps" / "p3.jpg")
    run(kvasir, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "rejected.csv").exists()


def test_a_source_of_broken_images_alone_is_refused(tmp_path):
    paint(tmp_path / "in" / "polyps" / "x.jpg")
    damaged(tmp_path / "in" / "polyps" / "x.jpg", "text")
    with pytest.raises(InputError, match=r"no sample left.*rejected\.csv"):
        run(tmp_path / "in", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_a_failed_command_leaves_the_manifest_of_the_last_one(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "manifest.csv").read_bytes()
    (kvasir / "empty").mkdir()
    with pytest.raises(InputError):
        run(kvasir, "--out", tmp_path / "out", "--seed", "9")
    assert (tmp_path / "out" / "manifest.csv").read_bytes() == before


def test_two_images_of_one_name_are_refused(kvasir, tmp_path):
    paint(kvasir / "polyps" / "p3.png")
    with pytest.raises(InputError, match=r"polyps.*p3"):
        run(kvasir, "--out", tmp_path / "out")


def test_virtual_nbi_beside_real_nbi_is_refused(pairs, tmp_path):
    with pytest.raises(InputError, match="--virtual-nbi"):
        run(pairs, "--out", tmp_path / "out", "--virtual-nbi")


def test_an_output_folder_behind_a_link_works(kvasir, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    run(kvasir, "--out", tmp_path / "link", "--virtual-nbi")
    assert len(read_manifest(tmp_path / "link" / "manifest.csv").rows) == 17


@pytest.mark.parametrize("inside", ["out", "."])
def test_an_output_folder_in_the_source_is_no_class(kvasir, inside):
    for _ in range(2):
        run(kvasir, "--out", kvasir / inside, "--virtual-nbi")
        assert len(read_manifest(kvasir / inside / "manifest.csv").classes) == 3


def test_hidden_files_and_folders_are_no_images(kvasir, tmp_path):
    (kvasir / "polyps" / "._p3.jpg").write_bytes(b"what some systems put beside a file")
    (kvasir / ".cache").mkdir()
    run(kvasir, "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 17


def test_virtual_nbi_is_upright_as_the_pipeline_shows_the_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "in" / "polyps").mkdir(parents=True)
    Image.new("RGB", (16, 12), "pink").save(tmp_path / "in" / "polyps" / "x.jpg", exif=exif)
    run(tmp_path / "in", "--out", tmp_path / "out", "--virtual-nbi")
    (row,) = read_manifest(tmp_path / "out" / "manifest.csv").rows
    assert Image.open(row.files["nbi"]).size == (12, 16)


def test_16_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 192).reshape(12, 16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    assert (prepare.decode(tmp_path / "x.png")[..., 0] == ramp >> 8).all()


def test_an_image_of_a_kind_that_training_cannot_decode_is_rejected(kvasir, tmp_path):
    Image.new("RGB", (16, 12)).save(kvasir / "polyps" / "p3.jpg", "GIF")
    run(kvasir, "--out", tmp_path / "out")
    assert "p3.jpg is no image, or none of JPEG" in rejected(tmp_path / "out")[0]["reason"]


def test_a_class_folder_without_images_is_refused(kvasir, tmp_path):
    (kvasir / "ulcer").mkdir()
    with pytest.raises(InputError, match="ulcer holds no image"):
        run(kvasir, "--out", tmp_path / "out")


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


def test_a_file_name_that_is_not_utf_8_is_refused(kvasir, tmp_path):
    os.rename(kvasir / "polyps" / "p3.jpg", os.fsencode(kvasir) + b"/polyps/\xe9.jpg")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        run(kvasir, "--out", tmp_path / "out")
    str(caught.value).encode()


def test_checking_keeps_no_decoded_image(kvasir, tmp_path, monkeypatch):
    decoded, alive = [], []

    def decode(path, whole=prepare.decode):
        image = whole(path).copy()
        decoded.append(weakref.ref(image))
        alive.append(sum(reference() is not None for reference in decoded))
        return image

    monkeypatch.setattr(prepare, "decode", decode)
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 2)
    run(kvasir, "--out", tmp_path / "out")
    assert len(alive) == 17 and max(alive) <= 3


def test_a_folder_without_class_folders_is_refused(tmp_path):
    paint(tmp_path / "in" / "loose.jpg")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "in"))):
        run(tmp_path / "in", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--label-fraction", "0"], "--label-fraction is 0.0"),
        (["--label-fraction", "1.5"], "--label-fraction is 1.5"),
        (["--label-fraction", "nan"], "--label-fraction is nan"),
        (["--split", "0.5", "0.5", "0.5"], "--split is"),
        (["--split", "1.2", "-0.2", "0"], "--split is"),
        (["--split", "0", "0.5", "0.5"], "--split is"),
        (["--split", "nan", "nan", "nan"], "--split is"),
        (["--virtual-nbi"], "--virtual-nbi"),
        (["--seed", "-1"], "--seed"),
        (["--pairs", "0"], "--pairs"),
        (["--pairs", "few"], "--pairs"),
        (["--folds", "1"], "--folds is 1"),
        (["--store-side", "8"], "--store-side is 8"),
        (["--crop-borders"], "--crop-borders"),
        (["--colour"], "--colour"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        run("phantom", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_ends_with_one_sentence_and_status_2(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "--out" in refusal("phantom")


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match=re.escape(str(out))):
            run("phantom", "--out", out, "--pairs", "1")


def test_relative_paths_work_from_any_folder(kvasir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("kvasir", "--out", "deep/out")
    monkeypatch.chdir(kvasir)
    assert len(read_manifest(Path("../deep/out/manifest.csv")).rows) == 17


# Pairs by a pattern


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


# Tables


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


# Stored frames


def framed(seed, left, top, right, bottom):
    """Scenery inside a noisy black border with a line of text in it; 200 x 160."""
    pixels = np.random.default_rng(seed).integers(0, 12, (160, 200, 3)).astype(np.uint8)
    pixels[4, 4:12] = 255
    inside = scenery(seed, bottom - top, right - left)
    pixels[top:bottom, left:right] = np.asarray(inside)
    return Image.fromarray(pixels)


def test_black_borders_are_cut_alike_from_both_frames_of_a_pair(tmp_path):
    for modality, box in (("WLI", (40, 10, 190, 150)), ("NBI", (50, 20, 180, 155))):
        (tmp_path / "in" / f"polyps_{modality}").mkdir(parents=True)
        framed(3, *box).save(tmp_path / "in" / f"polyps_{modality}" / "x.png")
    run(tmp_path / "in", "--out", tmp_path / "out", "--crop-borders")
    (row,) = read_manifest(tmp_path / "out" / "manifest.csv").rows
    for path in row.files.values():
        assert path.is_relative_to(tmp_path / "out") and path.suffix == ".jpg"
        assert Image.open(path).size == (190 - 40, 155 - 10)


def test_stored_frames_have_the_asked_side_and_none_is_enlarged(kvasir, tmp_path):
    scenery(0, 96, 128).save(kvasir / "polyps" / "p0.jpg", quality=95)
    run(kvasir, "--out", tmp_path / "out", "--store-side", 48, "--virtual-nbi")
    rows = {row.id: row for row in read_manifest(tmp_path / "out" / "manifest.csv").rows}
    sizes = {name: Image.open(path).size for name, path in rows["polyps/p0"].files.items()}
    assert sizes == {"wli": (64, 48), "nbi": (64, 48)}
    assert Image.open(rows["polyps/p1"].files["wli"]).size == (16, 12)
    stored = np.asarray(Image.open(rows["polyps/p0"].files["wli"]), float)
    expected = np.asarray(Image.open(kvasir / "polyps" / "p0.jpg").reduce(2), float)
    assert abs(stored - expected).mean() < 2.5


# Near-duplicates


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


# Folds


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


# The contact sheet


def test_the_contact_sheet_shows_the_images_of_each_pair(pairs, tmp_path):
    (pairs / "polyps_NBI" / "4.png").unlink()
    run(pairs, "--out", tmp_path / "out", "--keep-orphans")
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB"))
    # red frames (200, 0..40, 0) of WLI beside blue ones of NBI, in the same order
    red = (sheet[..., 0] == 200) & (sheet[..., 2] == 0)
    blue = (sheet[..., 2] == 200) & (sheet[..., 0] == 0)
    assert red.any() and blue.any()
    assert set(sheet[red][:, 1]) >= {0, 10, 20, 30, 40} and 40 not in set(sheet[blue][:, 1])
    for shade in (0, 10, 20, 30):
        rows, columns = (np.argwhere(mask & (sheet[..., 1] == shade)) for mask in (red, blue))
        assert abs(rows[:, 0].min() - columns[:, 0].min()) <= 1
        assert 0 < columns[:, 1].min() - rows[:, 1].min() < 200


# Properties of manifests


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


# Real frames


def test_kvasir_frames_become_pairs_with_virtual_nbi(kvasir_mini5, tmp_path):
    run(kvasir_mini5, "--out", tmp_path / "out", "--virtual-nbi", "--store-side", 96)
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    assert len(manifest.rows) == 105 and len(manifest.classes) == 5
    assert all(row.virtual == ("nbi",) and None not in row.files.values() for row in manifest.rows)
    assert min(Image.open(manifest.rows[0].files["nbi"]).size) == 96
