"""The log of a run reaches the terminal, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import os

import pytest

from mics_fast.common.errors import InputError
from mics_fast.engine.log import RunLog, read_log


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path)
    yield log
    log.close()


def test_a_record_is_a_line_and_a_json_object(log, tmp_path, capsys):
    with log.progress("pretrain", 0, 10):
        values = {"loss": 1.5, "loss_fit": 2.0, "mfu": 0.25}
        log.write("pretrain", 5, values, "pretrain  step 5/10  loss 1.5", ["fit 2"])
    assert capsys.readouterr().out == "pretrain  step 5/10  loss 1.5\n"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "stage": "pretrain", "step": 5, "loss": 1.5, "loss_fit": 2.0, "mfu": 0.25
    }  # fmt: skip
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_terminal_gets_a_bar_and_the_same_lines(log, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with log.progress("pretrain", 2, 10):
        log.write("pretrain", 5, {"loss": 1.5}, "pretrain  step 5/10  loss 1.5")
        log.advance(7)
    shown = capsys.readouterr().out
    assert "pretrain  step 5/10  loss 1.5" in shown and "━" in shown and " 7/10" in shown


def test_a_verbose_log_shows_the_details_in_whole_parts_of_100_columns(tmp_path, capsys):
    log = RunLog(tmp_path, verbose=True)
    log.write("pretrain", 5, {"loss": 1.5}, "step 5", [f"loss_{k} 0.123" for k in range(20)])
    log.close()
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "step 5" and len(rest) > 1
    assert all(line.startswith("    loss_") and len(line) <= 100 for line in rest)
    assert sum(line.count(" 0.123") for line in rest) == 20


def test_of_a_step_that_was_repeated_the_last_record_counts(log, tmp_path):
    for step, loss in ((1, 1.0), (2, 2.0), (2, 3.0)):
        log.write("finetune", step, {"loss": loss}, "")
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": "fin')
    assert [record["loss"] for record in read_log(tmp_path)["finetune"]] == [1.0, 3.0]


def test_a_line_that_a_kill_cut_swallows_no_other(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "finetune", "step": 1, "lo')
    log = RunLog(tmp_path)
    log.write("finetune", 2, {"loss": 2.0}, "")
    log.close()
    assert [record["step"] for record in read_log(tmp_path)["finetune"]] == [2]


def test_a_link_is_not_appended_to(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written: it is a link"):
        RunLog(tmp_path)
    assert victim.read_text() == "mine"


def test_a_record_that_cannot_be_written_costs_that_record(log, tmp_path, monkeypatch, capsys):
    def full(_descriptor, _data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.write("pretrain", 1, {"loss": 1.0}, "step 1")
        log.write("pretrain", 2, {"loss": 2.0}, "step 2")
    log.write("pretrain", 3, {"loss": 3.0}, "step 3")
    told = capsys.readouterr()
    assert told.err.count("No space left on device; continuing without") == 1
    assert "step 2" in told.out
    assert [record["step"] for record in read_log(tmp_path)["pretrain"]] == [3]


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[" * 100_000, '{"stage": "finetune"}', '{"stage": [], "step": 1}',
     '{"stage": "finetune", "step": "1"}', '{"stage": "finetune", "step": true}',
     '{"stage": "finetune", "step": 1e400}', '{"stage": "finetune", "step": -1}', "\0\0"],
)  # fmt: skip
def test_a_line_that_is_no_record_is_skipped(tmp_path, line):
    good = '{"stage": "finetune", "step": 7, "loss": 1.0, "loss_x": "text", "lr": NaN}'
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{good}\n")
    assert read_log(tmp_path) == {"finetune": [{"stage": "finetune", "step": 7, "loss": 1.0}]}


def test_a_log_that_is_missing_or_a_pipe_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read: No such file"):
        read_log(tmp_path)
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="is no regular file"):
        read_log(tmp_path)
