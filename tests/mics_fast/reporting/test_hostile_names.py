"""Names that are markup, formulas or escape sequences stay names in everything a run puts out."""

from __future__ import annotations

import csv

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mics_fast import evaluate, predict, report, train

NAMES = ["<script>x</script>", "[link=x]y[/link]", "[/b]", "=HYPERLINK(1)", "\x1b[2Jx", "`| a|b"]


@pytest.fixture(scope="module")
def outputs(phantom_manifest, few_steps, tmp_path_factory):
    """The folder of a run on hostile names, with a table of answers and a report."""
    folder = tmp_path_factory.mktemp("hostile")
    with open(phantom_manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    for number, row in enumerate(rows):
        row["label"] = NAMES[classes.index(row["label"])]
        row["id"] = f"{NAMES[number % len(NAMES)]}{number}"
        row |= {name: str(phantom_manifest.parent / row[name]) for name in ("wli", "nbi")}
    manifest = folder / "manifest.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run = str(folder / "run")
    train.main([*few_steps, "--data.manifest", str(manifest), "--out", run])
    predict.main([run, "--manifest", str(manifest), "--csv", str(folder / "answers.csv")])
    report.main([run, "--resamples", "3", "--out", str(folder / "report.html")])
    return folder


def test_the_page_shows_markup_as_text(outputs):
    page = (outputs / "report.html").read_text()
    assert "<script>x" not in page and "&lt;script&gt;x" in page and "\x1b" not in page


def test_no_cell_of_the_table_is_a_formula(outputs):
    with open(outputs / "answers.csv", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert any(cell.startswith("'=HYPERLINK(1)") for cell in cells)
    assert not any(cell.startswith(("=", "+", "@")) or "\x1b" in cell for cell in cells)


def test_events_are_of_plain_names(outputs):
    events = EventAccumulator(str(outputs / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert tags and not any(mark in tag for tag in tags for mark in "<[=`\x1b")


def test_the_terminal_shows_names_and_obeys_none(outputs, capsys):
    evaluate.main([str(outputs / "run"), "--resamples", "3"])
    predict.main([str(outputs / "run"), "--manifest", str(outputs / "manifest.csv")])
    shown = capsys.readouterr()
    assert "\x1b[2J" not in shown.out + shown.err and "[link=x]y[/link]" in shown.out
