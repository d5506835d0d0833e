"""The commands of the page on public data sets, on layouts imitated with generated images."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mics_fast import prepare
from mics_fast.data.manifest import read_manifest
from mics_fast.preparation.phantom import render_pair

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "datasets.md").read_text()
SCRIPT = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = re.findall(r"-m mics_fast\.prepare ((?:[^\n]*\\\n)*[^\n]*)", PAGE)
COMMANDS = {words[0]: words for words in (shlex.split(x.replace("\\\n", " ")) for x in LINES)}
SPLITS = ["train"] * 6 + ["val"] * 2 + ["test"] * 4


def paint(folder: Path, name: str, number: int, frame: int) -> str:
    """Store a frame of the phantom, 1 = WLI or 2 = NBI; its name."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render_pair(0, number)[frame]).save(folder / name)
    return name


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_kvasir(folder: Path) -> None:
    for number in range(12):
        name = f"{('polyps', 'esophagitis')[number % 2]}/{number}.jpg"
        paint(folder / "kvasir-dataset-v2", name, number, 1)


def make_piccolo(folder: Path) -> None:
    own = folder / "piccolo"
    rows = [
        {
            "wli": paint(own, f"frames/{number}.png", number, 1),
            "nbi": paint(own, f"frames/{number}n.png", number, 2) if number % 4 else "",
            "diagnosis": ("adenoma", "hyperplasia")[number % 2],
            "patient": f"{number:03}",
            "split": split,
        }
        for number, split in enumerate(SPLITS)
    ]
    write(own / "pairs.csv", rows)


def make_derm7pt(folder: Path) -> None:
    own = folder / "release_v0"
    diagnoses = ["melanoma (in situ)", "clark nevus"]
    rows = [
        {
            "case_num": str(number + 1),
            "diagnosis": diagnoses[number % 2],
            "clinic": paint(own / "images", f"NEL/c{number}.jpg", number, 1),
            "derm": paint(own / "images", f"NEL/d{number}.jpg", number, 2),
        }
        for number in range(len(SPLITS))
    ]
    write(own / "meta" / "meta.csv", rows)
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        lines = [{"indexes": str(at)} for at, own_split in enumerate(SPLITS) if own_split == split]
        write(own / "meta" / f"{name}_indexes.csv", lines)
    assert SCRIPT is not None
    exec(compile(SCRIPT[1], "datasets.md", "exec"), {})


def make_archive(folder: Path) -> None:
    own = folder / "archive"
    rows = [
        {
            "white": paint(own, f"{number}w.png", number, 1),
            "narrow": paint(own, f"{number}n.png", number, 2),
            "finding": ("a", "b")[number % 2],
            "patient": str(number),
        }
        for number in range(12)
    ]
    write(own / "cases.csv", rows)


@pytest.mark.parametrize(
    ("source", "make", "modalities", "official"),
    [
        ("kvasir-dataset-v2", make_kvasir, ("wli", "nbi"), False),
        ("piccolo/pairs.csv", make_piccolo, ("wli", "nbi"), True),
        ("release_v0/pairs.csv", make_derm7pt, ("clinic", "derm"), True),
        ("archive/cases.csv", make_archive, ("wli", "nbi"), False),
    ],
    ids=["Kvasir", "PICCOLO", "derm7pt", "own archive"],
)
def test_the_command_makes_a_manifest(source, make, modalities, official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    prepare.main(COMMANDS[source])
    out = COMMANDS[source][COMMANDS[source].index("--out") + 1]
    manifest = read_manifest(Path(out) / "manifest.csv")
    assert manifest.modalities == modalities and len(manifest.rows) == 12
    if official:
        assert sorted(row.split for row in manifest.rows) == sorted(SPLITS)


def test_every_command_of_the_page_is_tried():
    assert len(COMMANDS) == 4
