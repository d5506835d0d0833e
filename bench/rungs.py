"""The rungs of the ladder, from the published pre-training step to this project's.

Each rung changes one thing. From the third on, ``mics_fast``'s own stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from bench.baselines.albef import albef_of_two
from bench.baselines.published import PublishedStep, published_flops, queues_of
from mics_fast.data.batch import PairBatch
from mics_fast.data.manifest import Manifest
from mics_fast.engine.capture import CapturedUpdate
from mics_fast.engine.plan import Plan, Stage
from mics_fast.engine.precision import Precision, pick_precision
from mics_fast.engine.update import Update
from mics_fast.models.sizes import size_of
from mics_fast.options import TrainConfig
from mics_fast.stages.pretrain import PretrainStage
from mics_fast.training.build import (
    build_classifier,
    build_finetuning,
    build_pretraining,
    pretrain_optimisers,
)
from mics_fast.training.flops import finetune_flops, pretrain_flops

Batch = tuple[PairBatch, ...]
Losses = list[dict[str, float]]
"""Losses by name, per step."""
EPOCH = 4
"""Steps per epoch; the teacher's share grows over the first epoch."""
EXACT, LAGGING, ROUNDED = 1e-4, 1e-2, 3e-2
"""Allowed relative difference of a loss (absolute below 1).

For float32 sums in another order; for singular vectors that are older than the discriminator's last
step; for bfloat16. Measured after four steps of vit_micro and vit_tiny: 4e-6, 3e-3, 3e-3.
"""


@dataclass(frozen=True)
class Way:
    """A variant of the pre-training step; the default is closest to the published one.

    Attributes:
        adversarial, preset: see ``PretrainConfig``.
        written_out: attention materialises its scores.
        amp: the encoders compute in bfloat16.
        compiled: torch.compile compiles the blocks.
        fused: the contrastive loss is the fused operator; otherwise the published code.
        cached: frames come from memory; otherwise they are decoded for every step.
        captured: the step is replayed as one CUDA graph.
    """

    adversarial: Literal["simultaneous", "alternating"] = "alternating"
    preset: Literal["paper", "turbo"] = "paper"
    written_out: bool = True
    amp: bool = False
    compiled: bool = False
    fused: bool = False
    cached: bool = False
    captured: bool = False


class Step(Protocol):
    """A training step that can be repeated."""

    @property
    def optimisers(self) -> dict[str, Optimizer]:
        """Optimisers by name; "model" comes first."""

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Tensor | float]:
        """Train on a batch at the given step; return the losses by name."""

    def release(self) -> None:
        """Free the gradients, and everything else kept until the next step."""


@dataclass(frozen=True)
class Rung:
    """A training step of the ladder.

    Attributes:
        name: the change it adds.
        build: makes the step, with weights from the seed.
        flops: floating-point operations that this rung computes per step.
        pairs: rows of the manifest per step.
        kind: a rung of the ladder, a variant outside it, or fine-tuning.
        way: for this project's step; the default for the published one.
        like: the rung whose losses it must reproduce; None: there is none.
        tolerance: of these losses; relative, absolute below 1.
        but: a loss that differs by intent, and with it the weights: only the other losses of the
            first step are compared.
    """

    name: str
    build: Callable[[], Step]
    flops: float
    pairs: int
    kind: Literal["ladder", "variant", "fine-tuning"] = "ladder"
    way: Way = Way()
    like: str | None = None
    tolerance: float = EXACT
    but: str = ""


class EngineStep:
    """A stage's step as in the training loop, without log and at a constant learning rate.

    Args:
        stage: pre-training or fine-tuning.
        optimisers: by name; "model" comes first.
        precision: sets the precision of float32 products, as in the trainer.
        written_out: attention materialises its scores.
        captured: the step is replayed as one CUDA graph.
    """

    def __init__(
        self,
        stage: Stage,
        optimisers: dict[str, Optimizer],
        precision: Precision,
        *,
        written_out: bool = False,
        captured: bool = False,
    ) -> None:
        self.optimisers, self.precision, self.written_out = optimisers, precision, written_out
        plan = Plan("ladder", 1000, 100, optimisers, warmup=0, clip=0, log_every=1,
                    checkpoint_every=0)  # fmt: skip
        update = Update(stage, plan)
        self.train_on = CapturedUpdate(update) if captured else update

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor | float]:
        """Train on a batch; return the losses by name."""
        attention = sdpa_kernel(SDPBackend.MATH) if self.written_out else nullcontext()
        with self.precision.products(), attention:
            values = self.train_on(batch, step)
        return {
            name.removeprefix("loss_"): value
            for name, value in values.items()
            if name.startswith("loss_") and not callable(value)
        }

    def release(self) -> None:
        """Free the gradients."""
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)


def ladder(config: TrainConfig, manifest: Manifest, *, amp: bool, compiles: bool) -> Iterator[Rung]:
    """Yield the rungs in order; last, outside the ladder, the turbo preset.

    Args:
        config: with the length of the queue, and without clipping.
        manifest: of two modalities.
        amp: True if bfloat16 is faster on this machine.
        compiles: include the rung with torch.compile, and compile the later ones.

    On a GPU the last rung replays its step as a CUDA graph.
    """
    pairs = config.pretrain.batch_size
    for name, svd, like in (("a", True, None), ("b", False, "a")):
        yield Rung(name, published(config, manifest, svd=svd), published_flops(config), pairs,
                   like=like, tolerance=LAGGING)  # fmt: skip

    def rung(name: str, way: Way, like: str | None, tolerance: float, but: str = "") -> Rung:
        own = configured(config, way)
        flops = sum(pretrain_flops(own, size_of(own.model), len(manifest.modalities)).values())
        kind: Literal["variant", "ladder"] = "ladder" if way.preset == "paper" else "variant"
        build = pretraining(config, manifest, way)
        return Rung(name, build, flops, pairs, kind, way, like, tolerance, but)

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
        way = replace(way, compiled=True)
        yield rung("e", way, last, tolerance)
        last = "e"
    way = replace(way, fused=True)
    yield rung("f", way, last, tolerance)
    way = replace(way, cached=True)
    yield rung("g", way, "f", EXACT)
    if config.device == "cuda":
        yield rung("h", replace(way, captured=True), "g", EXACT)
    yield rung("turbo", replace(way, preset="turbo"), None, EXACT)


