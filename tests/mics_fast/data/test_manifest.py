"""The manifest: what a row means, and what is refused, with its file and line."""

from __future__ import annotations

import re

import pytest

from mics_fast.common.errors import InputError
from mics_fast.data import manifest_index
from mics_fast.data.manifest import RESERVED, digest_difference, read_manifest, write_manifest
from mics_fast.data.manifest_checks import check_manifest

HEADER = "id,label,labelled,group,split,virtual,wli,nbi"


@pytest.fixture(params=[1 << 30, 0], ids=["csv", "index"])
def write(tmp_path, monkeypatch, request):
    """write(line, ...) -> path of a manifest with these rows; images a.png and b.png exist."""
    monkeypatch.setattr(manifest_index, "INDEXED_FROM", request.param)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not read")

    def manifest(*lines, header=HEADER):
        path = tmp_path / "manifest.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return path

    return manifest


def record(**cells):
    row = dict.fromkeys(RESERVED, "") | {"id": "x", "label": "polyp", "labelled": "0"}
    return row | {"split": "train", "wli": "a.png", "nbi": "b.png"} | cells


def test_what_is_written_is_read_back(tmp_path, write):
    path = write()
    write_manifest(
        path,
        [
            record(id="one", label='polyp, "flat"', labelled="1", group="g", virtual="nbi"),
            record(id="zwei – 2", label="caecum", split="test", group="g", nbi=""),
        ],
        ["wli", "nbi"],
    )
    manifest = read_manifest(path)
    assert manifest.path == path
    assert manifest.modalities == ("wli", "nbi")
    assert manifest.classes == ("caecum", 'polyp, "flat"')
    first, second = manifest.rows
    assert (first.index, first.id, first.label, first.labelled) == (0, "one", 1, True)
    assert (first.split, first.virtual) == ("train", ("nbi",))
    assert first.files == {"wli": tmp_path / "a.png", "nbi": tmp_path / "b.png"}
    assert (second.index, second.id, second.label, second.labelled) == (1, "zwei – 2", 0, False)
    assert second.files == {"wli": tmp_path / "a.png", "nbi": None}
    assert first.group == second.group


def test_writing_replaces_the_manifest_and_leaves_nothing_else(tmp_path, write):
    path = write("old,,0,,train,,a.png,b.png")
    before = set(tmp_path.iterdir())
    write_manifest(path, [record(id="new")], ["wli", "nbi"])
    assert [row.id for row in read_manifest(path).rows] == ["new"]
    assert set(tmp_path.iterdir()) - {tmp_path / "manifest.csv.index"} == before


def test_a_failed_write_leaves_the_old_manifest(write):
    path = write("old,,0,,train,,a.png,b.png")
    with pytest.raises(ValueError):
        write_manifest(path, [record(id="new", depth="a.png")], ["wli", "nbi"])
    assert [row.id for row in read_manifest(path).rows] == ["old"]


def test_rows_without_a_group_are_groups_of_their_own(write):
    path = write(
        "1,,0,,train,,a.png,", "2,,0,g,train,,a.png,", "3,,0,,train,,a.png,", "4,,0,g,train,,a.png,"
    )
    first, second, third, fourth = (row.group for row in read_manifest(path).rows)
    assert second == fourth and len({first, second, third}) == 3


def test_a_row_without_a_label_has_label_minus_one_and_makes_no_class(write):
    manifest = read_manifest(write("1,,0,,train,,a.png,", "2,polyp,1,,train,,a.png,"))
    assert [row.label for row in manifest.rows] == [-1, 0]
    assert manifest.classes == ("polyp",)


def test_an_absolute_path_is_taken_as_it_is(tmp_path, write):
    manifest = read_manifest(write(f"1,,0,,train,,{tmp_path / 'a.png'},"))
    assert manifest.rows[0].files["wli"] == tmp_path / "a.png"


def test_paths_are_absolute_even_if_that_of_the_manifest_is_not(tmp_path, write, monkeypatch):
    path = write("1,,0,,train,,a.png,")
    monkeypatch.chdir(tmp_path)
    assert read_manifest(path.name).rows[0].files["wli"] == tmp_path / "a.png"


