"""A file is whole or it is not there."""

from __future__ import annotations

import pytest

from mics_fast.common.files import renamed, whole_file


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
