"""Reading a manifest many rows at a time: the same rows and errors as row by row."""

from __future__ import annotations

import random
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from mics_fast.common.errors import InputError
from mics_fast.common.files import restored_cell
from mics_fast.data import file_lookup, manifest_csv, tables
from mics_fast.data.file_lookup import FileLookup, file_exists
from mics_fast.data.manifest import RESERVED, SPLITS, Row, Rows, read_manifest
from tests.mics_fast.mutation import mutated

LABELS = ("polyp", "Polyp", "ulcer, flat", 'the "large" one', "", "Ödem", "腺瘤", "two\nlines")
GROUPS = ("", "", "g", "h", "é", "'=1", "''-x", "'", "g\u00a0")
IMAGES = ("a.png", "b.png", "é/ü.png", "in/c.png", "in/../a.png", "link.png", "x.tar/1.wli.jpg", "")
ABSENT = (
    "absent.png",
    "in",
    "in/",
    "x.tar/2.wli.jpg",
    "x.tar/3.wli.jpg",
    "no.tar/1.jpg",
    "9" * 300,
)
BLANKS = ("", "", "", "", " ", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85")
PIECES = [b"", b",", b";", b"\t", b'"', b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80",
          "\ufeff".encode(), b"'=", b"train", b" ", "\u2028".encode(), b"9" * 400]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """The images; the shard has one whole member, and one that lies beyond its end."""
    for name in ("a.png", "b.png", "é/ü.png", "in/c.png", "in/no.tar.d/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "in" / "broken.png").symlink_to("absent.png")
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    (tmp_path / "no.tar").mkdir()
    (tmp_path / "no.tar" / "1.jpg").touch()
    (tmp_path / "x.tar").write_bytes(b"1" * 1024)
    (tmp_path / "x.idx").write_text("v1.2 2\njpg 512 9 1.wli.jpg\njpg 1020 9 2.wli.jpg\n")
    return tmp_path


def row_by_row(path, modalities, files_exist):
    """Read a manifest as its rules are stated: (rows, classes), or the text of the error."""
    what, folder = f"manifest {path}", path.parent.absolute()
    seen, groups, found = set(), {}, []
    try:
        with tables.open_table(path, what, 1 << 30) as table:
            columns = manifest_csv._checked_names(table, what)
            available = [name for name in columns if name not in RESERVED]
            chosen = manifest_csv.chosen_modalities(path, available, modalities)
            for line, cells in table.lines:
                row = dict(zip(columns, map(restored_cell, cells), strict=True))
                problem = manifest_csv._problem(
                    [row[name] for name in RESERVED], {name: row[name] for name in available}, seen
                )
                for name in chosen if files_exist else ():
                    if not problem and row[name] and not file_exists(str(folder / row[name])):
                        problem = f"the {name} image {folder / row[name]} does not exist"
                if problem:
                    raise InputError(f"{what}, line {line}: {problem}")
                seen.add(row["id"])
                row["group"] = groups.setdefault(row["group"] or (line,), len(groups))
                found.append(row)
    except InputError as error:
        return str(error)
    if not found:
        return f"{what} has no row"
    classes = sorted({row["label"] for row in found} - {""})
    rows = [
        Row(
            number,
            row["id"],
            classes.index(row["label"]) if row["label"] else -1,
            row["labelled"] == "1",
            row["group"],
            row["split"],
            tuple(row["virtual"].split()),
            {name: folder / row[name] if row[name] else None for name in available},
        )
        for number, row in enumerate(found)
    ]
    return [astuple(row) for row in rows], tuple(classes)


def at_once(path, modalities, files_exist):
    try:
        contents = manifest_csv.read_csv(path, modalities, files_exist)
    except InputError as error:
        return str(error)
    rows = Rows(contents.columns, np.arange(len(contents.columns.label)))
    return [astuple(row) for row in rows], contents.classes


def table(draw):
    """Draw the bytes of a manifest, mostly a valid one."""
    separator, end = draw.choice(",,;\t"), draw.choice(["\n", "\n", "\r\n", "\r"])

    def cell(text):
        text = draw.choice(BLANKS) + text + draw.choice(BLANKS)
        quoted = any(char in text for char in '",;\t\r\n') or draw.random() < 0.05
        return '"' + text.replace('"', '""') + '"' if quoted else text

    names = draw.sample([*RESERVED, "wli", "nbi"], 8)
    lines = [separator.join(names)]
    wrong = draw.choice([0, 0, 0.05, 0.4])  # of the rows
    for number in range(draw.randint(0, 12)):
        label = draw.choice(LABELS)
        row = {
            "id": draw.choice([f"{number}", f"é {number}", f"'={number}", f'"{number}"']),
            "label": label,
            "labelled": draw.choice("01") if label else "0",
            "group": draw.choice(GROUPS),
            "split": draw.choice(SPLITS),
            "virtual": draw.choice(["", "", "nbi", "wli  nbi"]),
            "wli": draw.choice(IMAGES[:-1]),
            "nbi": draw.choice(IMAGES),
        }
        if draw.random() < wrong:
            changed = draw.sample(names, draw.randint(1, 2))
            row |= dict.fromkeys(changed, draw.choice(["", "", "", "0", "1", "\0", *ABSENT]))
            row |= {"wli": "", "nbi": ""} if draw.random() < 0.1 else {}
        cells = [cell(row[name]) for name in names]
        if draw.random() < wrong / 5:
            cells = draw.choice([cells[:-1], [*cells, ""]])
        lines += [separator.join(cells), *[""] * (draw.random() < 0.05)]
    text = end.join(lines) + draw.choice(["", end, end * 2])
    data = (draw.choice(["", "\ufeff"]) + text).encode()
    return mutated(draw, data, PIECES) if draw.random() < 0.2 else data


@pytest.mark.parametrize("small", [True, False])
def test_mutated_manifests_give_the_rows_and_errors_of_reading_row_by_row(
    folder, monkeypatch, small
):
    """Small: every row, line and file is near the border of a block, batch, part or limit."""
    if small:
        for module, sizes in (
            (tables, {"_BLOCK": 16, "_BATCH": 2, "_LONGEST": 200}),
            (manifest_csv, {"_PART": 3}),
            (file_lookup, {"_MANY": 2, "_PER_FILE": 1}),
        ):
            for name, size in sizes.items():
                monkeypatch.setattr(module, name, size)
    path = folder / "manifest.csv"
    read, refused = 0, set()
    for seed in range(1000):
        draw = random.Random(seed)
        path.write_bytes(table(draw))
        modalities = draw.choice([None, None, ["wli"], ["nbi", "wli"]])
        files_exist = draw.random() < 0.7
        wanted = row_by_row(path, modalities, files_exist)
        assert at_once(path, modalities, files_exist) == wanted, seed
        if isinstance(wanted, str):
            refused.add(wanted.split(": ", 1)[-1][:8])
        else:
            read += 1
    assert read > 200 and len(refused) > 7


def test_lines_are_as_long_as_they_are_when_read_row_by_row(folder, monkeypatch):
    monkeypatch.setattr(tables, "_LONGEST", 100)
    monkeypatch.setattr(tables, "_BLOCK", 16)
    path = folder / "manifest.csv"
    header = ",".join((*RESERVED, "wli")) + "\n"
    for length in (98, 99, 100, 101, 1000):  # with the end of the line
        for letter in "xé腺😀":
            row = ",,0,,train,,a.png\n"
            path.write_text(header + letter * (length - len(row)) + row, encoding="utf-8")
            wanted = row_by_row(path, None, True)
            assert at_once(path, None, True) == wanted
            assert isinstance(wanted, str) == (length >= 100)


def test_only_the_first_byte_order_mark_of_a_file_is_no_text(folder, monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK", 1)
    path = folder / "manifest.csv"
    header = "\ufeff" + ",".join(('"id\n"', *RESERVED[1:], "wli")) + "\n"
    path.write_text(header + "\ufeff1,,0,,train,,a.png\n")
    assert [row.id for row in read_manifest(path).rows] == ["\ufeff1"]


def test_names_with_one_hash_stay_apart(folder, monkeypatch):
    path = folder / "manifest.csv"
    header = ",".join((*RESERVED, "wli"))
    groups = ("g", "h", "", "g", "longer", "h")
    lines = [f"{k},,0,{own},train,,a.png" for k, own in enumerate(groups)]
    path.write_text("\n".join([header, *lines]))
    monkeypatch.setattr(manifest_csv, "hash", len, raising=False)
    assert [row.group for row in read_manifest(path).rows] == [0, 1, 2, 0, 3, 1]
    path.write_text("\n".join([header, *lines, lines[2]]))
    with pytest.raises(InputError, match="line 8: id '2' is used twice"):
        read_manifest(path)


def test_an_image_that_appears_after_it_was_missed_is_one_sentence(folder, monkeypatch):
    path = folder / "manifest.csv"
    path.write_text(",".join((*RESERVED, "wli")) + "\n1,,0,,train,,absent.png\n")

    def missed(self, paths):
        (folder / "absent.png").touch()
        return False

    monkeypatch.setattr(FileLookup, "all_exist", missed)
    with pytest.raises(InputError, match=r"manifest\.csv .* was changed while it was read$"):
        read_manifest(path)


# Looking for files


@pytest.mark.parametrize("many", [1, 4])
def test_listing_folders_finds_what_looking_at_each_file_finds(folder, monkeypatch, many):
    monkeypatch.setattr(file_lookup, "_MANY", many)
    names = [str(own.relative_to(folder)) for own in folder.rglob("*")]
    names += [*filter(None, IMAGES), *ABSENT, "./a.png", "in//c.png", "/", ".", "..", "in/.",
              str(folder / "a.png"), "x.tar//1.wli.jpg", "in/absent.png", "A.PNG"]  # fmt: skip
    present = [name for name in names if file_exists(str(folder / name))]
    assert 8 < len(present) < len(names) - 10
    lookup = FileLookup(str(folder), 1000)
    for _ in range(2):
        assert lookup.all_exist(present)
        for name in names:
            assert lookup.all_exist([name]) == (name in present), name
            assert lookup.all_exist([*present, name]) == (name in present), name


def test_files_of_many_folders_of_different_sizes_are_known_when_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(file_lookup, "_MANY", 1)
    lookup, draw, paths = FileLookup(str(tmp_path), 1000), random.Random(0), []
    for folder in range(40):
        (tmp_path / str(folder)).mkdir()
        names = [f"{folder}/{number}.png" for number in range(draw.choice([0, 1, 2, 3, 9, 30]))]
        for name in names:
            (tmp_path / name).touch()
        assert not lookup.all_exist([f"{folder}/absent.png"])
        paths += names
        with monkeypatch.context() as context:
            context.setattr(file_lookup, "file_exists", lambda path: False)
            assert lookup.all_exist(paths)
            assert not lookup.all_exist([*paths, "0/absent.png"])


def test_a_folder_is_listed_once_and_no_further_than_is_worth_it(tmp_path, monkeypatch):
    names = [f"{number}.png" for number in range(300)]
    for name in names:
        (tmp_path / name).touch()
    looked_at, listed = [], []
    monkeypatch.setattr(
        file_lookup, "file_exists", lambda path: looked_at.append(path) or Path(path).is_file()
    )
    whole = file_lookup._hashes_in

    def counted(*arguments):
        for own in whole(*arguments):
            listed.append(own)
            yield own

    monkeypatch.setattr(file_lookup, "_hashes_in", counted)
    lookup = FileLookup(str(tmp_path), 200)
    assert lookup.all_exist(names[:50]) and lookup.all_exist(names[50:75])
    assert sorted(listed) == sorted(map(hash, names)) and not looked_at
    listed.clear()
    lookup = FileLookup(str(tmp_path), 20)  # may list 80
    assert lookup.all_exist(names) and lookup.all_exist(names)
    assert len(listed) == 80 and len(looked_at) == 2 * 220
    assert not lookup.all_exist([*names, "300.png"])
    looked_at.clear()
    assert FileLookup(str(tmp_path), 20).all_exist(names[:15]) and len(looked_at) == 15


def test_a_shard_is_listed_whole_and_leaves_folders_to_be_looked_at(folder, monkeypatch):
    monkeypatch.setattr(file_lookup, "_MANY", 1)
    members = " ".join(f"jpg 512 9 {number}.jpg" for number in range(9))
    (folder / "x.idx").write_text(f"v1.2 1\n{members}\n")
    lookup = FileLookup(str(folder), 1)  # may list 4
    assert lookup.all_exist(["x.tar/8.jpg", "a.png"]) and lookup.all_exist(["in/c.png"])
    assert not lookup.all_exist(["x.tar/9.jpg"]) and not lookup.all_exist(["in/\0/c.png"])
