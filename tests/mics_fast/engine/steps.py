"""Small stages, their optimisers and batches, for tests of the step; no files, no loader."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_fast.engine.plan import Plan
from mics_fast.models.classifier import Classifier
from mics_fast.options import FinetuneConfig, PretrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage

ACCEPT_ALL = {"max_uncertainty": 1.0, "min_probability": 0.0}


def pretraining(size, autocast=None, **options):
    torch.manual_seed(0)
    stage = PretrainStage(
        PretrainConfig(**{"adversarial_weight": 0.1, **options}), size, ("wli", "nbi"),
        pool="mean", projection=8, queue_size=32, steps_per_epoch=4, seed=0, autocast=autocast,
    )  # fmt: skip
    trained = [p for p in stage.model.parameters() if p.requires_grad]
    optimisers = {"model": torch.optim.AdamW(trained, lr=1e-3, fused=True)}
    if stage.config.adversarial_weight:
        judge = stage.discriminator.parameters()
        optimisers["discriminator"] = torch.optim.Adam(judge, lr=1e-3, fused=True)
    return stage, optimisers


def finetuning(size, autocast=None, **options):
    torch.manual_seed(0)
    model = Classifier(size, ("wli", "nbi"), 3, pool="mean", fusion_depth=1)
    stage = FinetuneStage(
        FinetuneConfig(**options), model, num_classes=3, width=size.width, steps=100,
        seed=0, autocast=autocast,
    )  # fmt: skip
    return stage, {"model": torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)}


def plan_of(optimisers, **options):
    defaults = {"name": "stage", "steps": 100, "steps_per_epoch": 4, "warmup": 0, "final_lr": {},
                "clip": 1.0, "log_every": 4, "checkpoint_every": 0}  # fmt: skip
    return Plan(optimisers=optimisers, **{**defaults, **options})


def overflowing(stage, factor=50.0):
    """Gradients of the model that leave float16's range under the first loss scales."""
    for parameter in stage.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: (gradient * factor).half().float())


def batches_of(make, make_batch):
    """The batches of a stage from a step on, a function of the step."""

    def batches(step):
        while True:
            parts = [make_batch(8, first_id=8 * step, seed=step)]
            if make is finetuning:
                parts.append(make_batch(8, first_id=8 * step, strong=True, seed=step))
            yield tuple(parts)
            step += 1

    return batches


def tensors(value, name=""):
    """All tensors of a nested state, by path."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    nested = [(key, own) for key, own in items if isinstance(own, dict | list | tuple | Tensor)]
    return {path: t for key, own in nested for path, t in tensors(own, f"{name}/{key}").items()}
