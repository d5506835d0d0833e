"""Removal of metadata from encoded images: EXIF (places, names), comments, profiles.

JPEG and PNG keep their pixels bit for bit: metadata segments and chunks are dropped, and of EXIF
only the orientation flag is kept, since decoders rotate the image by it. Other file types with
room for metadata become PNG.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

from mics_fast.data.image_header import check_image
from mics_fast.data.images import FORMATS, pixels_of

_ORIENTATION = 0x0112
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def without_metadata(data: bytes, path: Path) -> bytes:
    """Return an encoded image with the same pixels and no metadata.

    Args:
        data: an image that ``check_image`` accepts.
        path: for error messages.

    Raises:
        InputError: the image cannot be decoded.
    """
    kind = check_image(data).kind
    try:
        if kind == "JPEG":
            return _jpeg(data, _orientation(data))
        if kind == "PNG":
            return _png(data, _orientation(data))
    except (struct.error, IndexError, ValueError):
        pass  # decoders accept files that this parser does not
    if kind in ("BMP", "WEBP"):
        return data[: _end_of(kind, data)]
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(data, path)).save(buffer, "PNG")
    return buffer.getvalue()


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


def _exif(orientation: int) -> bytes:
    """Return the TIFF structure of the orientation tag."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes, orientation: int) -> bytes:
    kept = [data[:2]]
    if orientation in range(2, 9):
        exif = b"Exif\0\0" + _exif(orientation)
        kept.append(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
    place = 2
    while True:
        if data[place] != 0xFF:
            raise ValueError("no marker")
        marker = data[place + 1]
        if marker == 0xD9:
            return b"".join([*kept, data[place : place + 2]])
        (length,) = struct.unpack_from(">H", data, place + 2)
        end = place + 2 + length
        jfif = marker == 0xE0 and data[place + 4 : place + 8] == b"JFIF"
        if marker == 0xDA:  # entropy-coded data follow, up to a marker that is no restart
            end = data.index(b"\xff", end)
            while data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end = data.index(b"\xff", end + 2)
        # 0xEE names the colour transform; other application segments and comments are dropped.
        if jfif or marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[place:end])
        place = end


def _png(data: bytes, orientation: int) -> bytes:
    kept, place = [data[:8]], 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name, end = data[place + 4 : place + 8], place + 12 + length
        if name in _PNG_CHUNKS:
            kept.append(data[place:end])
        if name == b"IHDR" and orientation in range(2, 9):
            body = b"eXIf" + _exif(orientation)
            kept.append(
                struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
            )
        if name == b"IEND":
            return b"".join(kept)
        place = end
    raise ValueError("no end")


def _end_of(kind: str, data: bytes) -> int:
    """Return the length of the image according to its header; trailing bytes are dropped."""
    place, more = (2, 0) if kind == "BMP" else (4, 8)
    length = struct.unpack_from("<I", data, place)[0] + more
    return length if kind == "WEBP" else max(length, 26) if length else len(data)
