"""The rungs of the ladder: the published pre-training step, and what makes it this project's.

Each rung changes one thing. From the third on it is ``mics_fast``'s own stage that runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from bench.baselines.albef import albef_of_two
from bench.baselines.published import PublishedStep, published_flops, queues_of
from mics_fast.data.loaders import PairBatch
from mics_fast.engine.capture import CapturedUpdate
from mics_fast.engine.plan import Plan, Stage
from mics_fast.engine.update import Update
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import SIZES
from mics_fast.options.config import PretrainConfig, TrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage
from mics_fast.training.build import finetune_optimisers, pretrain_optimisers
from mics_fast.training.flops import finetune_flops, pretrain_flops
from mics_kernels import multimodal_consistency_loss

Batch = tuple[PairBatch, ...]
Losses = list[dict[str, float]]
"""By name, of one step after the other."""
EXACT, LAGGING, ROUNDED = 1e-4, 1e-2, 3e-2
"""How far a loss may be off, relative (of a loss below 1: absolute): for float32 sums in another
order; where the discriminator has stepped since its singular vectors were taken; for bfloat16.
Measured after four steps of vit_micro and vit_tiny: 4e-6, 3e-3, 3e-3."""


@dataclass(frozen=True)
class Way:
    """How this project's pre-training step is made; the default is the rung nearest to theirs.

    Args:
        adversarial, preset: see ``config.PretrainConfig``.
        written_out: attention with its scores materialised.
        amp: encoders in bfloat16.
        compiled: torch.compile of the encoder blocks.
        fused: the contrastive loss by the operator, else as published.
        cached: frames from memory, else decoded for every step.
        captured: the step replayed as one CUDA graph.
    """

    adversarial: Literal["simultaneous", "alternating"] = "alternating"
    preset: Literal["paper", "turbo"] = "paper"
    written_out: bool = True
    amp: bool = False
    compiled: bool = False
    fused: bool = False
    cached: bool = False
    captured: bool = False


@dataclass
class Rung:
    """One way to make a training step.

    Args:
        name: what it adds.
        step: trains on a batch, given its number; losses by name.
        flops: floating-point operations of a step, as this rung makes it.
        way: of this project; None: published.
        like: the rung whose losses it must give; None: nobody's.
        tolerance: how closely: relative, of a loss below 1 absolute.
        but: a loss that differs by intent, and with it the weights: only the first step's others
            must agree.
    """

    name: str
    step: PublishedStep | EngineStep
    flops: float
    way: Way = Way()
    like: str | None = None
    tolerance: float = EXACT
    but: str = ""


class EngineStep:
    """A stage's step as the training loop makes it, without a log and at one learning rate.

    Args:
        stage: of pre-training or fine-tuning.
        optimisers: by name; "model" comes first.
        written_out: attention with its scores materialised.
        captured: replayed as one CUDA graph.
    """

    def __init__(
        self,
        stage: Stage,
        optimisers: dict[str, Optimizer],
        *,
        written_out: bool = False,
        captured: bool = False,
    ) -> None:
        self.optimisers, self.written_out = optimisers, written_out
        plan = Plan("ladder", 1000, 100, optimisers, warmup=0, clip=0, log_every=1,
                    checkpoint_every=0)  # fmt: skip
        update = Update(stage, plan)
        self.train_on = CapturedUpdate(update) if captured else update

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor | float]:
        """Train on a batch; the losses by name."""
        with sdpa_kernel(SDPBackend.MATH) if self.written_out else nullcontext():
            values = self.train_on(batch, step)
        return {n.removeprefix("loss_"): v for n, v in values.items() if n.startswith("loss_")}

    def release(self) -> None:
        """Give back the memory of the gradients."""
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)


def ladder(
    config: TrainConfig, modalities: Sequence[str], *, amp: bool, compiles: bool
) -> Iterator[Rung]:
    """The rungs, each from the same weights; last, outside the ladder, the turbo preset.

    Args:
        config: of the run; the length of the queue is set, nothing is clipped.
        modalities: names of two.
        amp: whether bfloat16 pays here.
        compiles: whether to make the rung with torch.compile, and those after it compiled.

    On a GPU the last one replays its step as a CUDA graph.
    """
    published = published_flops(config)
    for name, svd, like in (("a", True, None), ("b", False, "a")):
        stage = build_pretraining(config, modalities, Way())
        step = PublishedStep(stage, pretrain_optimisers(stage, fused=None), svd=svd)
        yield Rung(name, step, published, like=like, tolerance=LAGGING)

    def rung(name: str, way: Way, like: str | None, tolerance: float, but: str = "") -> Rung:
        own = replace(config, pretrain=options_of(config, way))
        stage = build_pretraining(config, modalities, way)
        step = EngineStep(
            stage,
            pretrain_optimisers(stage),
            written_out=way.written_out,
            captured=way.captured,
        )
        flops = sum(pretrain_flops(own, stage.size, len(modalities)).values())
        return Rung(name, step, flops, way, like, tolerance, but)

    way = Way()
    yield rung("c, alternating", way, "b", EXACT)
    way = replace(way, adversarial="simultaneous")
    yield rung("c", way, "c, alternating", EXACT, but="adversarial")
    way = replace(way, written_out=False)
    yield rung("d, float32", way, "c", EXACT)
    last, tolerance = "d, float32", EXACT
    if amp:
        way, tolerance = replace(way, amp=True), ROUNDED
        yield rung("d", way, last, tolerance)
        last = "d"
    if compiles:
        compiled = replace(way, compiled=True)
        yield rung("e", compiled, last, tolerance)
        way, last = compiled, "e"
    way = replace(way, fused=True)
    yield rung("f", way, last, tolerance)
    way = replace(way, cached=True)
    yield rung("g", way, "f", EXACT)
    if config.device == "cuda":
        yield rung("h", replace(way, captured=True), "g", EXACT)
    yield rung("turbo", replace(way, preset="turbo"), None, EXACT)


def fine_tuning(
    config: TrainConfig, modalities: Sequence[str], classes: int, *, amp: bool, compiles: bool
) -> Iterator[Rung]:
    """This project's fine-tuning step, eager and, where asked for, compiled."""
    size, options = SIZES[config.model.size], config.finetune
    flops = sum(finetune_flops(config, size, len(modalities), classes).values())
    for compiled in (False, True)[: 1 + compiles]:
        torch.manual_seed(config.seed)
        depth = config.model.fusion_depth
        model = Classifier(size, modalities, classes, pool=config.model.pool, fusion_depth=depth)
        stage = FinetuneStage(
            options, model, num_classes=classes, width=size.width, steps=1000,
            seed=config.seed, autocast=torch.bfloat16 if amp else None,
        ).to(config.device)  # fmt: skip
        if compiled:
            stage.compile_parts("blocks")
        step = EngineStep(stage, finetune_optimisers(model, options))
        way = Way(written_out=False, amp=amp, compiled=compiled, fused=True, cached=True)
        name, like = ("fine-tuning, e", "fine-tuning") if compiled else ("fine-tuning", None)
        yield Rung(name, step, flops, way, like, ROUNDED if amp else EXACT)