def test_a_byte_order_mark_of_a_spreadsheet_is_no_part_of_the_first_name(write):
    path = write("1,,0,,train,,a.png,", header="\ufeff" + HEADER)
    assert read_manifest(path).rows[0].id == "1"


@pytest.mark.parametrize(("name", "complaint"), [("wli", "wli twice"), ("", "without a name")])
def test_every_column_has_a_name_of_its_own(write, name, complaint):
    with pytest.raises(InputError, match=complaint):
        read_manifest(write("1,,0,,train,,a.png,b.png", header=HEADER.replace("nbi", name)))


def test_only_the_modalities_asked_for_are_read(write):
    path = write("1,,0,,train,,absent.png,b.png")
    manifest = read_manifest(path, ["nbi"])
    assert manifest.modalities == ("nbi",) and list(manifest.rows[0].files) == ["nbi"]


def test_select_filters_by_split_and_by_label_use(write):
    manifest = read_manifest(
        write("1,p,1,,train,,a.png,", "2,p,0,,train,,a.png,", "3,p,1,,test,,a.png,")
    )

    def ids(**chosen):
        return [row.id for row in manifest.select(**chosen)]

    assert ids() == ["1", "2", "3"]
    assert ids(split="train") == ["1", "2"]
    assert ids(split="train", labelled=True) == ["1"]
    assert ids(labelled=False) == ["2"]


GOOD = "1,polyp,1,,train,,a.png,b.png"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("1,polyp,1,,test,,a.png,b.png", "'1' is used twice"),
        (",polyp,1,,test,,a.png,b.png", "id '' is empty"),
        ("2,polyp,1,,training,,a.png,b.png", "split is 'training', wanted one of .*train.*val"),
        ("2,polyp,yes,,train,,a.png,b.png", "labelled is 'yes', wanted 0 or 1"),
        ("2,,1,,train,,a.png,b.png", "labelled is 1, but the label is empty"),
        ("2,polyp,1,,train,,absent.png,b.png", "the wli image .*absent.png does not exist"),
        ("2,polyp,1,,train,,,", "no image in any of wli, nbi"),
        ("2,polyp,1,,train,,a.png", "number of cells"),
        ("2,polyp,1,,train,,a.png,b.png,c.png", "number of cells"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_line(write, line, complaint):
    path = write(GOOD, line)
    with pytest.raises(InputError, match=complaint) as caught:
        read_manifest(path)
    assert f"{path}, line 3" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "absent.csv"))):
        read_manifest(tmp_path / "absent.csv")


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "picture.csv"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00")
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_manifest(path)


def test_a_manifest_without_rows_is_refused(write):
    path = write()
    with pytest.raises(InputError, match=f"{re.escape(str(path))} has no row"):
        read_manifest(path)


def test_a_manifest_without_a_modality_is_refused(write):
    path = write("1,,0,,train,", header=",".join(RESERVED))
    with pytest.raises(InputError, match="no modality"):
        read_manifest(path)


@pytest.mark.parametrize("column", RESERVED)
def test_a_missing_reserved_column_is_named(write, column):
    path = write(GOOD, header=HEADER.replace(column, "other", 1))
    with pytest.raises(InputError, match=f"no column {column}"):
        read_manifest(path)


def test_a_modality_that_is_no_column_is_named(write):
    with pytest.raises(InputError, match=r"no modality depth.*wli.*nbi"):
        read_manifest(write(GOOD), ["wli", "depth"])


# Changes made to a table by people and spreadsheets


@pytest.mark.parametrize("separator", [";", "\t"])
def test_semicolons_and_tabs_separate_cells_as_commas_do(write, separator):
    lines = [line.replace(",", separator) for line in (HEADER, "1,polyp,1,,train,,a.png,b.png")]
    (row,) = read_manifest(write(lines[1], header=lines[0])).rows
    assert row.id == "1" and set(row.files) == {"wli", "nbi"}


