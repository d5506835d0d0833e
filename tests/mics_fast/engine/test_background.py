"""A thread writes the state as of the hand-over, one checkpoint at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict

import pytest
import torch

from mics_fast.engine.background import CheckpointWriter, Snapshot
from mics_fast.engine.checkpoint import Checkpoints, load_checkpoint

META = {"stage": "pretrain"}


@pytest.fixture
def slow_disk(monkeypatch):
    """Holds every ``save`` until it is released."""
    release, save = threading.Event(), Checkpoints.save

    def held(self, step, state, meta):
        assert release.wait(10)
        return save(self, step, state, meta)

    monkeypatch.setattr(Checkpoints, "save", held)
    yield release
    release.set()


def full_disk(monkeypatch, step):
    save = Checkpoints.save

    def limited(self, at, state, meta):
        if at == step:
            raise OSError(28, "No space left on device")
        return save(self, at, state, meta)

    monkeypatch.setattr(Checkpoints, "save", limited)


def test_a_snapshot_does_not_change_with_the_state():
    weight = torch.zeros(3, requires_grad=True)
    state = {"a": OrderedDict(w=weight), "b": [(weight, 1)], "c": {0: {"step": torch.tensor(1.0)}}}
    copy = Snapshot(state).read()
    with torch.no_grad():
        weight += 1
        state["c"][0]["step"] += 1
    assert torch.equal(copy["a"]["w"], torch.zeros(3)) and not copy["a"]["w"].requires_grad
    assert torch.equal(copy["b"][0][0], torch.zeros(3)) and copy["b"][0][1] == 1
    assert copy["c"][0]["step"] == 1


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow_disk):
    writer = CheckpointWriter(Checkpoints(tmp_path), "pretrain", META)
    weight = torch.zeros(3)
    writer.save(1, {"w": weight})
    weight += 1
    assert writer.checkpoints.latest() is None, "not written yet"
    slow_disk.set()
    assert writer.wait() is None
    assert torch.equal(load_checkpoint(writer.checkpoints.latest(), META)["w"], torch.zeros(3))
    writer.close()


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, slow_disk):
    writer = CheckpointWriter(Checkpoints(tmp_path), "pretrain", META)
    writer.save(1, {})
    threading.Timer(0.2, slow_disk.set).start()
    writer.save(2, {})
    assert [path.name for path in tmp_path.glob("step-*")][:1] == ["step-00000001"]
    writer.close()
    assert writer.checkpoints.latest().name == "step-00000002"


def test_a_score_names_a_checkpoint_only_when_it_is_written(tmp_path, slow_disk):
    writer = CheckpointWriter(Checkpoints(tmp_path), "pretrain", META)
    writer.save(1, {}, score=0.5)
    assert writer.checkpoints.best_step() is None
    slow_disk.set()
    writer.close()
    assert writer.checkpoints.best_step() == 1


def test_a_checkpoint_that_could_not_be_written_is_told_at_the_next(tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, step=1)
    writer = CheckpointWriter(Checkpoints(tmp_path), "pretrain", META)
    writer.save(1, {}, score=0.9)
    writer.save(2, {}, score=0.1)
    sentence = "the checkpoint of pretrain step 1 cannot be written: No space left on device"
    assert capsys.readouterr().err == f"{sentence}; continuing without it\n"
    writer.close()
    assert writer.checkpoints.best_step() == 2


def test_closing_tells_what_could_not_be_written(tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, step=1)
    writer = CheckpointWriter(Checkpoints(tmp_path), "pretrain", META)
    writer.save(1, {})
    writer.close()
    assert "step 1 cannot be written" in capsys.readouterr().err


def test_what_is_not_the_disk_s_fault_is_an_error(tmp_path):
    writer = CheckpointWriter(Checkpoints(tmp_path), "pretrain", META)
    writer.save(1, {"step": lambda: 1})
    with pytest.raises(Exception, match=r"pickle|lambda"):
        writer.close()
    assert not list(tmp_path.glob("*step-*"))
