"""The loop resumes exactly, logs the minimised loss, and stops on SIGTERM or a broken loss."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mics_fast.common.errors import InputError, RunFailed
from mics_fast.engine.checkpoint import Checkpoints, load_checkpoint
from mics_fast.engine.log import RunLog
from mics_fast.engine.loop import Loop, Losses, Plan, StopOnSignal


@dataclass
class Batch:
    x: Tensor
    label: Tensor
    sample_id: Tensor


class Stage(nn.Module):
    """A linear model, an opponent that is stepped first, and a counter that after_step advances."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        self.opponent = nn.Linear(4, 1)
        self.register_buffer("average", torch.zeros(1, 4))
        self.opponent_moved = False

    def losses(self, batch, step, share=1.0):
        (batch,) = batch
        before = self.opponent.weight.detach().clone()
        yield Losses("opponent", {"opponent": self.opponent(batch.x).square().mean()})
        self.opponent_moved = not torch.equal(before, self.opponent.weight)
        fit = (self.model(batch.x)[:, 0] - batch.x.sum(1)).square().mean()
        size = self.model.weight.square().sum()
        yield Losses("model", {"fit": fit, "size": size}, {"size": 0.1 * step}, {"step_seen": step})

    def warnings(self, record):
        return ["the queue is old"] if record["loss"] > 0 else []

    def after_step(self):
        self.average.lerp_(self.model.weight.detach(), 0.5)


def batches(step):
    while True:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator)
        yield (Batch(x, torch.zeros(8), torch.arange(8 * step, 8 * step + 8)),)
        step += 1


def batches_that(change):
    """``batches`` in which ``change(step, batch)`` may do something to a batch, or raise."""

    def changed(step):
        for number, batch in enumerate(batches(step), step):
            change(number, batch)
            yield batch

    return changed


def kill(at):
    def change(step, batch):
        if step == at:
            raise KeyboardInterrupt

    return batches_that(change)


def poison(at):
    def change(step, batch):
        if step >= at:
            batch[0].x[0, 0] = float("nan")

    return batches_that(change)


def make_loop(folder, steps=12, validate=None, **options):
    folder.mkdir(exist_ok=True)
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
        **{"log_every": 1, "checkpoint_every": 5, **options},
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    return Loop(stage, plan, checkpoints, {"stage": "pretrain"}, RunLog(folder), validate)


def scored(values):
    """A ``validate`` that returns these scores in turn."""
    scores = iter(values)
    return lambda: {"val_f1": next(scores)}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    loop = make_loop(whole)
    assert loop.run(batches)
    with pytest.raises(KeyboardInterrupt):
        make_loop(torn).run(kill(at=7))
    resumed = make_loop(torn)
    resumed.load(load_checkpoint(resumed.checkpoints.latest(), {"stage": "pretrain"}))
    assert resumed.step == 5
    assert resumed.run(batches)
    for name, value in loop.stage.state_dict().items():
        assert torch.equal(value, resumed.stage.state_dict()[name]), name
    assert records(torn)[-1]["loss"] == records(whole)[-1]["loss"]


def test_the_log_holds_what_was_minimised(tmp_path):
    loop = make_loop(tmp_path)
    loop.run(batches)
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        weighted = line["loss_fit"] + line["weight_size"] * line["loss_size"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-6)
        assert line["stage"] == "pretrain" and line["epoch"] == line["step"] / 4
        assert {"loss_opponent", "lr", "lr_opponent", "gradient_norm"} <= set(line)
        assert {"pairs_per_second", "ms_per_step", "data_wait", "memory_gib"} <= set(line)
    assert all(b["seconds"] > a["seconds"] for a, b in itertools.pairwise(lines))


def test_each_optimiser_has_stepped_before_the_next_loss_is_asked_for(tmp_path):
    loop = make_loop(tmp_path, steps=1)
    loop.run(batches)
    assert loop.stage.opponent_moved


