"""Names are data: no terminal obeys them, and no spreadsheet executes them."""

from __future__ import annotations

import csv

import pytest

from mics_fast.common.errors import InputError, warn
from mics_fast.common.files import inert_cell, restored_cell, write_csv
from mics_fast.data.image_files import ImageFiles
from mics_fast.data.manifest import read_manifest, write_manifest
from mics_fast.data.tables import read_table
from mics_fast.preparation.reports import print_summary

ESCAPE = "\x1b[2J"


def test_a_warning_is_one_line_that_no_terminal_obeys(capsys):
    warn(f"polyp{ESCAPE}\nlesion \x9b31m")
    assert capsys.readouterr().err == "polyp?[2J lesion ?31m\n"


def test_the_name_of_a_bad_file_reaches_the_terminal_as_text(capsys):
    files = ImageFiles("skip", "cpu", "dali")
    files.skip([f"/data/{ESCAPE}.png cannot be read"])
    assert capsys.readouterr().err == "skipped: /data/?[2J.png cannot be read\n"


def test_the_summary_shows_names_as_text(capsys):
    record = {"label": f"polyp {ESCAPE}[b]", "split": "train", "labelled": "1", "virtual": ""}
    name = f"wli{ESCAPE}[/b]"
    print_summary([{**record, name: "x.png"}, {**record, name: ""}], [name])
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out.lower() and "[2j" not in out.replace("?[2J", "").lower()
    assert "[b]" in out and "[/B]" in out


def test_control_characters_in_the_name_of_a_column_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text(f"id,wli{ESCAPE}\n1,a.png\n")
    with pytest.raises(InputError, match="wanted no control characters") as error:
        read_table(tmp_path / "x.csv", "table x.csv")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n=", "＝", "＋", "－", "＠"])
def test_what_begins_like_a_formula_is_written_inert(tmp_path, start):
    name = f"{start}HYPERLINK(1)"
    assert inert_cell(name) == f"'{name}" and restored_cell(inert_cell(name)) == name
    write_csv(tmp_path / "x.csv", [{name: name}], exact=True)
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [[f"'{name}"], [f"'{name}"]]


def test_a_table_for_people_holds_no_control_characters(tmp_path):
    write_csv(tmp_path / "x.csv", [{f"a{ESCAPE}": f"b\n{ESCAPE}\x9b", "n": 1.5}])
    assert (tmp_path / "x.csv").read_bytes() == b"a?[2J,n\r\nb??[2J?,1.5\r\n"


def test_a_modality_like_a_formula_is_written_inert_and_read_back(tmp_path):
    record = {"id": "1", "label": "a", "labelled": "1", "group": "", "split": "train"}
    write_manifest(tmp_path / "m.csv", [{**record, "virtual": "", "=wli": "a.png"}], ["=wli"])
    assert (tmp_path / "m.csv").read_text().splitlines()[0].endswith(",'=wli")
    assert read_manifest(tmp_path / "m.csv", files_exist=False).modalities == ("=wli",)


def test_two_modalities_of_one_name_for_a_spreadsheet_are_refused(tmp_path):
    (tmp_path / "m.csv").write_text(
        "id,label,labelled,group,split,virtual,'=wli,=wli\n1,a,1,,train,,a.png,b.png\n"
    )
    with pytest.raises(InputError, match="two columns of one name"):
        read_manifest(tmp_path / "m.csv", files_exist=False)
