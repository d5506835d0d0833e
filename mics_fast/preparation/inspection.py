"""Inspection of images: each is decoded once and checked, cropped, stored, hashed in one pass."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from mics_fast.common.errors import InputError
from mics_fast.data.decoding import check_dali
from mics_fast.data.image_files import SingleDecoder
from mics_fast.data.image_header import RefusedImage, check_image
from mics_fast.data.images import around, content_box, cut, pixels_of, save, shrink
from mics_fast.data.shards import read_bytes
from mics_fast.engine.threads import available_threads
from mics_fast.preparation import phantom
from mics_fast.preparation.dicom import is_dicom, read_dicom
from mics_fast.preparation.leaks import perceptual_hash
from mics_fast.preparation.options import PrepareOptions
from mics_fast.preparation.overlays import Overlays, find_overlays
from mics_fast.preparation.reports import Rejected
from mics_fast.preparation.sources import Candidate
from mics_fast.preparation.virtual_nbi import virtual_nbi

T = TypeVar("T")
R = TypeVar("R")

_DARK = 64  # a quarter of the grey levels
_SECONDS = 30  # between lines of progress where there is no terminal
_own = threading.local()  # the training decoder of each thread


@dataclass(frozen=True)
class Frame:
    """A decoded image.

    Args:
        pixels: (H, W, 3) uint8.
        dark: True if it has 16 bits per sample and uses less than a quarter of their range.
        foreign: True if training cannot read the file type, so the frame must be stored again.
    """

    pixels: np.ndarray
    dark: bool = False
    foreign: bool = False


@dataclass(frozen=True)
class Inspected:
    """A sample whose images have been decoded.

    Args:
        sample: with the files that training reads, without the broken ones.
        hashes: modality -> perceptual hash, for modalities that are not derived.
        rejected: broken files, each with the reason.
        dark: 16-bit files that use less than a quarter of their range.
        overlays: modality -> what a recorder has drawn on the frame, as training reads it.
    """

    sample: Candidate
    hashes: dict[str, np.ndarray]
    rejected: list[tuple[Path, str]] = field(default_factory=list)
    dark: list[Path] = field(default_factory=list)
    overlays: dict[str, Overlays] = field(default_factory=dict)


def make_phantom(out: Path, pairs: int, seed: int) -> list[Inspected]:
    """Render the phantom's pairs into ``out/wli`` and ``out/nbi``."""

    def render(index: int) -> Inspected:
        label, wli, nbi = phantom.render_pair(seed, index)
        name = f"{index:06d}"
        files = {"wli": out / "wli" / f"{name}.png", "nbi": out / "nbi" / f"{name}.png"}
        save(wli, files["wli"])
        save(nbi, files["nbi"])
        return Inspected(Candidate(name, label, files), {})

    return in_threads(render, range(pairs), "phantom")


def inspect(sample: Candidate, options: PrepareOptions) -> Inspected:
    """Decode every image of a sample once; check, crop, store, derive and hash it as asked."""
    frames, rejected = {}, []
    for name, path in sample.files.items():
        try:
            if options.to_shards and leads_outside(path, Path(options.source)):
                raise InputError(f"{path} leads outside the source by a link, which shards refuse")
            frames[name] = read_frame(path)
        except InputError as error:
            rejected.append((path, str(error)))
    files = {name: sample.files[name] for name in frames}
    dark = [files[name] for name, frame in frames.items() if frame.dark]
    checked = Candidate(sample.id, sample.label, files, sample.group, sample.split)
    pixels = {name: frame.pixels for name, frame in frames.items()}
    if options.crop_borders and pixels:
        # One box for all modalities, in fractions of the frame, keeps the pair registered.
        box = around(content_box(own) for own in pixels.values())
        pixels = {name: cut(own, box) for name, own in pixels.items()}
    if options.store_side:
        pixels = {name: shrink(own, options.store_side) for name, own in pixels.items()}
    hashes = {name: perceptual_hash(own) for name, own in pixels.items()}
    overlays = {name: find_overlays(own) for name, own in pixels.items()}
    again = bool(options.crop_borders or options.store_side)
    for name, own in pixels.items():
        if again or frames[name].foreign:
            store(own, name, checked, options.out, ".jpg" if again else ".png")
    if options.virtual_nbi and "wli" in pixels:
        store(virtual_nbi(pixels["wli"]), "nbi", checked, options.out, ".jpg")
        checked.virtual.append("nbi")
    return Inspected(checked, hashes, rejected, dark, overlays)


