"""Privacy: stored images have no metadata, names are hashed, files are private."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mics_fast.common.anonymity import pseudonym, read_key
from mics_fast.common.errors import InputError
from mics_fast.data.images import pixels_of
from mics_fast.data.manifest import read_manifest
from mics_fast.data.shards import read_image
from mics_fast.preparation.metadata import without_metadata
from tests.mics_fast.preparation.preparing import paint, run, scenery

SECRET = b"DOE_JOHN"


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = orientation, SECRET.decode()
    return tags


def encoded(kind, orientation=1, **options):
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Patient", SECRET.decode())
    if kind == "JPEG":
        options["comment"] = SECRET
    if kind == "TIFF":
        options["description"] = SECRET.decode()
    elif kind != "BMP":
        options["exif"] = exif(orientation)
    stream = io.BytesIO()
    scenery(3, 40, 30).save(stream, kind, **options)
    return stream.getvalue() + (b"" if kind == "TIFF" else SECRET)


@pytest.mark.parametrize("orientation", [1, 6, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "icc_profile": SECRET * 9000}),
        ("PNG", {}),
        ("PNG", {"icc_profile": SECRET}),
        ("TIFF", {}),
        ("BMP", {}),
    ],
)
def test_metadata_go_and_pixels_stay(kind, options, orientation):
    data = encoded(kind, orientation, **options)
    bare = without_metadata(data, Path("x"))
    assert SECRET in data and SECRET not in bare
    assert (pixels_of(bare, Path("x")) == pixels_of(data, Path("x"))).all()
    with Image.open(io.BytesIO(bare)) as image:
        assert set(image.getexif()) <= {0x0112}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_an_image_without_metadata_keeps_its_bytes(kind):
    stream = io.BytesIO()
    scenery(3, 40, 30).save(stream, kind)
    assert without_metadata(stream.getvalue(), Path("x")) == stream.getvalue()


def test_shards_hold_no_metadata(tmp_path):
    (tmp_path / "in" / "polyps").mkdir(parents=True)
    for number, kind in enumerate(("JPEG", "PNG", "TIFF")):
        (tmp_path / "in" / "polyps" / f"{number}.{kind[:4].lower()}").write_bytes(encoded(kind, 6))
    for path in (tmp_path / "in" / "polyps").glob("*.jpeg"):
        assert SECRET in path.read_bytes()
    run(tmp_path / "in", "--out", tmp_path / "out", "--to-shards", "10")
    rows = read_manifest(tmp_path / "out" / "manifest.csv").rows
    assert len(rows) == 3
    for row in rows:
        assert SECRET not in row.files["wli"].parent.read_bytes()
        pixels = pixels_of(read_image(row.files["wli"]).tobytes(), Path("x"))
        assert pixels.shape[:2] == ((40, 30) if row.id == "polyps/2" else (30, 40))


# Pseudonyms


@pytest.fixture
def source(tmp_path):
    """Six frames of two patients in a table, one of them broken."""
    lines = ["file,kind,patient"]
    for number in range(6):
        scenery(number).save(tmp_path / f"DOE_JOHN_{number}.png")
        lines.append(f"DOE_JOHN_{number}.png,{'ab'[number % 2]},DOE_{number // 3}")
    (tmp_path / "DOE_JOHN_5.png").write_bytes(b"broken")
    (tmp_path / "DOE_list.csv").write_text("\n".join(lines))
    return tmp_path / "DOE_list.csv"


COLUMNS = ("--column", "wli=file", "--label-column", "kind", "--group-column", "patient")


@pytest.mark.parametrize("how", [("--to-shards", "4"), ("--store-side", "32")])
def test_anonymised_output_holds_no_name(source, tmp_path, how):
    out, key = tmp_path / "out", tmp_path / "key"
    run(source, "--out", out, *COLUMNS, "--anonymise", key, *how)
    for path in out.rglob("*"):
        assert "DOE" not in path.name
        assert path.is_dir() or (b"DOE" not in path.read_bytes())
    assert not (out / "contact_sheet.png").exists()
    manifest = read_manifest(out / "manifest.csv")
    assert [row.id for row in manifest.rows] == [
        pseudonym(read_key(key), f"DOE_JOHN_{number}") for number in range(5)
    ]
    assert [row.group for row in manifest.rows] == [0, 0, 0, 1, 1]


def test_only_the_same_key_gives_the_same_pseudonyms(tmp_path):
    one, other = read_key(tmp_path / "one"), read_key(tmp_path / "other")
    assert read_key(tmp_path / "one") == one != other
    assert pseudonym(one, "x") == pseudonym(one, "x") != pseudonym(other, "x")
    assert stat.S_IMODE(os.stat(tmp_path / "one").st_mode) == 0o600


def test_a_key_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "key").write_text("short")
    with pytest.raises(InputError, match="holds 5 characters, wanted at least 16"):
        read_key(tmp_path / "key")


@pytest.mark.parametrize("options", [(), ("--to-shards", "4", "--hold-out", "a")])
def test_pseudonyms_with_paths_of_the_source_beside_them_are_refused(source, tmp_path, options):
    with pytest.raises(InputError, match="--anonymise needs --store-side"):
        run(source, "--out", tmp_path / "out", *COLUMNS, "--anonymise", tmp_path / "key", *options)


@pytest.mark.parametrize("how", [(), ("--to-shards", "4"), ("--virtual-nbi",)])
def test_every_file_of_patients_is_its_owner_s_alone(tmp_path, how):
    paint(tmp_path / "in" / "a" / "x.png")
    paint(tmp_path / "in" / "a" / "y.jpg")
    (tmp_path / "in" / "a" / "z.png").write_bytes(b"broken")
    run(tmp_path / "in", "--out", tmp_path / "out", *how)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