def build_pretraining(config: TrainConfig, modalities: Sequence[str], way: Way) -> PretrainStage:
    """A stage with weights from the seed and full queues of random features, nobody's repeats."""
    torch.manual_seed(config.seed)
    options = options_of(config, way)
    assert options.queue_size is not None
    stage = PretrainStage(
        options,
        SIZES[config.model.size],
        modalities,
        pool=config.model.pool,
        projection=config.model.projection,
        queue_size=options.queue_size,
        steps_per_epoch=4,
        seed=config.seed,
        autocast=torch.bfloat16 if way.amp else None,
        contrastive_loss=multimodal_consistency_loss if way.fused else albef_of_two,
    )
    for queue in queues_of(stage):
        queue.enqueue(nn.functional.normalize(torch.randn(queue.features.shape), dim=1))
    if way.compiled:
        stage.compile_parts("blocks")
    return stage.to(config.device)


def options_of(config: TrainConfig, way: Way) -> PretrainConfig:
    """The stage's options with those that a rung sets."""
    return replace(config.pretrain, adversarial=way.adversarial, preset=way.preset)


def losses_of(rung: Rung, batches: Sequence[Batch]) -> Losses:
    """The losses of a rung on these batches, from its first step on."""
    found = [rung.step(batch, number) for number, batch in enumerate(batches)]
    return [{name: float(value) for name, value in values.items()} for values in found]


def disagreement(rung: Rung, losses: Mapping[str, Losses]) -> float:
    """How far a rung's losses are from those it must give, as ``Rung.tolerance`` counts it.

    Raises:
        SystemExit: too far, or a loss is missing; the sentence says which, and where.
    """
    worst = 0.0
    if rung.like is None or not losses.get(rung.like):  # which failed itself
        return worst
    both = list(zip(losses[rung.name], losses[rung.like], strict=True))
    for number, (own, other) in enumerate(both[:1] if rung.but else both):
        if own.keys() != other.keys():
            raise SystemExit(f"rung {rung.name} has losses {sorted(own)}, wanted {sorted(other)}")
        for term, wanted in other.items():
            apart = abs(own[term] - wanted) / max(abs(wanted), 1.0)
            if term == rung.but:
                continue
            if not apart <= rung.tolerance:
                raise SystemExit(
                    f"rung {rung.name} disagrees with {rung.like}: the {term} loss of step "
                    f"{number + 1} is {own[term]:.6g}, wanted {wanted:.6g} within "
                    f"{rung.tolerance:g} of it"
                )
            worst = max(worst, apart)
    return worst
