"""Stages of tiny networks, and the step that the loop makes with them."""

from __future__ import annotations

import pytest
import torch

from mics_fast.models.classifier import Classifier
from mics_fast.options import FinetuneConfig, PretrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage


@pytest.fixture
def make_pretraining(tiny):
    """make_pretraining(**options) -> PretrainStage of two modalities."""

    def make(queue_size=32, **options):
        torch.manual_seed(0)
        return PretrainStage(
            PretrainConfig(**{"adversarial_weight": 0.1, **options}),
            tiny,
            ("wli", "nbi"),
            pool="mean",
            projection=8,
            queue_size=queue_size,
            steps_per_epoch=4,
            seed=0,
        )

    return make


@pytest.fixture
def make_finetuning(tiny):
    """make_finetuning(**options) -> FinetuneStage of two modalities and three classes."""

    def make(**options):
        torch.manual_seed(0)
        model = Classifier(tiny, ("wli", "nbi"), 3, pool="mean", fusion_depth=1)
        return FinetuneStage(
            FinetuneConfig(**options),
            model,
            num_classes=3,
            width=tiny.width,
            steps=100,
            seed=0,
        )

    return make
