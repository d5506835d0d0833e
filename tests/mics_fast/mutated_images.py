"""Small images of every supported format and with metadata, to be mutated by the fuzz tests."""

from __future__ import annotations

import io

from PIL import Image

from tests.mics_fast.preparation.preparing import scenery


def encoded(kind, **options):
    stream = io.BytesIO()
    scenery(1, 40, 30).save(stream, kind, **options)
    return stream.getvalue()


def metadata():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8825] = 6, "a colon", {1: "N", 2: (1.0, 2.0, 3.0)}
    return exif


IMAGES = [
    encoded("JPEG", quality=90),
    encoded("JPEG", progressive=True, exif=metadata(), comment=b"a comment"),
    encoded("PNG"),
    encoded("PNG", exif=metadata()),
    encoded("BMP"),
    encoded("TIFF"),
    encoded("TIFF", compression="tiff_lzw"),
    encoded("TIFF", compression="jpeg"),
    encoded("WEBP"),
    encoded("WEBP", lossless=True, exif=metadata()),
]
