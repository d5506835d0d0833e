"""The command ``prepare``: its options, its output folder, and errors in one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from tests.mics_fast.preparation.preparing import run


def refusal(*arguments):
    """The sentence on stderr of a command that must end with status 2 and nothing else."""
    command = [sys.executable, "-m", "mics_fast.prepare", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--label-fraction", "0"], "--label-fraction is 0.0"),
        (["--label-fraction", "1.5"], "--label-fraction is 1.5"),
        (["--label-fraction", "nan"], "--label-fraction is nan"),
        (["--split", "0.5", "0.5", "0.5"], "--split is"),
        (["--split", "1.2", "-0.2", "0"], "--split is"),
        (["--split", "0", "0.5", "0.5"], "--split is"),
        (["--split", "nan", "nan", "nan"], "--split is"),
        (["--virtual-nbi"], "--virtual-nbi"),
        (["--seed", "-1"], "--seed is -1, wanted at least 0"),
        (["--pairs", "0"], "--pairs is 0, wanted at least 1"),
        (["--pairs", "few"], "--pairs"),
        (["--folds", "1"], "--folds is 1"),
        (["--store-side", "8"], "--store-side is 8"),
        (["--crop-borders"], "--crop-borders"),
        (["--colour"], "--colour"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        run("phantom", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_ends_with_one_sentence_and_status_2(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "--out" in refusal("phantom")


def test_the_source_images_are_referred_to_not_copied(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    lists = {"manifest.csv", "contact_sheet.png", "near_duplicates.csv"}  # flat images look alike
    assert {"manifest.csv"} <= set(os.listdir(tmp_path / "out")) <= lists
    text = (tmp_path / "out" / "manifest.csv").read_text()
    assert str(tmp_path) not in text and "../kvasir/polyps/p0.jpg" in text


def test_the_summary_counts_classes_splits_and_labels(kvasir, tmp_path, capsys):
    run(kvasir, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "polyps" in line)
    assert [int(word) for word in re.findall(r"\d+", line)] == [7, 1, 2, 1]
    assert "17 samples" in printed and str(tmp_path / "out" / "manifest.csv") in printed


def test_relative_paths_work_from_any_folder(kvasir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("kvasir", "--out", "deep/out")
    monkeypatch.chdir(kvasir)
    assert len(read_manifest(Path("../deep/out/manifest.csv")).rows) == 17


def test_an_output_folder_behind_a_link_works(kvasir, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    run(kvasir, "--out", tmp_path / "link", "--virtual-nbi")
    assert len(read_manifest(tmp_path / "link" / "manifest.csv").rows) == 17


@pytest.mark.parametrize("inside", ["out", "."])
def test_an_output_folder_in_the_source_is_no_class(kvasir, inside):
    for _ in range(2):
        run(kvasir, "--out", kvasir / inside, "--virtual-nbi")
        assert len(read_manifest(kvasir / inside / "manifest.csv").classes) == 3


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match=re.escape(str(out))):
            run("phantom", "--out", out, "--pairs", "1")


def test_a_manifest_that_was_edited_is_kept_beside_the_new_one(kvasir, tmp_path, capsys):
    manifest, kept = tmp_path / "out" / "manifest.csv", tmp_path / "out" / "manifest.csv.bak"
    for _ in range(2):
        run(kvasir, "--out", tmp_path / "out")
        assert not kept.exists(), "nothing was edited"
    edited = manifest.read_text().replace("polyps", "adenomas")
    manifest.write_text(edited)
    run(kvasir, "--out", tmp_path / "out")
    assert kept.read_text() == edited and "adenomas" not in manifest.read_text()
    assert "manifest.csv existed with other content: it is now" in capsys.readouterr().out


def test_a_failed_command_leaves_the_manifest_of_the_last_one(kvasir, tmp_path):
    run(kvasir, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "manifest.csv").read_bytes()
    (kvasir / "empty").mkdir()
    with pytest.raises(InputError):
        run(kvasir, "--out", tmp_path / "out", "--seed", "9")
    assert (tmp_path / "out" / "manifest.csv").read_bytes() == before