def published(config: TrainConfig, manifest: Manifest, *, svd: bool) -> Callable[[], Step]:
    """Make a builder of the published step."""

    def build() -> Step:
        stage, _ = filled_stage(configured(config, Way()), manifest, precision_of(config, Way()))
        return PublishedStep(stage, pretrain_optimisers(stage, fused=None), svd=svd)

    return build


def pretraining(config: TrainConfig, manifest: Manifest, way: Way) -> Callable[[], Step]:
    """Make a builder of this project's pre-training step in one variant."""

    def build() -> Step:
        precision = precision_of(config, way)
        stage, plan = filled_stage(configured(config, way), manifest, precision)
        if not way.fused:
            stage.contrastive_loss = albef_of_two
        if way.compiled:
            stage.compile_parts("blocks")
        return EngineStep(
            stage,
            plan.optimisers,
            precision,
            written_out=way.written_out,
            captured=way.captured,
        )

    return build


def fine_tuning(
    config: TrainConfig, manifest: Manifest, *, amp: bool, compiles: bool
) -> Iterator[Rung]:
    """Yield this project's fine-tuning step, eager and, on request, compiled."""
    options, size = config.finetune, size_of(config.model)
    sizes = len(manifest.modalities), len(manifest.classes)
    flops = sum(finetune_flops(config, size, *sizes).values())
    pairs = options.labelled_batch + options.unlabelled_batch
    for compiled in (False, True)[: 1 + compiles]:
        way = Way(written_out=False, amp=amp, compiled=compiled, fused=True, cached=True)
        name, like = ("fine-tuning, e", "fine-tuning") if compiled else ("fine-tuning", None)
        build = tuning(config, manifest, way)
        tolerance = ROUNDED if amp else EXACT
        yield Rung(name, build, flops, pairs, "fine-tuning", way, like, tolerance)


def tuning(config: TrainConfig, manifest: Manifest, way: Way) -> Callable[[], Step]:
    """Make a builder of this project's fine-tuning step."""

    def build() -> Step:
        precision, device = precision_of(config, way), torch.device(config.device)
        model = build_classifier(config, manifest)
        rows = EPOCH * config.finetune.unlabelled_batch
        stage, plan = build_finetuning(config, manifest, model, rows, precision, device)
        if way.compiled:
            stage.compile_parts("blocks")
        return EngineStep(stage, plan.optimisers, precision)

    return build


def configured(config: TrainConfig, way: Way) -> TrainConfig:
    """Apply a variant to the options, without the balance, which the published step lacks."""
    options = replace(
        config.pretrain,
        adversarial=way.adversarial,
        adversarial_balance="fixed",
        preset=way.preset,
    )
    return replace(config, pretrain=options)


def precision_of(config: TrainConfig, way: Way) -> Precision:
    """Return the trainer's precision for a variant."""
    return pick_precision("bf16" if way.amp else "fp32", torch.device(config.device))


def filled_stage(
    config: TrainConfig, manifest: Manifest, precision: Precision
) -> tuple[PretrainStage, Plan]:
    """Build the trainer's stage with queues full of random, distinct features."""
    device = torch.device(config.device)
    rows = EPOCH * config.pretrain.batch_size
    stage, plan = build_pretraining(config, manifest, rows, precision, device)
    for queue in queues_of(stage):
        features = nn.functional.normalize(torch.randn(queue.features.shape), dim=1)
        queue.enqueue(features.to(device))
    return stage, plan


def losses_of(step: Step, batches: Sequence[Batch]) -> Losses:
    """Return the losses of a step on these batches, from its first step on."""
    return [
        {name: float(value) for name, value in step(batch, number).items()}
        for number, batch in enumerate(batches)
    ]


def disagreement(rung: Rung, losses: Mapping[str, Losses]) -> float:
    """Return the largest difference of a rung's losses from those of its reference rung.

    Raises:
        ValueError: a difference is too large, or a loss is missing; names the loss and the step.
    """
    worst = 0.0
    if rung.like is None or not losses.get(rung.like):  # the other one failed
        return worst
    both = list(zip(losses[rung.name], losses[rung.like], strict=True))
    for number, (own, other) in enumerate(both[:1] if rung.but else both):
        if own.keys() != other.keys():
            raise ValueError(f"rung {rung.name} has losses {sorted(own)}, wanted {sorted(other)}")
        for term, wanted in other.items():
            apart = abs(own[term] - wanted) / max(abs(wanted), 1.0)
            if term == rung.but:
                continue
            if not apart <= rung.tolerance:
                raise ValueError(
                    f"rung {rung.name} disagrees with {rung.like}: the {term} loss of step "
                    f"{number + 1} is {own[term]:.6g}, wanted {wanted:.6g} within "
                    f"{rung.tolerance:g} of it"
                )
            worst = max(worst, apart)
    return worst
