"""Variants of the method for experiments, as recipes of the parts they have.

    supervised                     labelled rows only, from scratch
    supervised-long                the same, with as many floating-point operations as "full",
                                   pre-training included
    reconstruction                 labelled rows only, after pre-training by reconstruction only
    pretraining                    labelled rows only, after pre-training
    pseudo-labels                  from scratch, without shift and modality consistency
    without-pretraining            fine-tuning with all terms, from scratch
    full                           pre-training, then fine-tuning with all terms
    without-consistency            full without the contrastive loss of pre-training
    without-adversary              full without the adversarial alignment of pre-training
    without-shift                  full without the distribution shift
    without-modality-consistency   full without the agreement between modalities
    fixmatch, freematch            full with that method's rule for pseudo-labels
    probe                          labelled rows alone, on frozen features of model.init
    probe+full                     all terms of fine-tuning, on frozen features of model.init
    lora                           all terms of fine-tuning, the encoders of model.init adapted

A term whose weight is 0 in the options stays off in every variant.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import Manifest
from mics_fast.models.sizes import Size, size_of
from mics_fast.options import TrainConfig, Variant
from mics_fast.training.build import queue_size, stage_steps
from mics_fast.training.flops import finetune_flops, pretrain_flops

LABELS_ONLY = {
    "unlabelled_weight": 0.0,
    "modality_consistency_weight": 0.0,
    "shift_weight": 0.0,
}


@dataclass(frozen=True)
class Recipe:
    """The options that a variant changes.

    Args:
        finetune: options of fine-tuning.
        pretrained: True if it starts from pre-training.
        pretrain: options of that pre-training.
        as_long_as_full: True if it is trained for as many operations as "full".
    """

    finetune: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    as_long_as_full: bool = False


RECIPES: dict[Variant, Recipe] = {
    "supervised": Recipe(LABELS_ONLY, pretrained=False),
    "supervised-long": Recipe(LABELS_ONLY, pretrained=False, as_long_as_full=True),
    "reconstruction": Recipe(
        LABELS_ONLY, pretrain={"consistency_weight": 0.0, "adversarial_weight": 0.0}
    ),
    "pretraining": Recipe(LABELS_ONLY),
    "pseudo-labels": Recipe(
        {"modality_consistency_weight": 0.0, "shift_weight": 0.0}, pretrained=False
    ),
    "without-pretraining": Recipe(pretrained=False),
    "full": Recipe(),
    "without-consistency": Recipe(pretrain={"consistency_weight": 0.0}),
    "without-adversary": Recipe(pretrain={"adversarial_weight": 0.0}),
    "without-shift": Recipe({"shift_weight": 0.0}),
    "without-modality-consistency": Recipe({"modality_consistency_weight": 0.0}),
    "fixmatch": Recipe({"pseudo_labels": "fixmatch"}),
    "freematch": Recipe({"pseudo_labels": "freematch"}),
    "probe": Recipe({**LABELS_ONLY, "encoder": "frozen"}, pretrained=False),
    "probe+full": Recipe({"encoder": "frozen"}, pretrained=False),
    "lora": Recipe({"encoder": "lora"}, pretrained=False),
}


def finetuning_of(train: TrainConfig, variant: Variant, manifest: Manifest) -> TrainConfig:
    """Return the options of a variant's fine-tuning, a copy.

    Args:
        train: options of the full method.
        variant: name of the variant.
        manifest: training data.

    Raises:
        InputError: the variant starts from weights, and none are named.
    """
    recipe, config = RECIPES[variant], copy.deepcopy(train)
    config.stage = "finetune"
    for name, value in recipe.finetune.items():
        setattr(config.finetune, name, value)
    if "encoder" in recipe.finetune and not config.model.init:
        raise InputError(f"experiment.variants names {variant}, wanted weights in model.init")
    if recipe.as_long_as_full:
        step = finetune_flops(config, *sizes_of(config, manifest))
        config.finetune.steps = round(full_flops(train, manifest) / sum(step.values()))
    return config


def pretraining_of(train: TrainConfig, variant: Variant) -> TrainConfig | None:
    """Return the options of a variant's pre-training, a copy; None: it starts from scratch."""
    recipe, config = RECIPES[variant], copy.deepcopy(train)
    config.stage = "pretrain"
    for name, value in recipe.pretrain.items():
        setattr(config.pretrain, name, value)
    return config if recipe.pretrained else None


def full_flops(train: TrainConfig, manifest: Manifest) -> float:
    """Count the floating-point operations of both stages of the full method."""
    rows = len(manifest.select("train"))
    size, modalities, classes = sizes_of(train, manifest)
    first = pretrain_flops(train, size, modalities, queue_size(train.pretrain, rows))
    second = finetune_flops(train, size, modalities, classes)
    return sum(first.values()) * stage_steps(
        train.pretrain, rows // train.pretrain.batch_size
    ) + sum(second.values()) * stage_steps(train.finetune, rows // train.finetune.unlabelled_batch)


def sizes_of(train: TrainConfig, manifest: Manifest) -> tuple[Size, int, int]:
    """Return the network size, the number of modalities and the number of classes."""
    return size_of(train.model), len(manifest.modalities), len(manifest.classes)
