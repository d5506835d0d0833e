"""Kind and size of an encoded image, read from its header before any decoder sees the bytes.

Decoders trust their input: some files crash the process, and a few kilobytes can ask for gigabytes
of pixels. So the bytes of every image pass ``check_image`` first. It accepts JPEG, PNG, BMP, TIFF
and WebP, but refuses TIFF variants that decoders read differently.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

LARGEST_FILE = 1 << 29
"""Size limit of an image file, bytes."""
LARGEST_IMAGE, LONGEST_SIDE = 1 << 26, 1 << 15
"""Limits of a decoded image: its pixels, and its longer side."""
_MOST_MARKERS = 10_000  # in a JPEG header

# TIFF: the tags that are read, with their defaults, and the integer types.
_TAGS = {"width": 256, "height": 257, "bits": 258, "compression": 259, "colours": 262,
         "samples": 277, "planes": 284, "tile_width": 322, "tile_height": 323, "extra": 338,
         "numbers": 339}  # fmt: skip
_DEFAULTS = {"bits": (1,), "compression": (1,), "colours": (1,), "samples": (1,), "planes": (1,),
             "tile_width": (1,), "tile_height": (1,), "extra": (), "numbers": (1,)}  # fmt: skip
_INTEGER = {1: "B", 3: "H", 4: "I"}
_GREY_OR_PALETTE, _RGB, _YCBCR, _JPEG, _PREMULTIPLIED = (0, 1, 3), 2, 6, 7, 1


class RefusedImage(Exception):
    """An image that must not reach a decoder. The message is a predicate: "is ..., wanted ..."."""


class ImageHeader(NamedTuple):
    """Header of an image file.

    Args:
        kind: JPEG, PNG, BMP, TIFF or WEBP.
        width, height: pixels, as stored.
        bits: per sample; 16, or at most 8.
    """

    kind: str
    width: int
    height: int
    bits: int


def check_image(data: bytes) -> ImageHeader:
    """Read the header of an encoded image.

    Args:
        data: all bytes of the file.

    Raises:
        RefusedImage: no valid header, a variant that decoders read differently, or too many pixels.
    """
    if not data:
        raise RefusedImage("is empty, wanted an image")
    kind = next((kind for start, kind in _MAGIC if data.startswith(start)), None)
    if kind is None or (kind == "WEBP" and data[8:12] != b"WEBP"):
        raise RefusedImage(f"is no image, or none of {', '.join(_SIZES)}")
    try:
        width, height = _SIZES[kind](data)
    except (struct.error, IndexError, KeyError, ValueError):
        raise RefusedImage(f"cannot be decoded as an image: its {kind} header is broken") from None
    if width < 1 or height < 1:
        raise RefusedImage(f"cannot be decoded as an image: it has {width} x {height} pixels")
    if width * height > LARGEST_IMAGE or max(width, height) > LONGEST_SIDE:
        raise RefusedImage(
            f"has {width} x {height} pixels, wanted at most {LARGEST_IMAGE >> 20} million, and "
            f"{LONGEST_SIDE} on a side"
        )
    return ImageHeader(kind, width, height, _bits(kind, data))


def _bits(kind: str, data: bytes) -> int:
    if kind == "TIFF":
        return _tiff_tags(data)["bits"][0]
    return data[24] if kind == "PNG" else 8


def _jpeg(data: bytes) -> tuple[int, int]:
    place, size = 2, None
    for _ in range(_MOST_MARKERS):
        place = data.index(b"\xff", place)  # decoders also skip bytes between segments
        marker = data[place + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # no segment
            place += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA and size is not None:  # the scan
            return size
        (length,) = struct.unpack_from(">H", data, place + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if size is not None:
                break  # a second frame
            bits, height, width = struct.unpack_from(">BHH", data, place + 4)
            if bits != 8:
                raise RefusedImage(f"is a JPEG of {bits} bits per sample, wanted 8")
            size = width, height
        place += 2 + length
    raise IndexError


def _png(data: bytes) -> tuple[int, int]:
    width, height, _ = struct.unpack_from(">IIB", data, 16)
    if data[12:16] != b"IHDR":
        raise IndexError
    return width, height


def _bmp(data: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return width, abs(height)  # negative: the first row is the top one


def _webp(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":  # its metadata can crash the decoder of training
        raise RefusedImage("is a WebP with metadata, alpha or animation, wanted a plain one or PNG")
    if chunk == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    if chunk != b"VP8 ":
        raise IndexError
    return width & 0x3FFF, height & 0x3FFF


def _tiff(data: bytes) -> tuple[int, int]:
    tags = _tiff_tags(data)
    (width,), (height,), (samples,) = tags["width"], tags["height"], tags["samples"]
    (colours,), (compression,) = tags["colours"], tags["compression"]
    grey = colours in _GREY_OR_PALETTE and samples == 1
    rgb = colours == _RGB or (colours == _YCBCR and compression == _JPEG)
    problem = None
    if set(tags["numbers"]) != {1}:
        problem = "signed or floating-point samples"
    elif len(set(tags["bits"])) != 1 or tags["bits"][0] not in (1, 8, 16):
        problem = f"{max(tags['bits'])} bits per sample"
    elif samples > 1 and tags["planes"] != (1,):
        problem = "separate colour planes"
    elif (not grey and not (rgb and samples in (3, 4))) or _PREMULTIPLIED in tags["extra"]:
        problem = f"{samples} channels of TIFF's colour kind {colours}"
    if problem is not None:
        wanted = "8 or 16 unsigned bits per sample, grey or RGB; convert it to PNG"
        raise RefusedImage(f"is a TIFF with {problem}, wanted {wanted}")
    (tile_width,), (tile_height,) = tags["tile_width"], tags["tile_height"]
    return (
        (tile_width, tile_height) if tile_width * tile_height > LARGEST_IMAGE else (width, height)
    )


def _tiff_tags(data: bytes) -> dict[str, tuple[int, ...]]:
    """Return the values of the tags of the first image.

    Raises:
        struct.error, KeyError: there is no such image, or a tag is repeated.
    """
    order = "<" if data[:2] == b"II" else ">"
    (first,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, first)
    names = {number: name for name, number in _TAGS.items()}
    found = {}
    for place in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, place)
        if tag in names:
            name = names.pop(tag)  # decoders disagree about repeated tags
            values = f"{order}{min(number, 8)}{_INTEGER[kind]}"
            inside = struct.calcsize(values) <= 4
            start = place + 8 if inside else struct.unpack_from(f"{order}I", data, place + 8)[0]
            found[name] = struct.unpack_from(values, data, start)
        elif tag in _TAGS.values():
            raise KeyError(tag)
    return {name: found[name] if name in found else _DEFAULTS[name] for name in _TAGS}


_SIZES = {"JPEG": _jpeg, "PNG": _png, "BMP": _bmp, "TIFF": _tiff, "WEBP": _webp}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"RIFF", "WEBP"),
)
