"""Checkpoints are whole or absent, few, and loaded without executing code."""

from __future__ import annotations

import pickle

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    load_checkpoint,
    write_state,
)

META = {"stage": "pretrain", "classes": ["a", "b"]}


def test_what_is_saved_comes_back(tmp_path):
    saved = {"weights": {"w": torch.arange(3.0)}, "step": 7, "names": ["x"]}
    path = Checkpoints(tmp_path).save(7, saved, META)
    loaded = load_checkpoint(path, META)
    assert torch.equal(loaded["weights"]["w"], torch.arange(3.0))
    assert loaded["step"] == 7 and loaded["names"] == ["x"]


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.8), (4, 0.9), (5, 0.1)):
        checkpoints.save(step, {"step": step}, META)
        checkpoints.offer_best(step, score)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]
    assert checkpoints.best().name == "step-00000002"
    assert checkpoints.latest().name == "step-00000005"


def test_without_a_score_the_latest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() is None
    checkpoints.save(3, {}, META)
    assert checkpoints.best().name == "step-00000003"


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1}, META)
    partial = tmp_path / ".partial-step-00000002"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    assert checkpoints.latest().name == "step-00000001"
    checkpoints.save(2, {"step": 2}, META)
    assert load_checkpoint(checkpoints.latest(), META)["step"] == 2


def test_a_failing_save_leaves_the_previous_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1}, META)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoints.save(2, {"step": lambda: 2}, META)
    assert load_checkpoint(checkpoints.latest(), META)["step"] == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = Checkpoints(tmp_path).save(1, {}, META)
    with pytest.raises(InputError, match=r"its classes is \['a', 'b'\], wanted \['a'\]"):
        load_checkpoint(path, {"classes": ["a"]})


def test_a_torn_file_is_named(tmp_path):
    path = Checkpoints(tmp_path).save(1, {"w": torch.zeros(1000)}, META)
    file = path / "state.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        load_checkpoint(path, META)


@pytest.mark.parametrize("position", [100, -100])
def test_a_flipped_bit_is_noticed(tmp_path, position):
    path = Checkpoints(tmp_path).save(1, {"w": torch.zeros(1000)}, META)
    data = bytearray((path / "state.pt").read_bytes())
    data[position] ^= 1
    (path / "state.pt").write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="checksum"):
        load_checkpoint(path, META)


def test_of_damaged_checkpoints_the_one_before_is_taken_and_the_step_can_be_saved_again(
    tmp_path, capsys
):
    checkpoints = Checkpoints(tmp_path, keep=4)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"step": step}, META)
    (tmp_path / "step-00000003" / "state.pt").write_bytes(b"torn")
    (tmp_path / "step-00000004" / "meta.json").write_text("{")
    assert checkpoints.load_latest(META)["step"] == 2
    told = capsys.readouterr().err
    assert "step-00000003" in told and "step-00000004" in told
    checkpoints.save(4, {"step": 4, "again": True}, META)
    assert checkpoints.load_latest(META)["again"]


def test_a_checkpoint_of_another_model_is_not_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, META)
    with pytest.raises(InputError, match="is of another model"):
        checkpoints.load_latest({"stage": "finetune"})


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = Checkpoints(tmp_path).save(1, {}, META)
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    write_state(path, {"evil": Evil()}, META)
    with pytest.raises(DamagedCheckpoint, match="weights_only"):
        load_checkpoint(path, META)
    assert not ran.exists()


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1}, META)
    (tmp_path / ".partial-step-00000009").mkdir()
    assert checkpoints.load_latest(META)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
