"""The fine-tuning step on kept features, where the losses are most of the step.

All terms are on; features are random, as wide as those of a ViT-S, of two modalities; a quarter of
a batch is labelled. The rungs differ in the losses alone, the reference in plain PyTorch or this
project's operators, and in whether networks and losses are compiled as one graph.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from bench.case import in_a_line
from bench.rows import Options, Row
from bench.rungs import Batch, EngineStep
from bench.timing import percentiles
from mics_fast.data.batch import PairBatch
from mics_fast.engine.precision import pick_precision
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import SIZES
from mics_fast.options import FinetuneConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.training.build import finetune_optimisers

BACKEND = "MICS_KERNELS_BACKEND"
MODALITIES = ("wli", "nbi")
CLASSES = (8, 23, 1000)
BATCHES = (64, 256, 1024, 4096)
LEAST_ROUNDS = 5
SIZE = SIZES["vit_small"]
TOLERANCE = 1e-3  # of a loss of the first step, from the reference's
REFERENCE, COMPILED = "reference losses", "reference losses, compiled"
FUSED, BOTH = "fused operators", "fused operators, compiled"
OURS = (FUSED, BOTH)
TURN = 0.05
"""Seconds of timed steps in a row, as in training, after one that is not timed."""


def rows(options: Options) -> Iterator[Row]:
    """Yield a row per number of classes, batch and rung; quick: the smallest and largest batch."""
    batches = BATCHES if options.full else (BATCHES[0], BATCHES[-1])
    for classes in CLASSES:
        for batch in batches:
            label: Row = {
                "operator": "features",
                "shape": f"{classes} classes, batch {batch}",
                "batch": batch,
                "threads": options.threads,
            }
            if time.monotonic() > options.end:
                yield {**label, "implementation": "all", "absent": "no time was left"}
                continue
            try:
                yield from measured(label, classes, options)
            except Exception as error:  # the other sizes are still measured
                traceback.print_exc()
                reason = in_a_line(error)
                yield {**label, "implementation": "all", "absent": reason, "failed": True}


def measured(label: Row, classes: int, options: Options) -> Iterator[Row]:
    """Time the rungs of one size in turn.

    Raises:
        ValueError: the losses of a rung are not those of the reference.
    """
    device = options.device
    batch = random_batch(label["batch"], classes, device)
    steps = {name: step_of(name, classes, device) for name in (REFERENCE, COMPILED, *OURS)}
    first: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        with losses_of(name):
            first[name] = {term: float(own) for term, own in step(batch, 0).items()}
        check(name, first[name], first[REFERENCE])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    end, number = time.monotonic() + options.budget, 1
    while number <= LEAST_ROUNDS or time.monotonic() < end:
        for name, step in steps.items():
            with losses_of(name):
                times[name] += turn(step, batch, number, device)
        number += 1
    found = {name: percentiles(own) for name, own in times.items()}
    for name, row in found.items():
        ratio = row["median_ms"] / found[FUSED]["median_ms"]
        own = {"implementation": name, "ours": name in OURS, "rounds": number, "ratio": ratio}
        print(f"{label['shape']:26} {name:26} {row['median_ms']:9.3f} ms {ratio:5.1f}x", flush=True)
        yield {**label, **row, **own}  # type: ignore[typeddict-item]


def check(name: str, losses: Mapping[str, float], true: Mapping[str, float]) -> None:
    """Compare the losses of a rung with the reference's, absolutely below 1.

    Raises:
        ValueError: one is further off than the tolerance.
    """
    for term, wanted in true.items():
        if not abs(losses[term] - wanted) <= TOLERANCE * max(1.0, abs(wanted)):
            raise ValueError(f"{name}: the {term} loss is {losses[term]:g}, wanted {wanted:g}")


def turn(
    step: EngineStep, batch: Batch, number: int, device: torch.device
) -> list[tuple[float, float]]:
    """Run steps in a row, at least two; return the times of all but the first."""
    seconds(step, batch, number, device)
    found: list[tuple[float, float]] = []
    end = time.monotonic() + TURN
    while not found or time.monotonic() < end:
        found.append(seconds(step, batch, number, device))
    return found


def seconds(
    step: EngineStep, batch: Batch, number: int, device: torch.device
) -> tuple[float, float]:
    """Measure wall and CPU time of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step(batch, number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def step_of(name: str, classes: int, device: torch.device) -> EngineStep:
    """Build the step of a rung, with weights from a fixed seed."""
    torch.manual_seed(0)
    config = FinetuneConfig(encoder="frozen")
    model = Classifier(SIZE, MODALITIES, classes, pool="cls", fusion_depth=1, pooled="mlp")
    stage = FinetuneStage(
        config, model, num_classes=classes, width=SIZE.width, steps=1000, seed=0
    ).to(device)
    if name in (COMPILED, BOTH):
        stage.compile_parts("step")
    precision = pick_precision("fp32", device)
    return EngineStep(stage, finetune_optimisers(model, config), precision)


@contextmanager
def losses_of(name: str) -> Iterator[None]:
    """Choose the implementation of the operators for a rung."""
    before = os.environ.pop(BACKEND, None)
    if name not in OURS:
        os.environ[BACKEND] = "reference"
    try:
        yield
    finally:
        os.environ.pop(BACKEND, None)
        if before is not None:
            os.environ[BACKEND] = before


def random_batch(rows: int, classes: int, device: torch.device) -> Batch:
    """Draw a batch: a labelled quarter, and the unlabelled rest with a strong view."""
    generator = torch.Generator().manual_seed(0)
    first = 0

    def part(count: int, *, strong: bool) -> PairBatch:
        nonlocal first
        ids = torch.arange(first, first + count, device=device)
        first += count

        def views() -> dict[str, torch.Tensor]:
            shape = (count, SIZE.width)
            return {n: torch.randn(shape, generator=generator).to(device) for n in MODALITIES}

        return PairBatch(
            views=views(),
            strong=views() if strong else None,
            present=torch.ones(count, len(MODALITIES), dtype=torch.bool, device=device),
            label=torch.randint(classes, (count,), generator=generator).to(device),
            labelled=torch.full((count,), not strong, device=device),
            sample_id=ids,
            group_id=ids,
        )

    return part(rows // 4, strong=False), part(rows - rows // 4, strong=True)