def test_checkpoints_are_scored_and_the_best_is_named(tmp_path):
    scores = iter([0.3, 0.9, 0.5])
    loop = make_loop(tmp_path, validate=lambda: {"val_f1": next(scores)})
    loop.run(batches)
    assert loop.checkpoints.best().name == "step-00000010"
    assert [line["val_f1"] for line in records(tmp_path) if "val_f1" in line] == [0.3, 0.9, 0.5]


def test_validation_has_a_schedule_of_its_own(tmp_path):
    loop = make_loop(tmp_path, validate=scored([0.3, 0.9, 0.5, 0.1]), validate_every=4)
    loop.checkpoints.keep = 12
    loop.run(batches)
    assert [line["step"] for line in records(tmp_path) if "val_f1" in line] == [4, 8, 12]
    # Those of the schedule, and each one that was the best when it was scored.
    saved = [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert saved == [f"step-{step:08d}" for step in (4, 5, 8, 10, 12)]
    assert loop.checkpoints.best().name == "step-00000008"


def test_a_line_says_how_the_score_compares_with_the_best(tmp_path, capsys):
    loop = make_loop(tmp_path, validate=scored([0.3, 0.9, 0.5]), validate_every=4, score="val F1")
    loop.run(batches)
    lines = [line for line in capsys.readouterr().out.splitlines() if "val F1" in line]
    assert [line.split("  ")[4] for line in lines] == [
        "val F1 0.300 (best 0.300, step 4)",
        "val F1 0.900 (best 0.900, step 8)",
        "val F1 0.500 (best 0.900, step 8)",
    ]
    assert lines[1].startswith("pretrain  epoch 2/3  step 8/12  loss ")
    assert all(line.endswith(" left") and len(line) <= 100 for line in lines)


def test_the_bar_moves_with_every_step(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(RunLog, "advance", lambda _, step: steps.append(step))
    make_loop(tmp_path, log_every=5).run(batches)
    assert steps == list(range(1, 13))


def test_rates_come_last_and_once(tmp_path, capsys):
    make_loop(tmp_path, flops={"fit": 2e9}).run(batches)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("pretrain: 12 steps in 0:0") and "pairs/s" in last
    assert last.endswith("2 GFLOP per step") and len(last) <= 100
    assert not any("pairs/s" in line or "FLOP" in line for line in lines)


def test_a_stage_ends_when_its_patience_does(tmp_path, capsys):
    options = {"validate_every": 2, "patience": 2}
    loop = make_loop(tmp_path, validate=scored([0.3, 0.9, 0.5, 0.6, 1.0]), **options)
    assert loop.run(batches)
    assert loop.step == 8
    assert loop.checkpoints.latest().name == "step-00000008"
    assert loop.checkpoints.best().name == "step-00000004"
    assert "stopped early, 2 validations after the best" in capsys.readouterr().out
    again = make_loop(tmp_path, **options)
    again.load(load_checkpoint(again.checkpoints.latest(), {"stage": "pretrain"}))
    assert again.finished


def test_without_patience_a_stage_runs_to_its_end(tmp_path):
    loop = make_loop(tmp_path, validate=scored([0.9, *[0.1] * 5]), validate_every=2)
    assert loop.run(batches) and loop.step == 12


def test_a_resumed_run_remembers_the_best_score_and_how_long_ago_it_was(tmp_path):
    scores = dict(zip(range(2, 13, 2), [1, 2, 1, 1, 3, 1], strict=True))

    def validated(folder, kill_at=None, load=False):
        loop = make_loop(
            folder,
            validate=lambda: {"val_f1": float(scores[loop.step])},
            validate_every=2,
            patience=3,
        )
        if load:
            loop.load(load_checkpoint(loop.checkpoints.latest(), {"stage": "pretrain"}))
        if kill_at is None:
            assert loop.run(batches)
        else:
            with pytest.raises(KeyboardInterrupt):
                loop.run(kill(at=kill_at))
        return loop

    whole = validated(tmp_path / "whole")
    validated(tmp_path / "torn", kill_at=7)
    resumed = validated(tmp_path / "torn", load=True)
    assert resumed.scores.state_dict() == whole.scores.state_dict()
    assert resumed.checkpoints.best_step() == whole.checkpoints.best_step() == 10
    for name, value in whole.stage.state_dict().items():
        assert torch.equal(value, resumed.stage.state_dict()[name]), name


def test_a_stop_that_was_asked_for_adds_no_validation(tmp_path):
    def stop(step, batch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    loop = make_loop(tmp_path, validate=scored([0.5]), validate_every=4)
    assert not loop.run(batches_that(stop))
    assert loop.checkpoints.latest().name == "step-00000003"
    assert not any("val_f1" in line for line in records(tmp_path))


def test_the_last_step_is_saved_also_where_it_is_neither_logged_nor_scored(tmp_path):
    make_loop(tmp_path, steps=7, log_every=5, checkpoint_every=0).run(batches)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]
    assert [line["step"] for line in records(tmp_path)] == [5, 7]


def test_sigterm_saves_and_stops(tmp_path):
    loop = make_loop(tmp_path)

    def stop(step, batch):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not loop.run(batches_that(stop))
    assert loop.checkpoints.latest().name == "step-00000004"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_loss_that_broke_is_named_with_its_step_and_samples_and_not_saved(tmp_path):
    loop = make_loop(tmp_path, log_every=3)
    with pytest.raises(RunFailed, match=r"pretrain step 5: loss_opponent, loss_fit are") as error:
        loop.run(poison(at=4))
    assert "samples 32, 33, 34, 35, 36, 37, 38, 39 (manifest rows)" in str(error.value)
    assert "\n" not in str(error.value)
    assert loop.checkpoints.latest() is None
    assert [line["step"] for line in records(tmp_path)] == [3]


def test_the_batch_of_a_loss_that_broke_can_be_replayed(tmp_path):
    loop = make_loop(tmp_path, log_every=3)
    with pytest.raises(RunFailed, match=r"nonfinite/pretrain-step-5\.pt"):
        loop.run(poison(at=4))
    file = tmp_path / "nonfinite" / "pretrain-step-5.pt"
    stored = torch.load(file, weights_only=True)
    assert stored["stage"] == "pretrain" and stored["step"] == 5
    (part,) = stored["batch"]
    assert part["sample_id"].tolist() == list(range(32, 40))
    (losses,) = [
        x for x in Stage().losses((Batch(**part),), torch.tensor(4)) if x.optimiser == "model"
    ]
    assert losses.terms["fit"].isnan()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    loop = make_loop(tmp_path)
    loop.stage.model.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunFailed, match="pretrain step 1: gradient_norm is not finite"):
        loop.run(batches)


def test_what_a_stage_warns_of_is_said_once(tmp_path, capsys):
    loop = make_loop(tmp_path)
    loop.run(batches)
    assert capsys.readouterr().err.count("pretrain: the queue is old") == 1


def test_checkpoints_come_by_the_minute_too(tmp_path, monkeypatch):
    clock = itertools.count(step=20)  # seconds a step
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    loop = make_loop(tmp_path, checkpoint_every=0, checkpoint_minutes=1)
    loop.checkpoints.keep = 12
    loop.run(batches)
    saved = [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert saved == [f"step-{step:08d}" for step in (3, 6, 9, 12)]


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
    assert loop.run(batches)
    told = capsys.readouterr().err
    assert "step 10 cannot be written: No space left on device; continuing without it" in told
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-00000005",
        "step-00000012",
    ]


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run_in_words(tmp_path, monkeypatch):
    loop = make_loop(tmp_path)
    monkeypatch.setattr(Checkpoints, "save", full_disk(12))
    with pytest.raises(InputError, match="pretrain step 12 cannot be written: No space left"):
        loop.run(batches)
    assert loop.checkpoints.load_latest({"stage": "pretrain"})["step"] == 10


def test_the_first_ctrl_c_asks_to_stop_and_the_second_one_ends():
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)
