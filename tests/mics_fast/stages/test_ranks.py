"""Several ranks, each with its slice of the batch, make the steps of one rank with all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, multiprocessing

from mics_fast.data.loaders import PairBatch
from mics_fast.engine.gradients import GradientAverager
from mics_fast.engine.update import computed
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import Size
from mics_fast.options import FinetuneConfig, PretrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage

STEPS = 3
ACCEPT_MANY = {"max_uncertainty": 0.6, "min_probability": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "pretrain: alternating": {"adversarial": "alternating"},
    "pretrain: no balance": {"adversarial_balance": "fixed"},
    "pretrain: turbo": {"preset": "turbo"},
    "pretrain: consistency alone": {"adversarial_weight": 0.0, "reconstruction_weight": 0.0},
    "diagonal": {**ACCEPT_MANY, "modality_dropout": 0.3},
    "low-rank": {**ACCEPT_MANY, "shift": "low-rank", "shift_rank": 9},
    "closed-form": {**ACCEPT_MANY, "shift": "closed-form"},
    "pretrain: a compiled step": {},
    "a compiled step": {**ACCEPT_MANY, "modality_dropout": 0.3},
    "labels alone": {"unlabelled_weight": 0.0, "modality_consistency_weight": 0.0},
}


def make_stage(case: str, size: Size) -> PretrainStage | FinetuneStage:
    torch.manual_seed(0)
    if case.startswith("pretrain"):
        return PretrainStage(
            PretrainConfig(**{"teacher_momentum": 0.9, "adversarial_weight": 0.1, **CASES[case]}),
            size,
            ("wli", "nbi"),
            pool="mean",
            projection=8,
            queue_size=20,  # runs over: 12 rows a step, fewer where modalities are missing
            steps_per_epoch=2,
            seed=0,
        ).double()
    model = Classifier(size, ("wli", "nbi"), 3, pool="mean", fusion_depth=1)
    with torch.no_grad():
        for head in model.heads.values():  # opinions that differ, some of them sure
            head.weight *= 50
            head.bias += 4
    return FinetuneStage(
        FinetuneConfig(ema_momentum=0.9, shift_strength=5.0, **CASES[case]),
        model,
        num_classes=3,
        width=size.width,
        steps=8,
        seed=0,
    ).double()


def of_rank(batch: PairBatch, rank: int, ranks: int) -> PairBatch:
    """A rank's contiguous slice of a batch, in float64."""

    def own(values: Tensor) -> Tensor:
        share = len(values) // ranks
        return values[rank * share : (rank + 1) * share]

    def views(images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: own(image).double() for name, image in images.items()}

    return PairBatch(
        views=views(batch.views),
        strong=views(batch.strong) if batch.strong else None,
        present=own(batch.present),
        label=own(batch.label),
        labelled=own(batch.labelled),
        sample_id=own(batch.sample_id),
        group_id=own(batch.group_id),
    )


def train(
    stage: PretrainStage | FinetuneStage, batches: list[tuple[PairBatch, ...]]
) -> dict[str, Tensor]:
    """Run some steps; return losses, gradients and the state of the stage."""
    left: dict[str, Tensor] = {}
    parts = {"model": stage.model}
    if isinstance(stage, PretrainStage):
        parts["discriminator"] = stage.discriminator
    trained = {name: [p for p in m.parameters() if p.requires_grad] for name, m in parts.items()}
    # Buckets of some parameters each, so that there is an order to keep.
    averagers = {name: GradientAverager(p, bucket_bytes=10_000) for name, p in trained.items()}
    optimisers = {name: torch.optim.SGD(p, lr=0.05) for name, p in trained.items()}
    for step, batch in enumerate(batches):
        for losses in stage.losses(batch, torch.tensor(step + 4)):
            optimiser = optimisers[losses.optimiser]
            optimiser.zero_grad()
            with averagers[losses.optimiser].averaging():
                losses.total().backward()
            for name, parameter in parts[losses.optimiser].named_parameters():
                if parameter.grad is not None:
                    left[f"{step} gradient {losses.optimiser}.{name}"] = parameter.grad.clone()
            left |= {f"{step} loss {name}": t.detach() for name, t in losses.terms.items()}
            left |= {
                f"{step} metric {name}": torch.as_tensor(value, dtype=torch.float64)
                for name, value in losses.metrics.items()
            }
            more = computed(dict(losses.on_log))
            left |= {f"{step} metric {n}": torch.as_tensor(own).double() for n, own in more.items()}
            optimiser.step()
        stage.after_step()
    return left | {f"state {name}": value for name, value in stage.state_dict().items()}


def train_on_a_rank(
    rank: int, ranks: int, size: Size, batches: Mapping[str, Any], folder: Path
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    for case in CASES:
        own = [tuple(of_rank(part, rank, ranks) for part in batch) for batch in batches[case]]
        stage = make_stage(case, size)
        if "compiled" in case and ranks == 2:  # it takes its time; into what, is of no interest
            with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
                stage.compile_parts("step")
        torch.save(train(stage, own), folder / f"{case}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture
def batches(make_batch):
    """Batches of 12 (labelled 6) rows for each case; some modalities are missing, unevenly."""

    def gappy(rows, seed, **options):
        batch = make_batch(rows, seed=seed, first_id=5 * seed, **options)
        present = batch.present.clone()
        present[0, 0] = present[1, 1] = present[2, 1] = present[rows // 2, 0] = False
        nowhere = {n: torch.where(present[:, i, None, None, None], v, 0.0)
                   for i, (n, v) in enumerate(batch.views.items())}  # fmt: skip
        # Two rows of one lesion, on two ranks.
        group = torch.cat([batch.group_id[:-1], batch.group_id[:1]])
        return replace(batch, views=nowhere, present=present, group_id=group)

    made = {}
    for case in CASES:
        made[case] = [(gappy(12, seed),) for seed in range(STEPS)]
        if case == "labels alone":
            made[case] = [(gappy(6, seed),) for seed in range(STEPS)]
        elif not case.startswith("pretrain"):
            made[case] = [
                (gappy(6, seed), gappy(12, seed + 10, strong=True)) for seed in range(STEPS)
            ]
    return made


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_batch_make_the_step_of_one_rank(tiny, batches, tmp_path, ranks):
    multiprocessing.spawn(train_on_a_rank, (ranks, tiny, batches, tmp_path), nprocs=ranks)
    for case in CASES:
        parts = [tuple(of_rank(part, 0, 1) for part in batch) for batch in batches[case]]
        alone = train(make_stage(case, tiny), parts)
        left = [torch.load(tmp_path / f"{case}-{rank}", weights_only=True) for rank in range(ranks)]
        for name, wanted in alone.items():
            got = [each[name] for each in left]
            if "loss" in name or "metric" in name:  # of which each rank has its part
                got = [torch.stack(got).mean(0)]
            for other in got[1:]:
                assert torch.equal(got[0], other), (case, name)
            close = 1e-6 if "metric" in name else 1e-9  # some are float32
            torch.testing.assert_close(
                got[0],
                wanted,
                rtol=close,
                atol=close,
                msg=lambda m, n=name, c=case: f"{c} {n}: {m}",
            )
        assert all(alone.keys() == each.keys() for each in left)
