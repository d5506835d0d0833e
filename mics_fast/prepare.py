"""``python -m mics_fast.prepare``: from a folder of images, or the phantom, to a manifest."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mics_fast.data import phantom
from mics_fast.data.manifest import SPLITS, write_manifest
from mics_fast.data.splits import label_rows, split_rows
from mics_fast.data.virtual_nbi import virtual_nbi
from mics_fast.errors import InputError, SentenceParser, run_command

T = TypeVar("T")
R = TypeVar("R")

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # whatever the suffix; what training decodes


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
    except UnicodeEncodeError as error:
        raise InputError(f"file name {error.object!r} is not UTF-8, wanted one that is") from None
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
    split = options.split
    if not (min(split) >= 0 and split[0] > 0 and abs(sum(split) - 1) < 1e-6):
        raise InputError(f"--split is {options.split}, wanted three fractions that sum to 1")
    if options.source == "phantom" and options.virtual_nbi:
        raise InputError("--virtual-nbi is for WLI frames alone, but the phantom has NBI")
    if options.seed < 0 or options.pairs < 1:
        raise InputError("--seed must be at least 0 and --pairs at least 1")
    return options


def find_samples(options: argparse.Namespace) -> tuple[list[Sample], list[Path]]:
    """Samples of the source, every image decoded once; and the images that have no partner."""
    if options.source == "phantom":
        return make_phantom(options.out, options.pairs, options.seed), []
    source = Path(options.source)
    if not source.is_dir():
        raise InputError(f"source {source} is not a folder")
    paired, single = class_folders(source, options.out)
    if paired:
        samples, orphans = match_pairs(paired)
    else:
        samples, orphans = (
            [
                Sample(f"{folder.name}/{path.stem}", folder.name, {"wli": path})
                for folder in single
                for path in images_of(folder)
            ],
            [],
        )
    if not samples:
        raise InputError(f"source {source} has no WLI and NBI image of the same name")
    if options.virtual_nbi:
        if paired:
            raise InputError(f"--virtual-nbi is for WLI frames alone, but {source} has NBI folders")
        in_threads(lambda sample: add_virtual_nbi(sample, options.out), samples, "virtual NBI")
    else:
        in_threads(check_images, samples, "checking")
    return samples, orphans


def class_folders(source: Path, out: Path) -> tuple[list[Path], list[Path]]:
    """The folders of a source: those of the pair layout, or those of the one-modality layout.

    Raises:
        InputError: there is none, there are both, one holds no image, or one has no partner.
    """
    written = (out.resolve(), (out / "nbi").resolve())  # by an earlier run
    folders = sorted(
        path
        for path in source.iterdir()
        if path.is_dir() and not path.name.startswith(".")
        if path.resolve() not in written or images_of(path)
    )
    paired = [path for path in folders if path.name.endswith(("_WLI", "_NBI"))]
    single = [path for path in folders if path not in paired]
    if not folders:
        raise InputError(
            f"source {source} has no folder, wanted <class>/ or <class>_WLI/ and <class>_NBI/"
        )
    if paired and single:
        raise InputError(
            f"source {source} holds {paired[0].name} and {single[0].name}, wanted pairs of folders "
            "or single folders, not both"
        )
    for folder in folders:
        if not images_of(folder):
            kinds = ", ".join(sorted(SUFFIXES))
            raise InputError(f"{folder} holds no image, wanted files that end in {kinds}")
    for folder in paired:
        other = folder.name[:-3] + ("NBI" if folder.name.endswith("WLI") else "WLI")
        if not (source / other).is_dir():
            raise InputError(f"{folder} has no partner, wanted {other} beside it")
    return paired, single


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
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    for name, count in Counter(path.stem for path in files).items():
        if count > 1:
            raise InputError(f"{folder} holds {count} images named {name}, wanted one")
    return files


def decode(path: Path) -> np.ndarray:
    """The image as (H, W, 3) uint8, upright, after a full decode.

    Raises:
        InputError: the file is no image, or a broken one.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)  # as the image pipeline does
            if upright.mode.startswith("I"):  # 16 bits, which convert() would clip
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))
    except UnidentifiedImageError:
        raise InputError(f"{path} is no image, or none of {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be decoded as an image: {error}") from None


def check_images(sample: Sample) -> None:
    """Decode every image of a sample once; nothing is kept."""
    for path in sample.files.values():
        decode(path)


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
    """Write an image under a temporary name, then rename it; JPEG in full chroma, for vessels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")
    Image.fromarray(image).save(partial, quality=95, subsampling=0)
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
    # Resolved: "out/.." is not the parent of a folder that is reached through a link.
    out = options.out.resolve()
    modalities = list(dict.fromkeys(name for sample in samples for name in sample.files))
    records = [
        {
            "id": sample.id,
            "label": sample.label,
            "labelled": str(int(row in labelled)),
            "group": groups[row],
            "split": splits[row],
            "virtual": " ".join(sample.virtual),
            **{name: relative(path, out) for name, path in sample.files.items()},
        }
        for row, sample in enumerate(samples)
    ]
    write_manifest(options.out / "manifest.csv", records, modalities)
    print_summary(records, modalities)


def relative(file: Path, folder: Path) -> str:
    """The way from a resolved folder to a file, whose own name may be a link."""
    return os.path.relpath(file.parent.resolve() / file.name, folder)


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
