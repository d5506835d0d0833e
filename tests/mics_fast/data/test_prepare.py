"""Preparing data: which files become which rows, and what is refused in one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mics_fast import prepare
from mics_fast.data import phantom
from mics_fast.data.manifest import read_manifest
from mics_fast.errors import InputError


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
    assert os.listdir(tmp_path / "out") == ["manifest.csv"]
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
    assert len(list((tmp_path / "one").rglob("*.png"))) == 28
    for row in manifest.rows:
        name, *frames = phantom.render_pair(3, row.index)
        assert name == manifest.classes[row.label]
        for modality, frame in zip(("wli", "nbi"), frames, strict=True):
            assert (np.asarray(Image.open(row.files[modality])) == frame).all()


@pytest.mark.parametrize("broken", ["text", "empty", "cut"])
def test_a_broken_image_is_named_and_no_manifest_is_written(kvasir, tmp_path, broken):
    file = kvasir / "polyps" / "p3.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file)
    # Cut short in the middle of the scan: the header is whole.
    whole = file.read_bytes()
    contents = {"text": b"not an image", "empty": b"", "cut": whole[: len(whole) // 2]}
    file.write_bytes(contents[broken])
    for options in ([], ["--virtual-nbi"]):
        with pytest.raises(InputError, match=re.escape(str(file))):
            run(kvasir, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_a_failed_command_leaves_the_manifest_of_the_last_one(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "manifest.csv").read_bytes()
    (kvasir / "polyps" / "p3.jpg").write_text("not an image")
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


def test_an_image_of_a_kind_that_training_cannot_decode_is_refused(kvasir, tmp_path):
    Image.new("RGB", (16, 12)).save(kvasir / "polyps" / "p3.jpg", "GIF")
    with pytest.raises(InputError, match=r"p3\.jpg is no image, or none of JPEG"):
        run(kvasir, "--out", tmp_path / "out")


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