def test_blanks_around_a_cell_are_no_part_of_it(write):
    path = write(
        "1,polyp,1,,train,, a.png,b.png", "2,polyp ,0,,train,,a.png ,", "3, polyp,0,,val,,,b.png"
    )
    manifest = read_manifest(path)
    assert manifest.classes == ("polyp",) and [row.label for row in manifest.rows] == [0, 0, 0]


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x", "'=1", "''-", "'plain", "=", "x=1"])
def test_a_name_like_a_formula_is_written_inert_and_read_back(tmp_path, write, name):
    path = write()
    write_manifest(path, [record(id=name, label=name, group=name)], ["wli", "nbi"])
    cells = path.read_text().splitlines()[1].split(",")
    assert not any(cell.strip('"').startswith(("=", "+", "-", "@")) for cell in cells)
    manifest = read_manifest(path)
    assert manifest.rows[0].id == name and manifest.classes == (name,)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("id,label\n".encode("utf-16"), "wanted text in UTF-8"),
        (b'id,label,labelled,group,split,virtual,wli\n"1,x', "line 2: no CSV"),
        (b"", "has no column id"),
        (b"\0" * 50, "NUL"),
    ],
)
def test_what_is_no_table_is_one_sentence(tmp_path, content, complaint):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=complaint) as caught:
        read_manifest(tmp_path / "x.csv")
    assert str(tmp_path / "x.csv") in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_longer_than_the_file_system_takes_is_one_sentence(write):
    with pytest.raises(InputError, match=r"line 2: the wli image .* does not exist"):
        read_manifest(write(f"1,a,1,,train,,{'9' * 400}.png,"))


def test_a_missing_column_is_named_with_how_the_table_was_read(write):
    with pytest.raises(InputError, match=r"no column split.*only id, label.*UTF-8.*semicolons"):
        read_manifest(write("1;x;0;", header="id;label;labelled;group"))


# Checks before training


def check(write, *lines):
    return check_manifest(read_manifest(write(*lines)))


def test_labels_that_differ_in_case_or_blanks_are_refused(write):
    for other in ("Polyp", "po lyp"):
        with pytest.raises(InputError, match="differ only in case or blanks"):
            check(write, "1,polyp,1,,train,,a.png,", f"2,{other},0,,val,,a.png,")


def test_a_group_in_two_splits_is_refused(write):
    with pytest.raises(InputError, match=r"'1' \(train\) and '3' \(test\) are of one group"):
        check(write, "1,a,1,g,train,,a.png,", "2,a,0,,val,,a.png,", "3,a,0,g,test,,a.png,")


def test_empty_splits_and_classes_without_rows_in_one_are_warned_about(write):
    warnings = check(write, "1,a,1,,train,,a.png,", "2,b,1,,train,,a.png,", "3,a,0,,test,,a.png,")
    assert [text.split(": ")[1] for text in warnings] == [
        "no row is in the split val",
        "no test row of b",
    ]
    assert not check(write, *(f"{s},a,0,,{s},,a.png," for s in ("train", "val", "test")))


# Digest

ROWS = ("1,polyp,1,g,train,,a.png,b.png", "2,ulcer,0,g,train,,a.png,", "3,,0,,test,,,b.png")


def digest(write, *lines):
    return read_manifest(write(*lines)).digest()


def test_the_digest_is_that_of_the_rows_not_of_their_files_or_names_of_groups(write):
    other = [line.replace(",g,", ",h,").replace("b.png", "a.png") for line in ROWS]
    assert digest(write, *ROWS) == digest(write, *other)
    assert digest_difference(digest(write, *ROWS), digest(write, *other)) == ""


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (("1,ulcer,1,g,train,,a.png,b.png", *ROWS[1:]), "the column label differs"),
        (("1,polyp,0,g,train,,a.png,b.png", *ROWS[1:]), "the column labelled differs"),
        (("1,polyp,1,,train,,a.png,b.png", *ROWS[1:]), "the column group differs"),
        (("1,polyp,1,g,val,,a.png,b.png", *ROWS[1:]), "the column split differs"),
        (
            ("1,ulcer,1,g,val,,a.png,b.png", *ROWS[1:]),
            "the columns label and split differ",
        ),
        (ROWS[::-1], "other ids, or the same ids in another order"),
        (ROWS[:2], "2 rows instead of 3"),
    ],
)
def test_two_digests_say_what_changed(write, changed, sentence):
    assert digest_difference(digest(write, *ROWS), digest(write, *changed)) == sentence
