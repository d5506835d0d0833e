"""Removal of metadata from encoded images: EXIF with its places and names, comments, profiles.

JPEG and PNG keep their pixels bit for bit: segments and chunks are left out, and of EXIF a flag of
orientation alone stays, since decoders turn the image by it. Other files with room for metadata
become PNG.
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
    """An encoded image of the same pixels that tells nothing else.

    Args:
        data: an image that ``check_image`` accepts.
        path: names it in a refusal.

    Raises:
        InputError: it cannot be decoded.
    """
    kind = check_image(data).kind
    try:
        if kind == "JPEG":
            return _jpeg(data, _orientation(data))
        if kind == "PNG":
            return _png(data, _orientation(data))
    except (struct.error, IndexError, ValueError):
        pass  # decoders forgive more than this page does
    if kind in ("BMP", "WEBP"):
        return data[: _end_of(kind, data)]
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(data, path)).save(buffer, "PNG")
    return buffer.getvalue()


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


def _exif(orientation: int) -> bytes:
    """TIFF structure of one tag."""
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
        # 0xEE names the colour transform; what other applications and comments say goes.
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
    """Length of the image as its header says; what follows it is none of it."""
    place, more = (2, 0) if kind == "BMP" else (4, 8)
    length = struct.unpack_from("<I", data, place)[0] + more
    return length if kind == "WEBP" else max(length, 26) if length else len(data)
