"""Mutated tables and images: a sentence, a rejected row, or what was there, but never a traceback.

Each test runs for ``MICS_FUZZ_SECONDS`` (default: 3).
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import RESERVED, read_manifest
from mics_fast.data.manifest_checks import check_manifest
from mics_fast.data.tables import read_table
from mics_fast.options import DataConfig
from tests.mics_fast.data.loading import evaluate, row
from tests.mics_fast.mutated_images import IMAGES
from tests.mics_fast.mutation import draws, mutated
from tests.mics_fast.preparation.preparing import rejected, run

TABLE = "\n".join(
    [
        ",".join((*RESERVED, "wli", "nbi")),
        "one,polyp,1,g,train,nbi,a.png,b.png",
        'two,"ulcer, flat",0,,val,,a.png,',
        "1.2.840,,0,g,test,,,b.png",
    ]
)
PIECES = [b"", b",", b";", b"\t", b'"', b"\n", b"\r", b"\0", b"\xff", "\ufeff".encode(), b"'=",
          b"id", b"train", b"Polyp", b" polyp", b"1", b"../../a.png", b"x.tar/y.png", b"9" * 400,
          b"," * 50, "\u202e".encode(), "\ud7ff".encode(), b"[/b]"]  # fmt: skip


OPTIONS = [
    (),
    ("--virtual-nbi",),
    ("--store-side", "32"),
    ("--to-shards", "4"),
    ("--crop-borders",),
]


def one_sentence(error, path):
    assert "\n" not in str(error) and str(path) in str(error), repr(str(error))


def test_a_mutated_manifest_is_read_or_refused_in_one_sentence(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not read")
    path = tmp_path / "manifest.csv"
    for draw in draws():
        path.write_bytes(mutated(draw, TABLE.encode(), PIECES))
        try:
            manifest = read_manifest(path, files_exist=draw.random() < 0.5)
            manifest.digest()
            check_manifest(manifest)
        except InputError as error:
            one_sentence(error, path)


def test_any_table_that_can_be_written_is_read_back(tmp_path):
    path = tmp_path / "table.csv"
    letters = ["a", "=", "'", ",", ";", '"', "\n", " x", "é", "[", "\t"]
    for draw in draws():
        header = [f"column {k}" for k in range(draw.randint(2, 5))]
        cells = [
            ["".join(draw.choices(letters, k=draw.randint(0, 5))) for _ in header] for _ in range(3)
        ]
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *cells])
        found = [list(record.values()) for _, record in read_table(path, "table").lines]
        assert found == [[cell.strip() for cell in line] for line in cells]


def test_mutated_images_become_rejected_rows(tmp_path):
    """Ten images at a time, one of them whole: its row is always there."""
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for round_, draw in enumerate(draws()):
        for number in range(9):
            content = mutated(draw, draw.choice(IMAGES))
            (folder / f"{number}.png").write_bytes(content)
        (folder / "whole.png").write_bytes(IMAGES[2])
        out = tmp_path / f"out{round_ % 2}"
        run(tmp_path / "in", "--out", out, *draw.choice(OPTIONS))
        rows = {own.id for own in read_manifest(out / "manifest.csv").rows}
        assert "a/whole" in rows
        lines = rejected(out) if (out / "rejected.csv").exists() else []
        assert rows | {line["id"] for line in lines} == {
            "a/whole", *(f"a/{number}" for number in range(9))
        }  # fmt: skip


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_mutated_images_reach_the_loaders_as_pixels_or_one_sentence(tmp_path, policy):
    whole = tmp_path / "whole.png"
    whole.write_bytes(IMAGES[2])
    for draw in draws():
        path = Path(tmp_path / "mutated.png")
        path.write_bytes(mutated(draw, draw.choice(IMAGES)))
        data = DataConfig(on_bad_file=policy, threads=1)
        try:
            batches = list(evaluate([row(0, whole, path)], data=data))
        except InputError as error:
            assert policy == "error"
            one_sentence(error, path)
        else:
            (batch,) = batches
            assert batch.present[0, 0] and np.isfinite(batch.views["nbi"].numpy()).all()
