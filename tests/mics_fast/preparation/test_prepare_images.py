"""Preparing data: every image is decoded once, refused with a reason, and stored as asked."""

from __future__ import annotations

import io
import struct
import sys
import weakref

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from mics_fast.common.errors import InputError
from mics_fast.data.image_files import SingleDecoder
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
    with pytest.raises(InputError, match=r"no usable sample.*rejected\.csv"):
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
        return inspection.Frame(image)

    monkeypatch.setattr(inspection, "read_frame", watched)
    monkeypatch.setattr(inspection, "available_threads", lambda: 2)
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


def test_each_class_begins_on_a_new_line_of_the_contact_sheet(tmp_path):
    for label, colour in (("a", (200, 0, 0)), ("b", (0, 200, 0)), ("c", (0, 0, 200))):
        for number in range(4):
            paint(tmp_path / "in" / label / f"{number}.png", colour)
    run(tmp_path / "in", "--out", tmp_path / "out")
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB"))
    spans, left = [], []
    for channel in range(3):
        own = np.argwhere((sheet[..., channel] == 200) & (sheet.sum(2) == 200))
        spans.append((own[:, 0].min(), own[:, 0].max()))
        left.append(own[:, 1].min())
    assert len(set(left)) == 1
    assert spans[0][1] < spans[1][0] and spans[1][1] < spans[2][0]


# One broken image costs one row; training reads what is accepted


def pair_with(tmp_path, content, name="x.tif"):
    """Five plain frames and one file of this content."""
    for number in range(5):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        scenery(number).save(tmp_path / "in" / "a" / f"{number}.png")
    (tmp_path / "in" / "a" / name).write_bytes(content)
    run(tmp_path / "in", "--out", tmp_path / "out")
    return rejected(tmp_path / "out") if (tmp_path / "out" / "rejected.csv").exists() else []


def encoded(array, kind="TIFF", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_tiff_that_training_cannot_read_is_rejected_with_its_reason(tmp_path, dtype):
    (line,) = pair_with(tmp_path, encoded(np.ones((40, 50), dtype)))
    assert "is a TIFF with" in line["reason"] and "convert it to PNG" in line["reason"]


def test_an_image_that_the_two_decoders_read_differently_is_rejected(tmp_path, monkeypatch):
    plain = SingleDecoder.pixels

    def darker(self, data):
        pixels = plain(self, data)
        return pixels // 2 if bytes(data[:2]) == b"II" else pixels

    monkeypatch.setattr(SingleDecoder, "pixels", darker)
    (line,) = pair_with(tmp_path, encoded(np.full((40, 50, 3), 200, np.uint8)))
    assert "read differently by the decoder of training (by up to 100 of 255" in line["reason"]


@pytest.mark.parametrize("error", [TypeError("mutated EXIF"), struct.error("x"), MemoryError()])
def test_whatever_a_decoder_raises_is_a_rejected_row(tmp_path, monkeypatch, error):
    def broken(image):
        if image.size == (50, 40):
            raise error
        return image

    monkeypatch.setattr("mics_fast.data.images.ImageOps.exif_transpose", broken)
    (line,) = pair_with(tmp_path, encoded(np.zeros((40, 50, 3), np.uint8), "PNG"), "x.png")
    assert "x.png cannot be decoded as an image" in line["reason"]


def test_16_bits_of_which_few_are_used_are_warned_about(tmp_path, capsys):
    ten_bits = np.linspace(0, 1023, 2000).reshape(40, 50).astype(np.uint16)
    assert not pair_with(tmp_path, encoded(ten_bits, "PNG"), "x.png")
    assert "1 images of 16 bits use less than a quarter of their range" in capsys.readouterr().out
    assert not pair_with(tmp_path, encoded(ten_bits * 64, "PNG"), "x.png")
    assert "16 bits" not in capsys.readouterr().out


def test_links_that_lead_outside_are_not_followed_into_shards(kvasir, tmp_path):
    paint(tmp_path / "private" / "x.jpg")
    (kvasir / "polyps" / "link.jpg").symlink_to(tmp_path / "private" / "x.jpg")
    (kvasir / "polyps" / "inside.jpg").symlink_to(kvasir / "polyps" / "p0.jpg")
    (kvasir / "polyps" / "loop.jpg").symlink_to("loop.jpg")
    run(kvasir, "--out", tmp_path / "out", "--to-shards", "100")
    line, loop = rejected(tmp_path / "out")
    assert line["id"] == "polyps/link" and "leads outside the source by a link" in line["reason"]
    assert loop["id"] == "polyps/loop" and "cannot be read" in loop["reason"]
    run(kvasir, "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv").rows) == 19


