"""Options of stage 1, pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from mics_fast.options.data import AugmentConfig
from mics_fast.options.fields import option


@dataclass
class PretrainConfig:
    """Stage 1, without labels: consistency, reconstruction, alignment."""

    preset: Literal["paper", "turbo"] = option(
        "paper",
        '"paper"; or "turbo", which changes the method: the student makes its contrastive features '
        "from the visible patches, the discriminator judges a random quarter of the patches",
    )
    epochs: int = option(30, "passes over the train rows", source="code", above=0)
    steps: int | None = option(
        None,
        "optimiser steps; overrides pretrain.epochs, but not epochs of the command line if this is "
        "from a file",
        above=0,
    )
    batch_size: int = option(64, "pairs per step", above=0)
    accumulate: int = option(
        1,
        "parts of a batch that are processed one after the other, for less memory; the contrastive "
        "loss and the discriminator see one part at a time",
        above=0,
    )
    lr: float = option(1e-4, "peak learning rate of AdamW", source="code", above=0)
    lr_final: float = option(1e-5, "learning rate at the end of the cosine", source="code", least=0)
    warmup: float = option(0.05, "share of all steps with a linear warm-up", least=0, most=1)
    weight_decay: float = option(0.02, "of matrices only", source="code", least=0)
    clip: float = option(1.0, "largest gradient norm; 0 = no clipping", least=0)
    discriminator_lr: float = option(2e-4, "of Adam with betas (0.5, 0.999)", above=0)
    consistency_weight: float = option(
        1.0, "weight of the contrastive loss; 0 = off", source="code", least=0
    )
    reconstruction_weight: float = option(
        10.0, "weight of the masked reconstruction; 0 = off", source="code", least=0
    )
    adversarial_weight: float = option(
        0.0,
        "weight of the adversarial alignment; 0 = off, because it brought nothing where it was "
        "measured; 0.1 in the published code (configs/paper.yaml)",
        least=0,
    )
    adversarial: Literal["simultaneous", "alternating"] = option(
        "simultaneous",
        '"simultaneous": one backward pass through the discriminator serves both it and the model; '
        '"alternating", as in the published code: the discriminator steps first, the model then '
        "learns through the updated one, by a forward and backward pass of its own",
    )
    adversarial_balance: Literal["adaptive", "fixed"] = option(
        "adaptive",
        '"adaptive": noise on the patches keeps the discriminator right in about '
        "70 % of cases, and pretrain.adversarial_weight is the size of its gradient relative to "
        'that of the reconstruction; "fixed", as in the published code: neither',
    )
    alpha: float = option(
        0.4, "share of the teacher's soft target, ramped over the first epoch",
        source="ALBEF", least=0, most=1,
    )  # fmt: skip
    temperature: float = option(
        0.07, "at the start; learned within [0.001, 0.5]", source="ALBEF", above=0
    )
    positives: Literal["modalities", "images", "both"] = option(
        "modalities",
        'of the contrastive loss. "modalities": the other frame of a pair, as in the paper; '
        '"images": the teacher\'s view of the same frame, which keeps what only one modality '
        'shows; "both". "images" and "both" need independent teacher_views',
    )
    teacher_views: Literal["shared", "independent"] = option(
        "independent",
        '"independent": the teacher sees another crop, flip and colour of each image than the '
        'student; "shared": the same image',
    )
    teacher_momentum: float = option(
        0.995, "of the momentum encoder, per step", source="ALBEF", least=0, most=1
    )
    queue_size: int | None = option(
        None, "negatives per modality; null: min(65536, train rows / 4)", above=0, most=2**24
    )
    mask_ratio: float = option(
        0.75, "share of patches hidden", source="MAE", above=0, below=1
    )  # fmt: skip
    augment: AugmentConfig = option(factory=AugmentConfig)


def contrasted_pairs(config: PretrainConfig, modalities: int) -> list[tuple[int, int]]:
    """Return the (student, teacher) indices of modalities that the contrastive loss compares."""
    if not config.consistency_weight:
        return []
    return [
        (a, b)
        for a, b in product(range(modalities), repeat=2)
        if config.positives == "both" or (a == b) == (config.positives == "images")
    ]
