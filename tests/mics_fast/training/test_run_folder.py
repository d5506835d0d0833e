"""A run folder means the same wherever it is read from."""

from __future__ import annotations

from pathlib import Path

from mics_fast.options import DataConfig, FinetuneConfig, TrainConfig
from mics_fast.training.run import Run


def test_paths_of_a_run_do_not_depend_on_the_folder_it_was_started_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        out="run", data=DataConfig("pairs/manifest.csv"), finetune=FinetuneConfig("other")
    )
    Run.start(config, resume=False)
    monkeypatch.chdir("/")
    stored = Run.open(tmp_path / "run").config
    assert Path(stored.data.manifest) == tmp_path / "pairs" / "manifest.csv"
    assert Path(stored.finetune.init) == tmp_path / "other" and stored.model.init == ""


def test_a_run_goes_on_under_the_same_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(out="run", data=DataConfig("pairs/manifest.csv"))
    config.finetune.init = "none"
    Run.start(config, resume=False)
    assert Run.start(config, resume=True).config.finetune.init == "none"