# DICOM


def dicom(pixels, **attributes):
    """A DICOM file of grey levels or colours."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SOPClassUID = SecondaryCaptureImageStorage
    data.PatientName = "DOE^JOHN"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PlanarConfiguration = (3, 0) if pixels.ndim == 3 else (1, 0)
    data.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


RAMP = np.arange(2000).reshape(40, 50)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: dicom((RAMP % 256).astype(np.uint8)), RAMP % 256),
        (lambda: dicom(np.stack([RAMP % 256] * 3, 2).astype(np.uint8)), RAMP % 256),
        (lambda: dicom((RAMP * 30).astype(np.uint16)), RAMP * 30 / 257),
        (lambda: dicom(RAMP.astype(np.uint16), BitsStored=11, HighBit=10), RAMP * 255 / 2047),
        (
            lambda: dicom((RAMP % 256).astype(np.uint8), PhotometricInterpretation="MONOCHROME1"),
            255 - RAMP % 256,
        ),
        (  # Hounsfield units from -1000, shown from 0 to 500
            lambda: dicom(
                RAMP.astype(np.int16),
                RescaleIntercept=-1000,
                RescaleSlope=1,
                WindowCenter=250,
                WindowWidth=501,
            ),
            ((RAMP - 1000) / 500).clip(0, 1) * 255,
        ),
    ],
    ids=["grey", "colour", "16 bits", "11 bits", "inverted", "window"],
)
def test_dicom_is_stored_as_png_without_the_patient(tmp_path, content, expected):
    assert not pair_with(tmp_path, content(), "x.dcm")
    row = {row.id: row for row in read_manifest(tmp_path / "out" / "manifest.csv").rows}["a/x"]
    assert row.files["wli"].suffix == ".png" and b"DOE" not in row.files["wli"].read_bytes()
    assert abs(decode(row.files["wli"])[..., 1] - expected).max() <= 1


def encapsulated(frame, syntax=JPEGBaseline8Bit):
    """A DICOM file of 40 x 50 pixels that holds an encoded frame."""
    data = dcmread(io.BytesIO(dicom(np.zeros((40, 50), np.uint8))))
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([frame])
    stream = io.BytesIO()
    data.save_as(stream)
    return stream.getvalue()


def black(height, width, kind):
    return encoded(np.zeros((height, width), np.uint8), kind)


def deflated():
    data = dcmread(io.BytesIO(dicom(RAMP.astype(np.uint16))))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    stream = io.BytesIO()
    data.save_as(stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: encapsulated(black(400, 500, "JPEG")), "a JPEG of 500 x 400"),
        (lambda: encapsulated(black(40, 50, "JPEG2000"), JPEG2000Lossless), "is no image"),
        (lambda: encapsulated(black(40, 50, "PNG")), "a PNG of 50 x 40"),
        (lambda: encapsulated(bytes(100_000), RLELossless), "bytes for 2000 pixels"),
        (deflated, "is a deflated DICOM"),
    ],
    ids=["larger", "JPEG 2000", "PNG", "RLE", "deflated"],
)
def test_dicom_that_states_other_pixels_than_it_holds_is_rejected(tmp_path, content, reason):
    (line,) = pair_with(tmp_path, content(), "x.dcm")
    assert reason in line["reason"]


def test_a_jpeg_in_dicom_is_read(tmp_path):
    frame = encoded(np.full((40, 50), 90, np.uint8), "JPEG")
    assert not pair_with(tmp_path, encapsulated(frame), "x.dcm")
    row = {row.id: row for row in read_manifest(tmp_path / "out" / "manifest.csv").rows}["a/x"]
    assert abs(decode(row.files["wli"]).astype(int) - 90).max() <= 1


def test_dicom_without_pydicom_is_rejected_with_what_to_install(tmp_path, monkeypatch):
    content = dicom(RAMP.astype(np.uint16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (line,) = pair_with(tmp_path, content, "x.dcm")
    assert "pip install 'mics-fast[dicom]'" in line["reason"]


def test_dicom_of_many_frames_or_that_is_broken_is_rejected(tmp_path):
    (line,) = pair_with(tmp_path, dicom(RAMP.astype(np.uint16), NumberOfFrames=9), "x.dcm")
    assert "9 frames" in line["reason"]
    (line,) = pair_with(tmp_path, dicom(RAMP.astype(np.uint16))[:300], "x.dcm")
    assert "x.dcm cannot be decoded as DICOM" in line["reason"]
