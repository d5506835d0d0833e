"""The loop resumes exactly, logs what was minimised, stops on SIGTERM and on a loss that broke."""

from __future__ import annotations

import itertools
import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mics_fast.engine.checkpoint import Checkpoints, load_checkpoint
from mics_fast.engine.log import RunLog
from mics_fast.engine.loop import Loop, Losses, Plan
from mics_fast.errors import InputError


@dataclass
class Batch:
    x: Tensor
    label: Tensor


class Stage(nn.Module):
    """A linear model, an opponent that is stepped first, and a counter that after_step advances."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        self.opponent = nn.Linear(4, 1)
        self.register_buffer("average", torch.zeros(1, 4))
        self.opponent_moved = False

    def losses(self, batch, step):
        (batch,) = batch
        before = self.opponent.weight.detach().clone()
        yield Losses("opponent", {"opponent": self.opponent(batch.x).square().mean()})
        self.opponent_moved = not torch.equal(before, self.opponent.weight)
        fit = (self.model(batch.x)[:, 0] - batch.x.sum(1)).square().mean()
        size = self.model.weight.square().sum()
        yield Losses("model", {"fit": fit, "size": size}, {"size": 0.1 * step}, {"step_seen": step})

    def after_step(self):
        self.average.lerp_(self.model.weight.detach(), 0.5)


def batches(step):
    while True:
        generator = torch.Generator().manual_seed(step)
        yield (Batch(torch.randn(8, 4, generator=generator), torch.zeros(8)),)
        step += 1


def killed_at(step):
    for number, batch in enumerate(batches(0)):
        if number == step:
            raise KeyboardInterrupt
        yield batch


def make_loop(folder, steps=12, validate=None):
    stage = Stage()
    plan = Plan(
        name="pretrain",
        steps=steps,
        steps_per_epoch=4,
        optimisers={
            "model": torch.optim.AdamW(stage.model.parameters(), lr=0.1),
            "opponent": torch.optim.Adam(stage.opponent.parameters(), lr=0.1),
        },
        warmup=2,
        final_lr={"model": 0.1},
        clip=1.0,
        log_every=1,
        checkpoint_every=5,
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    return Loop(stage, plan, checkpoints, {"stage": "pretrain"}, RunLog(folder), validate)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir(), torn.mkdir()
    loop = make_loop(whole)
    assert loop.run(batches(0))
    with pytest.raises(KeyboardInterrupt):
        make_loop(torn).run(killed_at(7))
    resumed = make_loop(torn)
    resumed.load(load_checkpoint(resumed.checkpoints.latest(), {"stage": "pretrain"}))
    assert resumed.step == 5
    assert resumed.run(batches(5))
    for name, value in loop.stage.state_dict().items():
        assert torch.equal(value, resumed.stage.state_dict()[name]), name
    assert records(torn)[-1]["loss"] == records(whole)[-1]["loss"]


def test_the_log_holds_what_was_minimised(tmp_path):
    loop = make_loop(tmp_path)
    loop.run(batches(0))
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        weighted = line["loss_fit"] + line["weight_size"] * line["loss_size"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-6)
        assert line["stage"] == "pretrain" and line["epoch"] == line["step"] / 4
        assert {"loss_opponent", "lr", "gradient_norm", "pairs_per_second", "data_wait"} <= set(
            line
        )
    assert all(b["seconds"] > a["seconds"] for a, b in itertools.pairwise(lines))


def test_each_optimiser_has_stepped_before_the_next_loss_is_asked_for(tmp_path):
    loop = make_loop(tmp_path, steps=1)
    loop.run(batches(0))
    assert loop.stage.opponent_moved


def test_checkpoints_are_scored_and_the_best_is_named(tmp_path):
    scores = iter([0.3, 0.9, 0.5])
    loop = make_loop(tmp_path, validate=lambda: {"val_f1": next(scores)})
    loop.run(batches(0))
    assert loop.checkpoints.best().name == "step-00000010"
    assert [line["val_f1"] for line in records(tmp_path) if "val_f1" in line] == [0.3, 0.9, 0.5]


def test_sigterm_saves_and_stops(tmp_path):
    loop = make_loop(tmp_path)

    def interrupted():
        for step, batch in enumerate(batches(0)):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    assert not loop.run(interrupted())
    assert loop.checkpoints.latest().name == "step-00000004"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_loss_that_broke_is_named_and_not_saved(tmp_path):
    loop = make_loop(tmp_path)

    def poisoned():
        for step, batch in enumerate(batches(0)):
            if step == 4:
                batch[0].x[0, 0] = float("nan")
            yield batch

    with pytest.raises(FloatingPointError, match="pretrain step 5: loss"):
        loop.run(poisoned())
    assert loop.checkpoints.latest() is None


def full_disk(step):
    """A ``save`` that finds the disk full at one step."""
    save = Checkpoints.save

    def limited(self, at, state, meta):
        if at == step:
            raise OSError(28, "No space left on device")
        return save(self, at, state, meta)

    return limited


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    loop = make_loop(tmp_path)
    monkeypatch.setattr(Checkpoints, "save", full_disk(10))
    assert loop.run(batches(0))
    told = capsys.readouterr().err
    assert "step 10 cannot be written: No space left on device; going on without it" in told
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-00000005",
        "step-00000012",
    ]


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run_in_words(tmp_path, monkeypatch):
    loop = make_loop(tmp_path)
    monkeypatch.setattr(Checkpoints, "save", full_disk(12))
    with pytest.raises(InputError, match="pretrain step 12 cannot be written: No space left"):
        loop.run(batches(0))
    assert loop.checkpoints.load_latest({"stage": "pretrain"})["step"] == 10
