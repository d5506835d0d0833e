"""Checkpoints are whole or absent, few, and loaded without executing code."""

from __future__ import annotations

import json
import os
import pickle
import resource

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    fitting,
    load_checkpoint,
    weights_of,
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


def test_a_disk_that_is_full_is_the_system_s_error_and_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1}, META)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a disk with 100 kB left
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(2, {"w": torch.zeros(100_000)}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    "text",
    ["5", "[]", "{}", "{", '{"step": "1", "score": 0.5}', '{"step": 1}', '{"step": -1, "score": 0}',
     '{"step": true, "score": 1}', '{"step": 1, "score": "x"}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_best_json_is_one_sentence(tmp_path, text):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1}, META)
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(InputError, match=r"best\.json"):
        checkpoints.best()


@pytest.mark.parametrize(
    "text",
    ["5", "[]", "{}", '{"sha256": 5}', '{"sha256": "x", "classes": 5}', "[" * 100_000,
     '{"sha256": "x", "classes": [1, 2]}', '{"sha256": "x", "modalities": ["wli", "wli"]}',
     json.dumps({"sha256": "x", "classes": [f"c{i}" for i in range(20_000)]})],
)  # fmt: skip
def test_a_damaged_meta_json_is_one_sentence(tmp_path, text):
    path = Checkpoints(tmp_path).save(1, {"step": 1}, META)
    (path / "meta.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"is not a checkpoint: .*meta\.json"):
        load_checkpoint(path, META)


def test_a_state_that_is_a_pipe_is_not_waited_for(tmp_path):
    path = Checkpoints(tmp_path).save(1, {"step": 1}, META)
    (path / "state.pt").unlink()
    os.mkfifo(path / "state.pt")
    with pytest.raises(DamagedCheckpoint, match="is no regular file"):
        load_checkpoint(path, META)


def test_a_state_under_integer_names_is_refused(tmp_path):
    path = Checkpoints(tmp_path).save(1, {"step": 1}, META)
    write_state(path, {1: torch.zeros(1)}, META)
    with pytest.raises(DamagedCheckpoint, match="holds no named state"):
        load_checkpoint(path, META)
    for stage in (5, {1: torch.zeros(1)}, None):
        with pytest.raises(DamagedCheckpoint, match="holds no named weights"):
            weights_of({"stage": stage}, "average")


def test_a_state_that_does_not_fit_is_one_sentence():
    wanted = pytest.raises(DamagedCheckpoint, match="checkpoint x does not fit")
    with wanted as error, fitting("checkpoint x"):
        torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3)})
    assert "\n" not in str(error.value)
