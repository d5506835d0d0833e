"""The training ladder: its rungs do the same, and one that did not would be reported."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import rungs, training
from bench.baselines.albef import albef_of_two
from bench.rows import Options
from mics_fast.common.errors import InputError
from mics_fast.data.batch import PairBatch
from mics_fast.engine.capture import WARM_UP
from mics_fast.models.sizes import SIZES, Size
from mics_fast.options import ModelConfig, PretrainConfig, TrainConfig

TINY = Size(
    image=16, patch=4, width=16, depth=2, heads=2,
    decoder_width=16, decoder_depth=1, decoder_heads=2,
    discriminator_width=16, discriminator_depth=2, discriminator_heads=2,
)  # fmt: skip
MODALITIES = ("wli", "nbi")
MANIFEST: Any = SimpleNamespace(modalities=MODALITIES, classes=("a", "b", "c"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Networks of 16 pixels."""
    monkeypatch.setitem(SIZES, "vit_micro", TINY)


@pytest.fixture
def config():
    return TrainConfig(
        device="cpu",
        model=ModelConfig(size="vit_micro", projection=8, fusion_depth=1),
        pretrain=PretrainConfig(batch_size=4, queue_size=32, clip=0.0, adversarial_weight=0.1),
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
    return rungs.ladder(config, MANIFEST, amp=amp, compiles=False)


def test_the_published_step_has_the_losses_of_this_project_s(config, batches):
    losses, apart = {}, {}
    for rung in rungs_of(config, amp=True):
        losses[rung.name] = rungs.losses_of(rung.build(), batches)
        apart[rung.name] = rungs.disagreement(rung, losses)
    assert list(losses) == ["a", "b", "c, alternating", "c", "d, float32", "d", "f", "g", "turbo"]
    assert max(apart[name] for name in ("c, alternating", "c", "d, float32")) < 1e-5
    assert losses["b"][0].keys() == losses["c"][0].keys()


def test_a_decomposition_finds_what_the_power_iteration_has_converged_to(config, batches):
    """The losses agree while the discriminator's weights are unchanged."""
    config.pretrain.discriminator_lr = 1e-12
    first_two = islice(rungs_of(config), 2)
    a, b = (rungs.losses_of(rung.build(), batches[:2]) for rung in first_two)
    for own, other in zip(a, b, strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def test_a_rung_that_computes_something_else_is_caught(config, batches):
    losses = {}
    for rung in rungs_of(config):
        losses[rung.name] = rungs.losses_of(rung.build(), batches[:2])
        if rung.name == "c, alternating":
            break
    wrong = replace(config, pretrain=replace(config.pretrain, temperature=0.0701))
    spoilt = next(r for r in rungs_of(wrong) if r.name == "c, alternating")
    losses[rung.name] = rungs.losses_of(spoilt.build(), batches[:2])
    with pytest.raises(ValueError, match=r"c, alternating disagrees with b: the consistency loss"):
        rungs.disagreement(rung, losses)
    losses[rung.name] = [{"consistency": float("nan")} for _ in range(2)]
    with pytest.raises(ValueError, match="has losses"):
        rungs.disagreement(rung, losses)
    losses[rung.name] = [dict.fromkeys(losses["b"][0], float("nan")) for _ in range(2)]
    with pytest.raises(ValueError, match="is nan"):
        rungs.disagreement(rung, losses)


def test_the_published_step_costs_what_it_runs(config, batches):
    rung = next(rungs_of(config))
    step = rung.build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(batches[0], 0)
    assert counter.get_total_flops() == pytest.approx(rung.flops, rel=1e-3)


def test_the_published_step_trains_what_its_code_did_not(config, batches):
    """Its discriminator's attention learns, and its alignment reaches the encoder."""
    config.pretrain = replace(config.pretrain, consistency_weight=0.0, reconstruction_weight=0.0)
    step = next(rungs_of(config)).build()
    stage = step.stage
    before = stage.discriminator.blocks[0].points.weight.clone()
    step(batches[0], 0)
    assert (stage.discriminator.blocks[0].points.weight - before).abs().max() > 1e-4
    assert stage.model.encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_fine_tuning_costs_and_trains(config, batches):
    config.finetune.labelled_batch = config.finetune.unlabelled_batch = 4
    (rung,) = rungs.fine_tuning(config, MANIFEST, amp=False, compiles=False)
    (unlabelled,) = batches[1]
    unlabelled = replace(unlabelled, strong=unlabelled.views)
    (losses,) = rungs.losses_of(rung.build(), [(*batches[0], unlabelled)])
    assert losses["supervised"] > 0 and rung.flops > 0


@pytest.mark.parametrize(("name", "products"), [("c", "highest"), ("d", "high")])
def test_a_rung_multiplies_float32_as_the_trainer_does(
    name, products, config, batches, monkeypatch
):
    """Beside bfloat16 a GPU may round the discriminator's products to TF32."""
    seen = []

    def spy(*arguments, **options):
        seen.append(torch.get_float32_matmul_precision())
        return albef_of_two(*arguments, **options)

    monkeypatch.setattr(rungs, "albef_of_two", spy)
    rung = next(rung for rung in rungs_of(config, amp=True) if rung.name == name)
    rung.build()(batches[0], 0)
    assert seen == [products] and torch.get_float32_matmul_precision() == "highest"


class Step:
    """A step of nothing.

    Args:
        loss: what it gives; None: it raises an error.
        later: what it gives once a captured step is replayed.
        gone: is called when the step is freed.
    """

    def __init__(self, loss: float | None, later: float | None, gone: Any) -> None:
        weight = torch.zeros(10, requires_grad=True)
        self.loss, self.later, self.optimisers = loss, later, {"model": torch.optim.AdamW([weight])}
        self.kept = False
        weakref.finalize(self, gone)

    def __call__(self, batch: Any, step: int) -> dict[str, float]:
        if self.loss is None:
            raise RuntimeError("out of memory")
        assert not self.kept or step < training.CHECKED, "the step before was not released"
        self.kept = True
        return {"consistency": self.loss if step <= WARM_UP else self.later or self.loss}

    def release(self) -> None:
        self.kept = False


@pytest.fixture
def ladder_of(monkeypatch, batches):
    """Rows of a ladder of such steps, by name; each is compared with the one before.

    A loss is given for each rung, or two: the second one for steps that would be replayed. A rung
    of infinite loss cannot be built. A fine-tuning step comes after the ladder.
    """
    alive = [0]

    def build(loss: Any) -> Step:
        if loss == math.inf:
            raise RuntimeError("no room for weights")
        alive[0] += 1
        assert alive[0] == 1, "two rungs are in memory"

        def gone() -> None:
            alive[0] -= 1

        return Step(*(loss if isinstance(loss, tuple) else (loss, None)), gone)

    def rows(end: float = math.inf, full: bool = False, **losses: Any) -> dict[str, dict[str, Any]]:
        def made(*arguments: object, **options: object) -> Iterator[rungs.Rung]:
            for name, before in zip(losses, [None, *losses], strict=False):
                yield rungs.Rung(name, partial(build, losses[name]), 1e6, 4, like=before)

        tuning = rungs.Rung("fine-tuning", partial(build, 1.0), 1e6, 4, "fine-tuning")
        monkeypatch.setattr(training, "ladder", made)
        monkeypatch.setattr(training, "fine_tuning", lambda *arguments, **options: iter([tuning]))
        monkeypatch.setattr(training, "product", lambda device, dtype: 1e12)
        monkeypatch.setattr(training, "flops_of", lambda device, dtype, threads: 1e9)
        monkeypatch.setattr(training, "bandwidth_of", lambda device, size, threads: 1e6)
        frames = training.Frames(cycle(batches), cycle(batches), cycle(batches))
        monkeypatch.setattr(training, "frames_of", lambda *arguments: frames)
        device = torch.device("cpu")
        options = Options(device, full=full, threads=1, budget=1.0, end=end)
        config = training.config_of("vit_micro", device)
        found = training.table(MANIFEST, config, options)
        gc.disable()  # what is freed is freed by the ladder
        try:
            return {row["rung"]: dict(row) for row in found}
        finally:
            gc.enable()

    def timed(step: Any, loader: Any, device: Any, number: int) -> training.Timing:
        step.release()
        step(next(loader), number)
        return training.Timing(*next(seconds), 0.001, 0.0)

    seconds = cycle([(6.0,), (8.0,)])
    monkeypatch.setattr(training, "timed_step", timed)
    return rows


def test_the_floor_of_a_step_is_its_flops_over_the_peak_or_its_weights_over_the_bandwidth(
    ladder_of,
):
    row = ladder_of(a=1.0)["a"]
    assert row["bytes"] == 6 * 40 and row["flops"] == 1e6
    assert row["floor_ms"] == pytest.approx(1.0)  # 1e6 / 1e9 s; the weights take 0.24 ms
    assert 6e3 <= row["ms"] <= 8e3 and row["share_of_floor"] == pytest.approx(1.0 / row["ms"])
    assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
    assert row["pairs_per_second"] == pytest.approx(4e3 / row["ms"])


def test_a_rung_that_fails_or_disagrees_is_left_out_and_those_after_it_are_still_compared(
    ladder_of,
):
    found = ladder_of(a=1.0, b=None, c=1.0, d=1.5, e=1.0, f=1.6)
    assert found["b"]["absent"] == "RuntimeError: out of memory"
    assert "rung d disagrees with c" in found["d"]["absent"]
    assert "rung f disagrees with e" in found["f"]["absent"]
    assert [name for name, row in found.items() if "ms" in row] == ["a", "c", "e", "fine-tuning"]
    assert all(found[name]["failed"] for name in "bdf")


def test_one_rung_is_in_memory_at_a_time_through_all_turns_also_after_a_failure(ladder_of):
    found = ladder_of(full=True, a=1.0, b=None, c=1.0, d=1.0)
    assert [name for name, row in found.items() if "ms" in row] == ["a", "c", "d", "fine-tuning"]
    assert found["a"]["rounds"] == 3 * training.LEAST


def test_a_step_that_goes_wrong_when_it_is_replayed_is_caught_also_by_a_quick_run(ladder_of):
    found = ladder_of(g=1.0, h=(1.0, 1.5))
    assert "rung h disagrees with g" in found["h"]["absent"]
    assert f"step {WARM_UP + 2}" in found["h"]["absent"]


def test_a_rung_that_cannot_be_built_is_reported_and_the_others_are_measured(ladder_of):
    found = ladder_of(a=1.0, b=math.inf, c=1.0)
    assert found["b"]["failed"] and found["b"]["absent"] == "RuntimeError: no room for weights"
    assert [name for name, row in found.items() if "ms" in row] == ["a", "c", "fine-tuning"]
    assert found["fine-tuning"]["x_ms"] == pytest.approx(1, rel=0.4)
    assert ladder_of(a=math.inf)["fine-tuning"]["x_ms"] is None


def test_a_rung_that_no_time_is_left_for_says_so(ladder_of):
    assert ladder_of(end=0.0, a=1.0)["a"]["absent"] == "no time was left"


def test_without_dali_every_rung_has_random_frames(monkeypatch):
    def missing() -> None:
        raise InputError("DALI cannot be imported")

    monkeypatch.undo()  # of the networks of 16 pixels
    monkeypatch.setattr(training, "check_dali", missing)
    device = torch.device("cpu")
    frames = training.frames_of(MANIFEST, training.config_of("vit_micro", device), device)
    (pairs,) = next(frames.decoded)
    labelled, unlabelled = next(frames.tuning)
    assert pairs.views["nbi"].shape == (32, 3, 64, 64) and pairs.strong is None
    assert len(labelled.label) == 8 and unlabelled.strong is not None
    assert set(pairs.label.tolist()) == {0, 1, 2} and len(set(pairs.sample_id.tolist())) == 32
    assert next(frames.decoded)[0].sample_id[0] == 32
