"""Preparing data: every image is decoded once, refused with a reason, and stored as asked."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.data.images import decode
from mics_fast.data.manifest import read_manifest
from mics_fast.preparation import inspection, phantom
from tests.mics_fast.preparation.preparing import damaged, paint, rejected, run, scenery


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


def test_an_image_of_a_kind_that_training_cannot_decode_is_rejected(kvasir, tmp_path):
    Image.new("RGB", (16, 12)).save(kvasir / "polyps" / "p3.jpg", "GIF")
    run(kvasir, "--out", tmp_path / "out")
    assert "p3.jpg is no image, or none of JPEG" in rejected(tmp_path / "out")[0]["reason"]


def test_16_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 192).reshape(12, 16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    assert (decode(tmp_path / "x.png")[..., 0] == ramp >> 8).all()


def test_checking_keeps_no_decoded_image(kvasir, tmp_path, monkeypatch):
    decoded, alive = [], []

    def watched(path):
        image = decode(path).copy()
        decoded.append(weakref.ref(image))
        alive.append(sum(reference() is not None for reference in decoded))
        return image

    monkeypatch.setattr(inspection, "decode", watched)
    monkeypatch.setattr(inspection.os, "cpu_count", lambda: 2)
    run(kvasir, "--out", tmp_path / "out")
    assert len(alive) == 17 and max(alive) <= 3


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


def test_virtual_nbi_is_upright_as_the_pipeline_shows_the_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "in" / "polyps").mkdir(parents=True)
    Image.new("RGB", (16, 12), "pink").save(tmp_path / "in" / "polyps" / "x.jpg", exif=exif)
    run(tmp_path / "in", "--out", tmp_path / "out", "--virtual-nbi")
    (row,) = read_manifest(tmp_path / "out" / "manifest.csv").rows
    assert Image.open(row.files["nbi"]).size == (12, 16)


def test_virtual_nbi_beside_real_nbi_is_refused(pairs, tmp_path):
    with pytest.raises(InputError, match="--virtual-nbi"):
        run(pairs, "--out", tmp_path / "out", "--virtual-nbi")


def test_kvasir_frames_become_pairs_with_virtual_nbi(kvasir_mini5, tmp_path):
    run(kvasir_mini5, "--out", tmp_path / "out", "--virtual-nbi", "--store-side", 96)
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    assert len(manifest.rows) == 105 and len(manifest.classes) == 5
    assert all(row.virtual == ("nbi",) and None not in row.files.values() for row in manifest.rows)
    assert min(Image.open(manifest.rows[0].files["nbi"]).size) == 96


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
