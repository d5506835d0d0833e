"""What a run says reaches the terminal, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json

import pytest

from mics_fast.engine.log import RunLog, read_log


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path)
    yield log
    log.close()


def test_a_record_is_a_line_and_a_json_object(log, tmp_path, capsys):
    with log.progress("pretrain", 0, 10):
        log.write("pretrain", 5, {"loss": 1.5, "loss_fit": 2.0, "mfu": 0.25}, "pretrain  step 5/10")
    assert capsys.readouterr().out == "pretrain  step 5/10  loss 1.5  fit 2\n"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "stage": "pretrain", "step": 5, "loss": 1.5, "loss_fit": 2.0, "mfu": 0.25
    }  # fmt: skip
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_terminal_gets_a_bar_and_the_same_lines(log, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with log.progress("pretrain", 2, 10):
        log.write("pretrain", 5, {"loss": 1.5}, "pretrain  step 5/10")
    shown = capsys.readouterr().out
    assert "pretrain  step 5/10  loss 1.5" in shown and "━" in shown and "5/10" in shown


def test_of_a_step_that_was_repeated_the_last_record_counts(log, tmp_path):
    for step, loss in ((1, 1.0), (2, 2.0), (2, 3.0)):
        log.write("finetune", step, {"loss": loss}, "")
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": "fin')
    assert [record["loss"] for record in read_log(tmp_path)["finetune"]] == [1.0, 3.0]
