"""The training ladder: its rungs do the same, and it would tell if they did not."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import rungs, training
from mics_fast.data.loaders import PairBatch
from mics_fast.models.sizes import SIZES, Size
from mics_fast.options.config import ModelConfig, PretrainConfig, TrainConfig

TINY = Size(
    image=16, patch=4, width=16, depth=2, heads=2,
    decoder_width=16, decoder_depth=1, decoder_heads=2,
    discriminator_width=16, discriminator_depth=2, discriminator_heads=2,
)  # fmt: skip
MODALITIES = ("wli", "nbi")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Networks of 16 pixels."""
    monkeypatch.setitem(SIZES, "vit_micro", TINY)


@pytest.fixture
def config():
    return TrainConfig(
        device="cpu",
        model=ModelConfig(size="vit_micro", projection=8, fusion_depth=1),
        pretrain=PretrainConfig(batch_size=4, queue_size=32, clip=0.0),
    )


@pytest.fixture
def batches():
    """Four batches of rows that are all different."""
    generator = torch.Generator().manual_seed(0)

    def batch(first: int) -> tuple[PairBatch]:
        views = {name: torch.randn(4, 3, 16, 16, generator=generator) for name in MODALITIES}
        ids = torch.arange(first, first + 4)
        flags = torch.ones(4, dtype=torch.bool)
        present = torch.ones(4, 2, dtype=torch.bool)
        return (PairBatch(views, None, present, ids % 3, flags, ids, ids),)

    return [batch(first) for first in (0, 4, 8, 12)]


def rungs_of(config, amp=False):
    return rungs.ladder(config, MODALITIES, amp=amp, compiles=False)


def test_the_published_step_has_the_losses_of_this_project_s(config, batches):
    losses, apart = {}, {}
    for rung in rungs_of(config, amp=True):
        losses[rung.name] = rungs.losses_of(rung, batches)
        apart[rung.name] = rungs.disagreement(rung, losses)
    assert list(losses) == ["a", "b", "c, alternating", "c", "d, float32", "d", "f", "g", "turbo"]
    assert max(apart[name] for name in ("c, alternating", "c", "d, float32")) < 1e-5
    assert losses["b"][0].keys() == losses["c"][0].keys()


