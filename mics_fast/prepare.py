"""``python -m mics_fast.prepare``: from a folder of images, or the phantom, to a manifest."""

from __future__ import annotations

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mics_fast.data import phantom
from mics_fast.data.manifest import SPLITS, write_manifest
from mics_fast.data.splits import label_rows, split_rows
from mics_fast.data.virtual_nbi import virtual_nbi
from mics_fast.errors import InputError, run_command

T = TypeVar("T")
R = TypeVar("R")

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass
class Sample:
    """One row of the manifest to be.

    Args:
        id: unique text.
        label: class name.
        files: modality -> image.
        virtual: modalities that are derived from another.
    """

    id: str
    label: str
    files: dict[str, Path]
    virtual: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Find or make the images, check every one, split the rows, write the manifest."""
    options = parse(arguments)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        samples, orphans = find_samples(options)
        write_rows(samples, options)
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from None
    if orphans:
        print(f"left out, without a partner of the same name: {len(orphans)} images")
        for path in orphans[:10]:
            print(f"  {path}")
    print(f"wrote {out / 'manifest.csv'}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: an option is unknown, ill-typed or out of range.
    """
    parser = SentenceParser(prog="python -m mics_fast.prepare", description=__doc__)
    parser.add_argument("source", help="folder of images, or the word phantom")
    parser.add_argument("--out", type=Path, required=True, help="folder for manifest.csv")
    parser.add_argument("--virtual-nbi", action="store_true", help="derive NBI from WLI frames")
    parser.add_argument("--label-fraction", type=float, default=0.05, help="of the train rows")
    parser.add_argument("--split", type=float, nargs=3, default=(0.7, 0.1, 0.2), metavar="X",
                        help="fractions of train, val and test rows")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of split, labels and phantom")
    parser.add_argument("--pairs", type=int, default=600, help="of the phantom")
    options = parser.parse_args(arguments)
    if not 0 < options.label_fraction <= 1:
        raise InputError(
            f"--label-fraction is {options.label_fraction}, wanted above 0 and up to 1"
        )
    if min(options.split) < 0 or options.split[0] == 0 or abs(sum(options.split) - 1) > 1e-6:
        raise InputError(f"--split is {options.split}, wanted three fractions that sum to 1")
    if options.seed < 0 or options.pairs < 1:
        raise InputError("--seed must be at least 0 and --pairs at least 1")
    return options


class SentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def find_samples(options: argparse.Namespace) -> tuple[list[Sample], list[Path]]:
    """Samples of the source, every image decoded once; and the images that have no partner."""
    if options.source == "phantom":
        return make_phantom(options.out, options.pairs, options.seed), []
    source = Path(options.source)
    if not source.is_dir():
        raise InputError(f"source {source} is not a folder")
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    paired = [path for path in folders if path.name.endswith(("_WLI", "_NBI"))]
    if paired:
        samples, orphans = match_pairs(paired)
    else:
        samples, orphans = (
            [
                Sample(f"{folder.name}/{path.stem}", folder.name, {"wli": path})
                for folder in folders
                for path in images_of(folder)
            ],
            [],
        )
    if not samples:
        raise InputError(
            f"source {source} holds no images in <class>/ or in <class>_WLI/ and <class>_NBI/ "
            f"(of the kinds {', '.join(sorted(SUFFIXES))})"
        )
    if options.virtual_nbi:
        if paired:
            raise InputError(f"--virtual-nbi is for WLI frames alone, but {source} has NBI folders")
        in_threads(lambda sample: add_virtual_nbi(sample, options.out), samples, "virtual NBI")
    else:
        in_threads(
            lambda sample: [decode(path) for path in sample.files.values()], samples, "checking"
        )
    return samples, orphans


def match_pairs(folders: Sequence[Path]) -> tuple[list[Sample], list[Path]]:
    """Pair the images of ``<class>_WLI`` and ``<class>_NBI`` that have the same stem."""
    by_class: dict[str, dict[str, dict[str, Path]]] = {}
    for folder in folders:
        label, modality = folder.name[:-4], folder.name[-3:].lower()
        stems = {path.stem: path for path in images_of(folder)}
        by_class.setdefault(label, {"wli": {}, "nbi": {}})[modality] = stems
    samples, orphans = [], []
    for label, modalities in sorted(by_class.items()):
        wli, nbi = modalities["wli"], modalities["nbi"]
        for stem in sorted(wli.keys() & nbi.keys()):
            files = {"wli": wli[stem], "nbi": nbi[stem]}
            samples.append(Sample(f"{label}/{stem}", label, files))
        orphans += [path for own in (wli, nbi) for stem, path in own.items()
                    if stem not in wli.keys() & nbi.keys()]  # fmt: skip
    return samples, sorted(orphans)


