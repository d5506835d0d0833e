"""A file is whole or it is not there."""

from __future__ import annotations

import os

import pytest

from mics_fast.common.errors import InputError
from mics_fast.common.files import read_json, renamed, whole_file


@pytest.mark.parametrize("writer", [renamed, whole_file])
def test_what_fails_half_way_leaves_the_file_of_before_and_nothing_else(tmp_path, writer):
    file = tmp_path / "list.csv"
    file.write_text("before")
    with pytest.raises(ValueError, match="half way"), writer(file) as where:
        where.write_text("after") if writer is renamed else where.write("after")
        raise ValueError("half way")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "before"


def test_what_is_written_under_the_temporary_name_gets_the_file_s(tmp_path):
    with renamed(tmp_path / "sheet.png") as partial:
        assert partial.suffix == ".png" and partial.parent == tmp_path
        partial.write_text("all of it")
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_a_link_where_a_temporary_file_might_go_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".partial-report.html").symlink_to(victim)
    with whole_file(tmp_path / "report.html") as handle:
        handle.write("page")
    assert victim.read_text() == "mine"


def test_a_link_under_the_file_s_own_name_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "report.html").symlink_to(victim)
    with whole_file(tmp_path / "report.html") as handle:
        handle.write("page")
    assert victim.read_text() == "mine" and not (tmp_path / "report.html").is_symlink()


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(10):
        with renamed(tmp_path / "a.csv") as partial:
            names.add(partial.name)
    assert len(names) == 10 and all(len(name) > 24 for name in names)


def test_what_is_written_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        with whole_file(tmp_path / "patients.csv") as handle:
            handle.write("name")
    finally:
        os.umask(before)
    assert (tmp_path / "patients.csv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5000, '"' + "x" * 2**20 + '"'])
def test_what_is_no_small_json_is_one_sentence(tmp_path, text):
    file = tmp_path / "best.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"best\.json (is no JSON|holds more than)"):
        read_json(file)
