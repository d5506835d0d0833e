"""Options of stage 2, fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics_fast.options.data import AugmentConfig
from mics_fast.options.fields import option

PseudoLabelRule = Literal["vacuity", "curriculum", "fixmatch", "freematch"]
ShiftForm = Literal["none", "diagonal", "low-rank", "closed-form"]


@dataclass
class FinetuneConfig:
    """Stage 2: few labels, evidential fusion, distribution shift, pseudo-labels."""

    init: str = option(
        "",
        "run folder or checkpoint whose pre-trained encoder to start from; default: this run's "
        'pre-training if there is one; "none": from scratch',
    )
    encoder: Literal["full", "lora", "frozen"] = option(
        "full",
        'how much of the encoders learns: "full"; "lora", low-rank additions to their attention; '
        '"frozen", nothing: their pooled features are computed once and kept, and fusion and heads '
        "train on those",
    )
    lora_rank: int = option(8, "of each low-rank addition", source="LoRA", above=0, most=1024)
    lora_alpha: float = option(
        16.0, "scale of the additions, times finetune.lora_rank", source="LoRA", above=0
    )
    augmented_views: int = option(
        4,
        "augmented views of each image whose features frozen encoders keep for the student's "
        "unlabelled rows; 0: the plain view alone",
        least=0, most=1024,
    )  # fmt: skip
    feature_cache: str = option(
        "", "folder that keeps the features of frozen encoders for other runs; default: none"
    )
    epochs: int = option(50, "passes over the train rows", above=0)
    steps: int | None = option(
        None,
        "optimiser steps; overrides finetune.epochs, but not epochs of the command line if this is "
        "from a file",
        above=0,
    )
    select: Literal["best", "last"] = option(
        "best",
        'the checkpoint that evaluation and prediction read: "best", by the fused macro-F1 on the '
        'val rows, whose labels are then used, too; or "last"',
    )
    patience: int = option(
        0,
        "validations without a better macro-F1 on the val rows after which the stage ends; 0 = it "
        "runs to its last step. Schedules stay those of all steps",
        least=0,
    )
    labelled_batch: int = option(16, "labelled pairs per step", above=0, most=2**20)
    unlabelled_batch: int = option(48, "unlabelled pairs per step", above=0)
    accumulate: int = option(
        1,
        "parts of both batches that are processed one after the other, for less memory; the "
        "agreement of modalities is a mean over one part's complete pairs",
        above=0,
    )
    sampling: Literal["natural", "balanced"] = option(
        "natural",
        'of the labelled rows: "natural", each row once per epoch; "balanced", each class equally '
        "often, for data with rare classes",
    )
    class_weights: dict[str, float] = option(
        help="factor of the losses of rows with this label or pseudo-label, as in {cancer: 5}, if "
        "missing a class costs more; classes that are not named have 1",
        factory=dict, above=0,
    )  # fmt: skip
    lr: float = option(
        1e-4,
        "peak learning rate of encoders that start from weights (AdamW, cosine to 1 % of it)",
        above=0,
    )
    head_lr_factor: float = option(
        10.0,
        "learning rate of what starts untrained, relative to finetune.lr: fusion encoder, heads, "
        "and encoders without weights to start from",
        above=0,
    )
    layer_decay: float = option(
        1.0,
        "factor of the learning rate from one block of the encoders to the one before it; the last "
        "block has it once, the patch embedding most often. 1 = none; published weights are often "
        "fine-tuned with 0.65 to 0.75",
        source="BEiT", above=0, most=1,
    )  # fmt: skip
    warmup: float = option(0.05, "share of all steps with a linear warm-up", least=0, most=1)
    weight_decay: float = option(0.05, "of matrices only", least=0)
    clip: float = option(1.0, "largest gradient norm; 0 = no clipping", least=0)
    ema_momentum: float = option(
        0.999, "of the averaged weights, per step; they evaluate and pseudo-label", least=0, most=1
    )
    kl_weight: float = option(1.0, "weight of the KL term after annealing", source="EDL", least=0)
    kl_anneal: float = option(
        0.2, "share of all steps over which that weight grows from 0", source="TMC", least=0, most=1
    )
    unlabelled_weight: float = option(1.0, "weight of the pseudo-label loss; 0 = off", least=0)
    unlabelled_ramp: float = option(
        0.2, "share of all steps over which that weight grows from 0", least=0, most=1
    )
    pseudo_labels: PseudoLabelRule = option(
        "vacuity",
        'rule that accepts pseudo-labels, see stages/pseudo_labels.py: "vacuity", "curriculum", '
        '"fixmatch" or "freematch"',
    )
    confidence: float = option(
        0.95, 'softmax probability required by "fixmatch"', source="FixMatch", least=0, most=1
    )
    accepted_share: float = option(
        0.8,
        'share of the unlabelled rows of each class that "curriculum" accepts at the end; it grows '
        "from 0",
        least=0, most=1,
    )  # fmt: skip
    align_distribution: bool = option(
        False,
        'for "vacuity" and "curriculum": pseudo-labels have, on average, the class frequencies of '
        "the labelled rows, which must then be a fair sample of all",
        source="ReMixMatch",
    )
    max_uncertainty: float = option(
        0.3, "largest fused vacuity at which a pseudo-label is accepted", least=0, most=1
    )
    min_probability: float = option(
        0.8, "least class probability at which a pseudo-label is accepted", least=0, most=1
    )
    modality_consistency_weight: float = option(
        0.1, "weight of the agreement of the modalities' opinions; 0 = off", least=0
    )
    modality_dropout: float = option(
        0.1,
        "probability that a modality of a row is hidden from the student, but never its last one; "
        "evaluation and pseudo-labels use all",
        least=0, most=1,
    )  # fmt: skip
    shift: ShiftForm = option(
        "diagonal",
        'augmentation of fusion features: "none"; "diagonal": shifted at random by their class\'s '
        'variance; "low-rank": shifted along the latest rows of their class; both with the '
        'evidential loss; "closed-form": an upper bound of the expected cross-entropy under the '
        "diagonal shift, without sampling",
        source="ISDA",
    )
    shift_weight: float = option(0.5, "weight of that loss; 0 = off", source="ISDA", least=0)
    shift_strength: float = option(
        0.7, "of the shift at the end of training, ramped from 0 (0.7: ISDA's 0.5)",
        source="ISDA", least=0,
    )  # fmt: skip
    shift_momentum: float = option(0.01, "of the class statistics, per row", above=0, below=1)
    shift_rank: int = option(
        32, "rows kept per class for the low-rank shift", above=0, most=4096
    )  # fmt: skip
    augment: AugmentConfig = option(factory=AugmentConfig)


def wants_unlabelled(config: FinetuneConfig) -> bool:
    """Return True if any term of the stage reads unlabelled rows."""
    return config.unlabelled_weight > 0 or config.modality_consistency_weight > 0