def test_a_decomposition_finds_what_the_power_iteration_has_converged_to(config, batches):
    """As long as the discriminator's weights stand still."""
    config.pretrain.discriminator_lr = 1e-12
    first_two = islice(rungs_of(config), 2)
    a, b = (rungs.losses_of(rung, batches[:2]) for rung in first_two)
    for own, other in zip(a, b, strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def test_a_rung_that_computes_something_else_is_caught(config, batches):
    losses = {}
    for rung in rungs_of(config):
        losses[rung.name] = rungs.losses_of(rung, batches[:2])
        if rung.name == "c, alternating":
            break
    wrong = replace(config, pretrain=replace(config.pretrain, temperature=0.0701))
    spoilt = next(r for r in rungs_of(wrong) if r.name == "c, alternating")
    losses[rung.name] = rungs.losses_of(spoilt, batches[:2])
    with pytest.raises(SystemExit, match=r"c, alternating disagrees with b: the consistency loss"):
        rungs.disagreement(rung, losses)
    losses[rung.name] = [{"consistency": float("nan")} for _ in range(2)]
    with pytest.raises(SystemExit, match="has losses"):
        rungs.disagreement(rung, losses)
    losses[rung.name] = [dict.fromkeys(losses["b"][0], float("nan")) for _ in range(2)]
    with pytest.raises(SystemExit, match="is nan"):
        rungs.disagreement(rung, losses)


def test_the_published_step_costs_what_it_runs(config, batches):
    rung = next(rungs_of(config))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rung.step(batches[0], 0)
    assert counter.get_total_flops() == pytest.approx(rung.flops, rel=1e-3)


def test_the_published_step_trains_what_its_code_did_not(config, batches):
    """Its discriminator's attention learns, and its alignment reaches the encoder (audit E)."""
    config.pretrain = replace(config.pretrain, consistency_weight=0.0, reconstruction_weight=0.0)
    rung = next(rungs_of(config))
    stage = rung.step.stage
    before = stage.discriminator.blocks[0].points.weight.clone()
    rung.step(batches[0], 0)
    assert (stage.discriminator.blocks[0].points.weight - before).abs().max() > 1e-4
    assert stage.model.encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_fine_tuning_costs_and_trains(config, batches):
    config.finetune.labelled_batch = config.finetune.unlabelled_batch = 4
    (rung,) = rungs.fine_tuning(config, MODALITIES, 3, amp=False, compiles=False)
    (unlabelled,) = batches[1]
    unlabelled = replace(unlabelled, strong=unlabelled.views)
    (losses,) = rungs.losses_of(rung, [(*batches[0], unlabelled)])
    assert losses["supervised"] > 0 and rung.flops > 0


class Step:
    """A step of nothing, with this loss; None: one that ends with an error."""

    def __init__(self, loss: float | None) -> None:
        weight = torch.zeros(10, requires_grad=True)
        self.loss, self.optimisers = loss, {"model": torch.optim.AdamW([weight])}

    def __call__(self, batch: Any, step: int) -> dict[str, float]:
        if self.loss is None:
            raise RuntimeError("out of memory")
        return {"consistency": self.loss}

    def release(self) -> None:
        pass


@pytest.fixture
def ladder_of(monkeypatch, batches):
    """Rows of a ladder of such steps, given their losses: each is held against the one before. One
    of infinite loss cannot be built; after the ladder comes a fine-tuning step."""

    def rows(end: float = math.inf, **losses: float | None) -> dict[str, dict[str, Any]]:
        names = list(losses)

        def made(*arguments: object, **options: object) -> Iterator[rungs.Rung]:
            for name, before in zip(names, [None, *names], strict=False):
                if losses[name] == math.inf:
                    raise RuntimeError("no room for weights")
                yield rungs.Rung(name, Step(losses[name]), 1e6, like=before)  # type: ignore[arg-type]

        monkeypatch.setattr(training, "ladder", made)
        tuning = rungs.Rung("fine-tuning", Step(1.0), 1e6)  # type: ignore[arg-type]
        monkeypatch.setattr(training, "fine_tuning", lambda *arguments, **options: iter([tuning]))
        monkeypatch.setattr(training, "product", lambda device, dtype: 1e12)
        monkeypatch.setattr(training, "flops_of", lambda device, dtype, threads: 1e9)
        monkeypatch.setattr(training, "bandwidth_of", lambda device, size, threads: 1e6)
        streams = {name: cycle(batches) for name in ("decoded", "cached", "tuning")}
        monkeypatch.setattr(training, "loaders_of", lambda *arguments: streams)
        given = argparse.Namespace(device="cpu", size="vit_micro", batch=4, quick=True, end=end)
        manifest = SimpleNamespace(modalities=MODALITIES, classes=("x", "y"))
        monkeypatch.setattr(training, "take_turns", lambda rungs, *arguments: (
            {name: [(0.002, 0.001, 0.0), (0.004, 0.001, 0.0)] for name in rungs}, 1.0))  # fmt: skip
        return {row["rung"]: row for row in training.table(manifest, given)}  # type: ignore[arg-type]

    return rows


def test_the_floor_of_a_step_is_its_flops_over_the_peak_or_its_weights_over_the_bandwidth(
    ladder_of,
):
    row = ladder_of(a=1.0)["a"]
    assert row["bytes"] == 6 * 40 and row["flops"] == 1e6
    assert row["floor_ms"] == pytest.approx(1.0)  # 1e6 / 1e9 s; the weights take 0.24 ms
    assert row["ms"] == pytest.approx(3.0) and row["share_of_floor"] == pytest.approx(1 / 3)
    assert row["p20_ms"] < row["ms"] < row["p80_ms"]


def test_a_rung_that_fails_or_disagrees_is_left_out_and_those_after_it_are_still_held(ladder_of):
    found = ladder_of(a=1.0, b=None, c=1.0, d=1.5, e=1.0, f=1.6)
    assert found["b"]["absent"] == "RuntimeError: out of memory"
    assert "rung d disagrees with c" in found["d"]["absent"]
    assert "rung f disagrees with e" in found["f"]["absent"]
    assert [name for name, row in found.items() if "ms" in row] == ["a", "c", "e", "fine-tuning"]
    assert all(found[name]["failed"] for name in "bdf")


def test_rungs_that_cannot_be_built_are_told_and_fine_tuning_goes_on(ladder_of):
    found = ladder_of(a=1.0, b=math.inf, c=1.0)
    assert list(found) == ["a", "ladder, after a", "fine-tuning"]
    untold = found["ladder, after a"]
    assert untold["failed"] and untold["absent"] == "RuntimeError: no room for weights"
    assert "ms" in found["fine-tuning"] and found["fine-tuning"]["x_ms"] == 1.0
    assert ladder_of(a=math.inf)["fine-tuning"]["x_ms"] is None


def test_a_rung_that_no_time_is_left_for_says_so(ladder_of):
    assert ladder_of(end=0.0, a=1.0)["a"]["absent"] == "no time was left"
