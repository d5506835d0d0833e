"""DICOM images, read by pydicom (extra ``dicom``): pixels only, no patient data."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from mics_fast.data.image_header import LARGEST_IMAGE, RefusedImage, check_image

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax


def is_dicom(data: bytes) -> bool:
    """Return True if the data have the DICOM preamble."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes) -> np.ndarray:
    """Decode a DICOM file to (H, W, 3) uint8.

    Grey levels are mapped through the file's first window, or through the full stored range if it
    has none; MONOCHROME1 is inverted.

    Raises:
        RefusedImage: pydicom is not installed, or the file has no single readable image.
    """
    try:
        import pydicom
    except ImportError:
        raise RefusedImage("is DICOM, wanted pip install 'mics-fast[dicom]' to read it") from None
    try:
        if _DEFLATED in data:  # inflated as a whole before anything can be checked
            raise RefusedImage("is a deflated DICOM, wanted one that is not")
        dataset = pydicom.dcmread(io.BytesIO(data))
        frames = int(dataset.get("NumberOfFrames") or 1)
        pixels = int(dataset.Rows) * int(dataset.Columns)
        if frames != 1 or not 0 < pixels <= LARGEST_IMAGE:
            raise RefusedImage(
                f"is DICOM of {frames} frames of {pixels} pixels, wanted one frame of at most "
                f"{LARGEST_IMAGE >> 20} million"
            )
        _check_encoded(dataset, pixels)
        return _levels(dataset)
    except RefusedImage:
        raise
    except (
        Exception
    ) as error:  # pydicom and its decoders raise many kinds of errors for broken files
        raise RefusedImage(f"cannot be decoded as DICOM: {error}") from None


def _check_encoded(dataset: Any, pixels: int) -> None:
    """Refuse pixel data that a decoder would not turn into the stated number of pixels.

    Raises:
        RefusedImage: says what they are.
    """
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:
        header = check_image(get_frame(dataset.PixelData, 0, number_of_frames=1))
        if header.kind != "JPEG" or header.width * header.height != pixels:
            raise RefusedImage(
                f"is DICOM of {pixels} pixels with a {header.kind} of {header.width} x "
                f"{header.height}, wanted a JPEG of the same size, or uncompressed pixels"
            )
    samples = int(dataset.get("SamplesPerPixel", 1)) * int(dataset.BitsAllocated)
    if len(dataset.PixelData) > 2 * pixels * max(8, samples) // 8 + 4096:
        raise RefusedImage(f"is DICOM with {len(dataset.PixelData)} bytes for {pixels} pixels")


def _levels(dataset: Any) -> np.ndarray:
    """Convert the pixels of a dataset to (H, W, 3) uint8."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    values = dataset.pixel_array
    kind = dataset.PhotometricInterpretation
    bits = int(dataset.BitsStored)
    if kind == "PALETTE COLOR":
        values, bits = apply_color_lut(values, dataset), 16
        return (values >> 8).astype(np.uint8) if values.dtype.itemsize == 2 else values
    if values.ndim == 3:
        return (values >> (bits - 8)).astype(np.uint8)
    grey = np.asarray(apply_modality_lut(values, dataset), np.float32)
    if "WindowCenter" in dataset:
        centre, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
        # DICOM PS3.3 C.11.2.1.2.1, for an output range of 0 to 1.
        shown = (grey - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
    else:
        low = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
        ends = np.asarray(apply_modality_lut(np.array([low, low + 2**bits - 1]), dataset), float)
        shown = (grey - ends[0]) / (ends[1] - ends[0])
    shown = shown.clip(0, 1)
    levels = np.round(255 * (1 - shown if kind == "MONOCHROME1" else shown)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def _first(value: Any) -> float:
    """Return the first value of an element that has one or more."""
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)