def read_frame(path: Path) -> Frame:
    """Decode an image and check that training reads the same pixels.

    Raises:
        InputError: it cannot be read or decoded, or the training decoder reads other pixels.
    """
    try:
        data = read_bytes(path)
        if is_dicom(data):
            return Frame(read_dicom(data), foreign=True)
        header = check_image(data)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except RefusedImage as error:
        raise InputError(f"{path} {error}") from None
    pixels = pixels_of(data, path)
    check_training_reads(data, pixels, path)
    return Frame(pixels, dark=header.bits == 16 and int(pixels.max()) < _DARK)


def check_training_reads(data: bytes, pixels: np.ndarray, path: Path) -> None:
    """Refuse an image that the training decoder reads differently by more than one grey level.

    Raises:
        InputError: names the file and the largest difference between the two decoders.
    """
    if not hasattr(_own, "decoder"):
        try:
            check_dali()
            _own.decoder = SingleDecoder(torch.device("cpu"), "dali")
        except InputError:  # without DALI, training decodes as ``pixels_of`` does
            _own.decoder = None
    if _own.decoder is None:
        return
    read = _own.decoder.pixels(np.frombuffer(data, np.uint8))
    if read is None:
        raise InputError(f"{path} cannot be decoded as an image by the decoder of training")
    differ = 255
    if read.shape == pixels.shape:
        differ = int((np.maximum(read, pixels) - np.minimum(read, pixels)).max())
    if differ > 1:
        raise InputError(
            f"{path} is read differently by the decoder of training (by up to {differ} of 255 grey "
            "levels), wanted another kind of file: convert it to PNG"
        )


def leads_outside(path: Path, source: Path) -> bool:
    """Return True if a link on the path of an image leads out of the source's folder."""
    root = Path(os.path.abspath(source if source.is_dir() else source.parent))
    place = Path(os.path.abspath(path))
    # A table may name images elsewhere; then links must stay inside the image's own folder.
    home = root if place.is_relative_to(root) else place.parent
    real = Path(os.path.realpath(place))  # of a loop of links, too
    return not real.is_relative_to(os.path.realpath(home))


def store(frame: np.ndarray, modality: str, sample: Candidate, out: Path, suffix: str) -> None:
    """Write a frame to ``out/<modality>`` and point the sample to it."""
    # An id from a table may hold ".." or begin with "/": it must not lead out of the folder.
    parts = [f"%{part}" if part in ("", ".", "..") else part for part in sample.id.split("/")]
    target = out / modality.replace("/", "%") / ("/".join(parts) + suffix)
    save(frame, target)
    sample.files[modality] = target


def in_threads(work: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """Apply ``work`` to all items in parallel, in order, and show progress."""
    pool = ThreadPoolExecutor(available_threads())
    try:
        return list(_progress(pool.map(work, items), title, len(items)))
    finally:  # on an error or Ctrl-C, start no further item
        pool.shutdown(cancel_futures=True)


def _progress(results: Iterator[R], title: str, count: int) -> Iterator[R]:
    """Yield the results; show a bar on a terminal, else a line on stderr every half minute."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(results, title, count, console=console)
        return
    said = time.monotonic()
    for number, result in enumerate(results, start=1):
        yield result
        if time.monotonic() - said > _SECONDS:
            said = time.monotonic()
            print(f"{title}: {number} of {count}", file=sys.stderr)


def keep_complete(
    found: Sequence[Inspected], modalities: Sequence[str], keep_orphans: bool
) -> tuple[list[Inspected], list[Rejected], list[Rejected]]:
    """Return the samples that become rows, the broken images and the images without a partner."""
    enough = 1 if keep_orphans else len(modalities)
    kept, broken, orphans = [], [], []
    for one in found:
        broken += [Rejected(one.sample.id, path, reason) for path, reason in one.rejected]
        if len(one.sample.files) >= enough:
            kept.append(one)
        else:
            missing = ", ".join(name for name in modalities if name not in one.sample.files).upper()
            reason = f"without a partner: no {missing} image that can be used"
            files = one.sample.files.values()
            orphans += [Rejected(one.sample.id, path, reason) for path in files]
    return kept, broken, orphans


def hold_out(
    found: Sequence[Inspected], name: str | None
) -> tuple[list[Inspected], list[Inspected]]:
    """Separate the samples of one class from the others.

    Returns:
        The other samples, and the samples of the class ``name``.

    Raises:
        InputError: no sample is of that class, or all are.
    """
    if name is None:
        return list(found), []
    kept = [one for one in found if one.sample.label != name]
    apart = [one for one in found if one.sample.label == name]
    if not kept or not apart:
        classes = ", ".join(sorted({one.sample.label for one in found} - {""}))
        raise InputError(f"--hold-out is {name}, wanted one of several classes, there: {classes}")
    return kept, apart
