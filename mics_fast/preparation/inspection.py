"""Images of ``prepare``: each is decoded once and checked, cropped, stored, hashed in one pass.

``options`` is the command line of ``prepare``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from mics_fast.common.errors import InputError
from mics_fast.data.images import around, content_box, cut, decode, save, shrink
from mics_fast.preparation import phantom
from mics_fast.preparation.leaks import perceptual_hash
from mics_fast.preparation.reports import report_rejected
from mics_fast.preparation.sources import Sample
from mics_fast.preparation.virtual_nbi import virtual_nbi

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Inspected:
    """A sample after its images have been decoded.

    Args:
        sample: with the files that training is to read; broken ones are gone.
        hashes: modality -> perceptual hash; none of a modality that is derived.
        rejected: broken file and what is wrong with it.
    """

    sample: Sample
    hashes: dict[str, np.ndarray]
    rejected: list[tuple[Path, str]]


def make_phantom(out: Path, pairs: int, seed: int) -> list[Inspected]:
    """Render the phantom's pairs below ``out/wli`` and ``out/nbi``."""

    def render(index: int) -> Inspected:
        label, wli, nbi = phantom.render_pair(seed, index)
        name = f"{index:06d}"
        files = {"wli": out / "wli" / f"{name}.png", "nbi": out / "nbi" / f"{name}.png"}
        save(wli, files["wli"])
        save(nbi, files["nbi"])
        return Inspected(Sample(name, label, files), {}, [])

    return in_threads(render, range(pairs), "phantom")


def inspect(sample: Sample, options: argparse.Namespace) -> Inspected:
    """Decode every image of a sample once, and make of it whatever the options ask for."""
    frames, rejected = {}, []
    for name, path in sample.files.items():
        try:
            frames[name] = decode(path)
        except InputError as error:
            rejected.append((path, str(error)))
    files = {name: sample.files[name] for name in frames}
    checked = Sample(sample.id, sample.label, files, sample.group)
    if options.crop_borders and frames:
        # One box for all modalities, in fractions of the frame: a pair stays registered.
        box = around(content_box(frame) for frame in frames.values())
        frames = {name: cut(frame, box) for name, frame in frames.items()}
    if options.store_side:
        frames = {name: shrink(frame, options.store_side) for name, frame in frames.items()}
    hashes = {name: perceptual_hash(frame) for name, frame in frames.items()}
    if options.crop_borders or options.store_side:
        for name, frame in frames.items():
            store(frame, name, checked, options.out)
    if options.virtual_nbi and "wli" in frames:
        store(virtual_nbi(frames["wli"]), "nbi", checked, options.out)
        checked.virtual.append("nbi")
    return Inspected(checked, hashes, rejected)


def store(frame: np.ndarray, modality: str, sample: Sample, out: Path) -> None:
    """Write a frame below ``out/<modality>`` and let the sample refer to it."""
    target = out / modality / f"{sample.id}.jpg"
    save(frame, target)
    sample.files[modality] = target


def in_threads(work: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """Apply ``work`` to all items, in order, with a progress bar on a terminal."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(work, items)
        return list(
            track(results, title, len(items), console=console, disable=not console.is_terminal)
        )


def keep_complete(
    found: Sequence[Inspected], modalities: Sequence[str], options: argparse.Namespace
) -> list[Inspected]:
    """The samples that become rows; what does not is listed in ``rejected.csv`` with its reason.

    Raises:
        InputError: nothing is left.
    """
    enough = 1 if options.keep_orphans else len(modalities)
    kept, broken, orphans = [], [], []
    for one in found:
        broken += [(one.sample.id, path, reason) for path, reason in one.rejected]
        if len(one.sample.files) >= enough:
            kept.append(one)
        else:
            missing = ", ".join(name for name in modalities if name not in one.sample.files).upper()
            reason = f"without a partner: no {missing} image that can be used"
            orphans += [(one.sample.id, path, reason) for path in one.sample.files.values()]
    report_rejected(broken, orphans, options.out / "rejected.csv")
    if not kept:
        raise InputError(
            f"source {options.source} has no sample left, wanted one with all of its images; "
            f"{options.out / 'rejected.csv'} says what is wrong"
        )
    return kept


def hold_out(
    found: Sequence[Inspected], name: str | None
) -> tuple[list[Inspected], list[Inspected]]:
    """The samples of all classes but the one that is to be held out, and those of that one.

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
