"""Bytes are checked before a decoder sees them: regular file, size, kind, number of pixels."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct

import numpy as np
import pytest
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.data.image_header import LARGEST_FILE, RefusedImage, check_image
from mics_fast.data.images import decode
from mics_fast.data.shards import read_image
from tests.mics_fast.data.loading import evaluate, row

PICTURE = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))


def encoded(kind, image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(*, big=False, **tags):
    """A TIFF header alone, with these tags; a tag of several values is a tuple of shorts."""
    names = {"width": 256, "height": 257, "bits": 258, "compression": 259, "colours": 262}
    names |= {"samples": 277, "planes": 284, "tile_width": 322, "tile_height": 323}
    names |= {"extra": 338, "numbers": 339}
    values = {"width": 40, "height": 30, "bits": (8, 8, 8), "colours": 2, "samples": 3} | tags
    order, beyond = (">" if big else "<"), 8 + 2 + 12 * len(values) + 4
    entries, tail = b"", b""
    for name, value in values.items():
        if isinstance(value, tuple):
            packed = struct.pack(f"{order}{len(value)}H", *value)
            cell = packed.ljust(4, b"\0")
            if len(packed) > 4:
                cell, tail = struct.pack(f"{order}I", beyond + len(tail)), tail + packed
            entries += struct.pack(f"{order}HHI", names[name], 3, len(value)) + cell
        else:
            entries += struct.pack(f"{order}HHII", names[name], 4, 1, value)
    start = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}IH", 8, len(values))
    return start + entries + bytes(4) + tail


# Accepted


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "comment": b"x" * 60000}),
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("MPO", {"save_all": True, "append_images": [PICTURE]}),
    ],
)
def test_the_size_of_each_supported_kind_is_read_from_its_header(kind, options):
    header = check_image(encoded(kind, **options))
    assert header == ("JPEG" if kind == "MPO" else kind, 40, 30, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_is_read(mode):
    image = Image.new("I;16", (40, 30)) if mode == "I;16" else PICTURE.convert(mode)
    assert check_image(encoded("PNG", image))[1:3] == (40, 30)


# Refused


@pytest.mark.parametrize("kind", ["GIF", "PPM", "JPEG2000", "ICO"])
def test_a_kind_that_is_not_supported_is_refused(kind):
    with pytest.raises(RefusedImage, match="is no image, or none of JPEG, PNG, BMP, TIFF, WEBP"):
        check_image(encoded(kind))


def test_webp_with_metadata_which_can_crash_the_decoder_is_refused():
    with pytest.raises(RefusedImage, match="is a WebP with metadata"):
        check_image(encoded("WEBP", lossless=True, exif=b"Exif\0\0II*\0"))


def test_jpeg_2000_under_the_name_of_a_png_is_one_sentence(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encoded("JPEG2000"))
    for read in (lambda: decode(path), lambda: list(evaluate([row(0, path, path)]))):
        with pytest.raises(InputError, match=r"x\.png is no image"):
            read()


@pytest.mark.parametrize(
    "header",
    [
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 13_300, 13_300) + bytes(5),
        b"\xff\xd8\xff\xc0\0\x11\x08" + b"\xea\x60\xea\x60" + bytes(10) + b"\xff\xda",
        b"BM" + bytes(12) + struct.pack("<Iii", 40, 20_000, -20_000),
        b"RIFF\0\0\0\0WEBPVP8L" + bytes(5) + b"\xff\xff\xff\x0f",
        tiff(width=100_000, height=100_000),
        tiff(tile_width=100_000, tile_height=100_000),
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 40_000, 1) + bytes(5),
    ],
    ids=["PNG", "JPEG", "BMP", "WEBP", "TIFF", "TIFF tile", "long side"],
)  # fmt: skip
def test_more_pixels_than_memory_is_for_are_refused_from_the_header(header):
    with pytest.raises(RefusedImage, match="pixels, wanted at most 64 million"):
        check_image(header)


@pytest.mark.parametrize(
    ("tags", "problem"),
    [
        ({"numbers": (2, 2, 2)}, "signed"),
        ({"numbers": (3, 3, 3)}, "floating-point"),
        ({"bits": (32, 32, 32)}, "32 bits"),
        ({"bits": (8, 16, 8)}, "16 bits"),
        ({"planes": (2,)}, "separate colour planes"),
        ({"samples": 5, "bits": (8,) * 5}, "5 channels"),
        ({"colours": 1, "samples": 2, "bits": (8, 8)}, "2 channels"),
        ({"samples": 4, "bits": (8,) * 4, "extra": (1,)}, "4 channels"),
        ({"colours": 6}, "colour kind 6"),
        ({"colours": 8}, "colour kind 8"),
        ({"colours": 5, "samples": 4, "bits": (8,) * 4}, "colour kind 5"),
    ],
)
@pytest.mark.parametrize("big", [False, True])
def test_tiff_kinds_that_decoders_read_differently_are_refused(tags, problem, big):
    with pytest.raises(RefusedImage, match=f"TIFF with .*{problem}.*convert it to PNG"):
        check_image(tiff(**tags, big=big))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_a_header_cut_anywhere_is_refused_or_read_as_it_is(kind):
    whole = encoded(kind)
    for length in range(min(len(whole), 400)):
        try:
            assert check_image(whole[:length]) == (kind, 40, 30, 8)
        except RefusedImage as error:
            assert "\n" not in str(error)


def test_a_jpeg_of_two_frames_or_12_bits_is_refused():
    whole = encoded("JPEG")
    place = whole.index(b"\xff\xc0")
    frame = whole[place : place + 19]
    for broken, problem in (
        (whole[:place] + frame + whole[place:], "header is broken"),
        (whole[: place + 4] + b"\x0c" + whole[place + 5 :], "12 bits"),
    ):
        with pytest.raises(RefusedImage, match=problem):
            check_image(broken)


def test_a_jpeg_of_nothing_but_padding_is_refused_at_once():
    with pytest.raises(RefusedImage, match="header is broken"):
        check_image(b"\xff\xd8" + b"\xff" * 10_000_000)


# Not regular files


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


# Regular files by their type, but reading one waits for news of the system; root alone may read it.
WAITING = [name for name in ("/proc/kmsg",) if os.access(name, os.R_OK)]


def waiting(path):
    path.symlink_to(WAITING[0])
    log = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):  # what the kernel has said so far is read away
        while os.read(log, 1 << 16):
            pass
    os.close(log)


def too_large(path):
    with open(path, "wb") as file:
        file.write(encoded("PNG"))
        file.truncate(LARGEST_FILE + 1)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (pipe, "is a named pipe, wanted a regular file"),
        (unix_socket, "is a socket, wanted a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, wanted a regular file"),
        (lambda path: path.mkdir(), "is a folder, wanted a regular file"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (sparse, "has 1048576 MiB, wanted an image of at most 512 MiB"),
        (too_large, "has 512 MiB, wanted an image of at most 512 MiB"),
        (lambda path: path.touch(), "is empty"),
        *((waiting, "has nothing to read yet") for _ in WAITING),
    ],
)
def test_what_is_no_image_file_is_one_sentence_everywhere(tmp_path, monkeypatch, make, problem):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = tmp_path / "x.png"
    make(path.relative_to(tmp_path))
    for read in (lambda: decode(path), lambda: list(evaluate([row(0, path, path)]))):
        with pytest.raises(InputError) as caught:
            read()
        assert str(path) in str(caught.value) and problem in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_member_of_a_shard_is_checked_as_a_file_is(tmp_path):
    (tmp_path / "s.tar").write_bytes(encoded("GIF"))
    size = (tmp_path / "s.tar").stat().st_size
    (tmp_path / "s.idx").write_text(f"v1.2 1\nwli.png 0 {size} 0.wli.png\n")
    with pytest.raises(RefusedImage, match="is no image"):
        read_image(tmp_path / "s.tar" / "0.wli.png")