def images_of(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name.

    Raises:
        InputError: two of them differ in their suffix alone.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for name, count in Counter(path.stem for path in files).items():
        if count > 1:
            raise InputError(f"{folder} holds {count} images named {name}, wanted one")
    return files


def decode(path: Path) -> np.ndarray:
    """The image as (H, W, 3) uint8, after a full decode.

    Raises:
        InputError: the file is no image, or a broken one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be decoded as an image: {error}") from None


def add_virtual_nbi(sample: Sample, out: Path) -> None:
    """Render the second modality of a white-light frame below ``out/nbi``."""
    target = out / "nbi" / sample.label / f"{sample.files['wli'].stem}.jpg"
    save(virtual_nbi(decode(sample.files["wli"])), target)
    sample.files["nbi"] = target
    sample.virtual.append("nbi")


def make_phantom(out: Path, pairs: int, seed: int) -> list[Sample]:
    """Render the phantom's pairs below ``out/wli`` and ``out/nbi``."""

    def render(index: int) -> Sample:
        label, wli, nbi = phantom.render_pair(seed, index)
        name = f"{index:06d}"
        files = {"wli": out / "wli" / f"{name}.png", "nbi": out / "nbi" / f"{name}.png"}
        save(wli, files["wli"])
        save(nbi, files["nbi"])
        return Sample(name, label, files)

    return in_threads(render, range(pairs), "phantom")


def save(image: np.ndarray, target: Path) -> None:
    """Write an image (JPEG at quality 95) under a temporary name, then rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")
    Image.fromarray(image).save(partial, quality=95)
    partial.replace(target)


def in_threads(work: Callable[[T], R], items: Iterable[T], title: str) -> list[R]:
    """Apply ``work`` to all items, in order, with a progress bar on a terminal."""
    items = list(items)
    console = Console(stderr=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(work, items)
        return list(
            track(results, title, len(items), console=console, disable=not console.is_terminal)
        )


def write_rows(samples: Sequence[Sample], options: argparse.Namespace) -> None:
    """Split the samples, choose the labelled ones, write the manifest and print a summary."""
    labels = [sample.label for sample in samples]
    groups = [""] * len(samples)
    splits = split_rows(labels, groups, options.split, options.seed)
    train = [row for row, split in enumerate(splits) if split == "train"]
    chosen = label_rows(
        [labels[row] for row in train],
        [groups[row] for row in train],
        options.label_fraction,
        options.seed,
    )
    labelled = {row for row, keeps in zip(train, chosen, strict=True) if keeps}
    modalities = list(dict.fromkeys(name for sample in samples for name in sample.files))
    records = [
        {
            "id": sample.id,
            "label": sample.label,
            "labelled": str(int(row in labelled)),
            "group": groups[row],
            "split": splits[row],
            "virtual": " ".join(sample.virtual),
            **{name: os.path.relpath(path, options.out) for name, path in sample.files.items()},
        }
        for row, sample in enumerate(samples)
    ]
    write_manifest(options.out / "manifest.csv", records, modalities)
    print_summary(records, modalities)


def print_summary(records: Sequence[dict[str, str]], modalities: Sequence[str]) -> None:
    """Classes x splits, labelled train rows, and which modalities there are."""
    table = Table(title=f"{len(records)} samples")
    for name in ("class", *SPLITS, "labelled"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for label in sorted({record["label"] for record in records}):
        mine = [record for record in records if record["label"] == label]
        counts = Counter(record["split"] for record in mine)
        labelled = sum(record["labelled"] == "1" for record in mine)
        table.add_row(label, *(str(counts[split]) for split in SPLITS), str(labelled))
    Console().print(table)
    virtual = {name for record in records for name in record["virtual"].split()}
    shown = [f"virtual {name.upper()}" if name in virtual else name.upper() for name in modalities]
    print(f"modalities: {', '.join(shown)}")


if __name__ == "__main__":
    run_command(main)
