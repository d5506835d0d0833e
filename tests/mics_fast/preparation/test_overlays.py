"""Burned-in text and boxes of the recorder are found; tissue, borders and highlights are not."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mics_fast.preparation.overlays import find_overlays, overlay_warnings
from tests.mics_fast.preparation.preparing import run, scenery

GREEN = (10, 160, 130)


def frame(seed=0, *, text="", box=None, highlights=0):
    """An endoscopic frame: tissue in a circle on noisy black, and what is drawn on it."""
    width, height = 640, 512
    tissue = np.asarray(scenery(seed, height, width)) // 2 + np.array([90, 40, 30])
    y, x = np.mgrid[:height, :width]
    inside = (x - 370) ** 2 + (y - 256) ** 2 < 250**2
    noise = np.random.default_rng(seed).integers(0, 16, (height, width, 3))
    image = Image.fromarray(
        np.where(inside[..., None], tissue, noise).clip(0, 255).astype(np.uint8)
    )
    draw = ImageDraw.Draw(image)
    if text:
        draw.multiline_text((12, 60), text, fill="white", font=ImageFont.load_default(16))
    if box:
        draw.rectangle((15, 360, 180, 490), fill=box)
    for number in range(highlights):
        left, top = 200 + 37 * number % 300, 120 + 53 * number % 250
        draw.ellipse((left, top, left + 5, top + 4), fill="white")
    return np.asarray(image)


def test_a_date_in_the_border_is_text():
    assert find_overlays(frame(text="01/02/2014\n13:45:10\nCVP: A1")).text


@pytest.mark.parametrize("seed", range(5))
def test_tissue_its_edge_and_highlights_are_no_text(seed):
    assert not find_overlays(frame(seed, highlights=40)).text


def test_a_green_box_is_found_in_its_corner_and_black_is_none():
    found = find_overlays(frame(box=GREEN))
    assert set(found.corners) == {"bottom left"}
    assert all(abs(a - b) < 16 for a, b in zip(found.corners["bottom left"], GREEN, strict=True))
    assert find_overlays(frame()).corners == {}


def test_a_box_is_reported_where_three_frames_share_it():
    boxed = [(f"f{seed}", find_overlays(frame(seed, box=GREEN))) for seed in range(3)]
    plain = [(f"p{seed}", find_overlays(frame(seed))) for seed in range(3)]
    assert overlay_warnings([*boxed[:2], *plain]) == []
    (warning,) = overlay_warnings([*plain, *boxed])
    assert "3 of 6 frames have the same colour in the bottom left corner, such as f0" in warning


def test_prepare_warns_of_text_and_names_a_frame(tmp_path, capsys):
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for seed in range(4):
            text = "01/02/2014\n13:45:10\nCVP: A1" if label == "a" else ""
            Image.fromarray(frame(seed, text=text)).save(tmp_path / "in" / label / f"{seed}.png")
    run(tmp_path / "in", "--out", tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of 8 frames seem to have text in their border, such as a/0, WLI" in said


def table(tmp_path, column, values):
    """A table of eight frames with one more column."""
    rows = []
    for number, value in enumerate(values):
        scenery(number).save(tmp_path / f"{number}.png")
        rows.append({"file": f"{number}.png", "label": "ab"[number % 2], column: value})
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "t.csv"


def test_a_column_that_names_patients_asks_for_groups(tmp_path, capsys):
    source = table(tmp_path, "Patient_ID", [f"p{number // 2}" for number in range(8)])
    arguments = [
        source,
        "--out",
        tmp_path / "out",
        "--column",
        "wli=file",
        "--label-column",
        "label",
    ]
    run(*arguments)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Patient_ID seems to name patients or lesions (4 in 8 rows): --group-column Patient_ID"
        in (said)
    )
    run(*arguments, "--group-column", "Patient_ID")
    assert "seems to name" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "values"),
    [("Patient_ID", [f"p{number}" for number in range(8)]), ("Patient_ID", ["p"] * 8),
     ("device", ["x", "y"] * 4)],
)  # fmt: skip
def test_a_column_that_groups_nothing_asks_for_nothing(tmp_path, capsys, column, values):
    source = table(tmp_path, column, values)
    run(source, "--out", tmp_path / "out", "--column", "wli=file", "--label-column", "label")
    assert "seems to name" not in capsys.readouterr().out
