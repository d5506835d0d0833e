"""A run folder can be read from any working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest, write_manifest
from mics_fast.options import DataConfig, FinetuneConfig, TrainConfig
from mics_fast.training.run import Run, refuse_changes
from mics_fast.training.trainer import check_patience


def record(number, **cells):
    split = ("train", "train", "val", "test")[number]
    row = {"id": f"r{number}", "label": "ab"[number % 2], "labelled": str(int(number < 2))}
    return {**row, "group": "", "split": split, "virtual": "", "wli": "x.png", "nbi": ""} | cells


ROWS = tuple(record(number) for number in range(4))


def manifest_of(rows=ROWS):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.csv"
        write_manifest(path, rows, ["wli", "nbi"])
        return replace(read_manifest(path, files_exist=False), path=Path("manifest.csv"))


MANIFEST = manifest_of()


def test_paths_of_a_run_do_not_depend_on_the_folder_it_was_started_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        out="run", data=DataConfig("pairs/manifest.csv"), finetune=FinetuneConfig("other")
    )
    Run.start(config, MANIFEST, resume=False)
    monkeypatch.chdir("/")
    stored = Run.open(tmp_path / "run").config
    assert Path(stored.data.manifest) == tmp_path / "pairs" / "manifest.csv"
    assert Path(stored.finetune.init) == tmp_path / "other" and stored.model.init == ""


def test_a_run_goes_on_under_the_same_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(out="run", data=DataConfig("pairs/manifest.csv"))
    config.finetune.init = "none"
    Run.start(config, MANIFEST, resume=False)
    assert Run.start(config, MANIFEST, resume=True).config.finetune.init == "none"


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (ROWS[:3], "3 rows instead of 4"),
        ((*ROWS[:3], record(3, split="train")), "the column split differs"),
        ((record(0, label="b"), *ROWS[1:]), "the column label differs"),
        ((record(0, labelled="0"), *ROWS[1:]), "the column labelled differs"),
        ((record(0, id="other"), *ROWS[1:]), "other ids"),
    ],
)
def test_a_run_goes_on_on_its_own_manifest_alone(tmp_path, rows, sentence):
    config = TrainConfig(out=str(tmp_path / "run"))
    Run.start(config, MANIFEST, resume=False)
    Run.start(config, replace(MANIFEST, path=Path("moved.csv")), resume=True)
    with pytest.raises(InputError, match=f"started with: {sentence}"):
        Run.start(config, manifest_of(rows), resume=True)
    assert Run.open(tmp_path / "run").digest() == MANIFEST.digest()


def test_patience_without_rows_to_score_is_refused():
    check_patience(FinetuneConfig(patience=3), MANIFEST)
    unscored = manifest_of([row for row in ROWS if row["split"] != "val"])
    check_patience(FinetuneConfig(), unscored)
    with pytest.raises(InputError, match=r"patience is 3, but manifest\.csv has no val row with"):
        check_patience(FinetuneConfig(patience=3), unscored)


def test_an_entry_that_is_no_longer_there_counts_as_a_change(tmp_path):
    before, now = TrainConfig(), TrainConfig()
    before.finetune.class_weights = {"polyp": 5.0}
    with pytest.raises(InputError, match=r"finetune\.class_weights\.polyp is None, but .* 5\.0"):
        refuse_changes(before, now, tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"rows": 4}', "{", "5"])
def test_a_damaged_digest_is_one_sentence(tmp_path, text):
    config = TrainConfig(out=str(tmp_path / "run"))
    Run.start(config, MANIFEST, resume=False)
    (tmp_path / "run" / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Run.start(config, MANIFEST, resume=True)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    config = TrainConfig(out=str(tmp_path / "run"))
    Run.start(config, MANIFEST, resume=False)
    Run.start(config, MANIFEST, resume=True)  # this process holds it already
    lock = (
        "import sys; from pathlib import Path; from mics_fast.common.errors import InputError\n"
        "from mics_fast.common.locks import lock_folder\n"
        "try: lock_folder(Path(sys.argv[1]))\n"
        "except InputError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", lock, config.out], capture_output=True, text=True)
    assert "is in use by another process" in told.stdout, told.stderr


def test_the_lock_ends_with_its_process(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    code = (
        "import os, sys; from pathlib import Path; from mics_fast.common.locks import lock_folder\n"
        "lock_folder(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -9
    Run.start(TrainConfig(out=str(folder)), MANIFEST, resume=False)


def test_files_of_a_run_are_for_their_owner_alone(tmp_path):
    config = TrainConfig(out=str(tmp_path / "run"))
    Run.start(config, MANIFEST, resume=False)
    for file in (tmp_path / "run").iterdir():
        assert os.stat(file).st_mode & 0o077 == 0, file
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == MANIFEST.digest()
