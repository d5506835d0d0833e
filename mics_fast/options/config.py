"""Every option of the trainer, declared once, with its unit, its default and where it comes from.

Defaults are those of ``vit_base`` on real frames; ``configs/`` holds the settings of other runs.
Sources: [paper] arXiv 2509.17492, [code] its published pre-training code, [ALBEF], [MAE], [TMC],
[EDL], [ISDA] the works it builds on, [ours] a decision of this project.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Literal

from mics_fast.common.errors import InputError

Stage = Literal["pretrain", "finetune", "both"]
PseudoLabelRule = Literal["vacuity", "adaptive", "fixmatch", "freematch"]
ShiftForm = Literal["none", "diagonal", "low-rank", "closed-form"]
PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
CompileScope = Literal["blocks", "step"]
ModelSize = Literal["vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base"]


@dataclass
class ColourConfig:
    """Photometric changes, drawn for each modality on its own [ours].

    Args:
        brightness: factor in [1 - x, 1 + x].
        contrast: factor in [1 - x, 1 + x], around mid-grey.
        saturation: factor in [1 - x, 1 + x].
        hue: rotation in [-x, x] degrees.
        blur: largest standard deviation of a Gaussian blur, in pixels; 0 = none.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.1
    hue: float = 5.0
    blur: float = 0.0


@dataclass
class AugmentConfig:
    """What happens to a training pair; geometry is shared by the modalities of a pair.

    Args:
        crop_scale: smallest and largest area of the crop, as a fraction of the frame.
        crop_ratio: smallest and largest aspect ratio of the crop, relative to the frame's.
        flip: probability of a horizontal, and independently of a vertical, flip.
        weak: colour changes of the weak view (the only one in pre-training).
        strong: colour changes of the strong view (fine-tuning, unlabelled rows).
        rotation: of the strong view, in [-x, x] degrees about the centre, shared by the pair.
        shear: of the strong view, in [-x, x] degrees, shared by the pair.
        erasing: largest share of the strong view that a box hides, drawn for each modality.
    """

    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.5
    weak: ColourConfig = field(default_factory=ColourConfig)
    strong: ColourConfig = field(
        default_factory=lambda: ColourConfig(0.4, 0.4, 0.3, hue=10.0, blur=1.5)
    )
    rotation: float = 0.0
    shear: float = 0.0
    erasing: float = 0.0


@dataclass
class CacheConfig:
    """Whether training keeps decoded frames in memory after their first use.

    Kept frames are squares of uint8: an epoch after the first reads and decodes nothing.

    Args:
        mode: "none" decodes anew each time; "host" keeps frames in main memory, "device" where
            the training runs.
        side: of the kept frames, pixels; default: 256/224 of the views' side.
    """

    mode: Literal["none", "host", "device"] = "none"
    side: int | None = None


@dataclass
class DataConfig:
    """Where the pairs come from and how their pixels are scaled.

    Args:
        manifest: path of the ``manifest.csv`` that ``python -m mics_fast.prepare`` wrote.
        modalities: columns of the manifest to use; default: all of them.
        normalize: "fixed" subtracts ``mean`` and divides by ``std``; "image" uses each image's
            own channel mean and standard deviation (takes the lighting away; see docs).
        mean: per modality, three channel means in [0, 1]; default ImageNet's.
        std: per modality, three channel standard deviations; default ImageNet's.
        dtype: of the training views; bf16, half the memory, needs encoders that run in bf16.
        threads: CPU threads of an image pipeline; default: its share
            (``engine/threads.py``).
        prefetch: batches in flight: while the loop works on one, the next are made (on a CPU:
            decoded).
        on_bad_file: "error" stops at a file that cannot be read or decoded; "skip" treats it as
            a missing modality, or, where a row has none left, takes the next row instead.
        cache: whether decoded frames are kept.
    """

    manifest: str = ""
    modalities: list[str] | None = None
    normalize: Literal["fixed", "image"] = "fixed"
    mean: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    std: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = None
    prefetch: int = 2
    on_bad_file: Literal["error", "skip"] = "error"
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass
class ModelConfig:
    """The encoder; decoder and discriminator scale with it (table in ``models/sizes.py``).

    Args:
        size: vit_nano (64 px / 16), vit_micro (64 / 8), vit_tiny, vit_small (224 / 16), vit_base
            (384 / 16) [paper].
        pool: what a head reads: the class token, or the mean of the patch tokens [ours].
        projection: width of the contrastive feature [ALBEF].
        fusion_depth: blocks of the fusion encoder [ours].
        init: ``.safetensors``, ``.pt`` or ``.pth`` file of a vision transformer in timm's naming,
            from which the encoders start: in pre-training, or in a fine-tuning without one
            (``data.mean`` and ``data.std`` should be those it was trained with) [ours].
        activation_checkpointing: computes each block's activations once more in the backward pass
            instead of keeping them: less memory, a third more arithmetic, the same result.
    """

    size: ModelSize = "vit_base"
    pool: Literal["cls", "mean"] = "cls"
    projection: int = 256
    fusion_depth: int = 4
    init: str = ""
    activation_checkpointing: bool = False


@dataclass
class PretrainConfig:
    """Stage 1, without labels: consistency, reconstruction, alignment.

    Args:
        preset: "paper"; or "turbo", which changes the method: student and teacher make the
            contrastive features from the visible patches, the discriminator judges a random
            quarter of the patches [ours].
        epochs: passes over the train rows [code].
        steps: optimiser steps; where given, ``epochs`` is not read [ours].
        batch_size: pairs a step [ours].
        accumulate: parts that a batch is worked on in, one after the other, for less memory; the
            contrastive loss and the discriminator see one part at a time [ours].
        lr: peak learning rate of AdamW [code].
        lr_final: learning rate at the end of the cosine [code].
        warmup: share of all steps with a linear warm-up [ours].
        weight_decay: on matrices only [code].
        clip: largest gradient norm; 0 = no clipping [ours].
        discriminator_lr: of Adam with betas (0.5, 0.999) [ours].
        consistency_weight: weight of the contrastive loss; 0 = off [code].
        reconstruction_weight: weight of the masked reconstruction; 0 = off [code].
        adversarial_weight: weight of the adversarial alignment; 0 = off [code].
        adversarial: "simultaneous": one backward pass through the discriminator serves both it and
            the model [ours]; "alternating": the discriminator steps first, the model learns
            through it as it is then, by a forward and backward of its own [code].
        alpha: share of the teacher's soft target, ramped over the first epoch [ALBEF].
        temperature: at the start; learned within [0.001, 0.5] [ALBEF].
        teacher_views: "independent": the teacher sees another crop, flip and colour of each image
            than the student; "shared": the same image [ours].
        teacher_momentum: of the momentum encoder, a step [ALBEF].
        queue_size: negatives a modality; default min(65536, train rows / 4) [ours].
        mask_ratio: share of patches hidden [MAE].
        augment: image augmentation; only the weak view is used.
    """

    preset: Literal["paper", "turbo"] = "paper"
    epochs: int = 30
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-4
    lr_final: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.02
    clip: float = 1.0
    discriminator_lr: float = 2e-4
    consistency_weight: float = 1.0
    reconstruction_weight: float = 10.0
    adversarial_weight: float = 0.1
    adversarial: Literal["simultaneous", "alternating"] = "simultaneous"
    alpha: float = 0.4
    temperature: float = 0.07
    teacher_views: Literal["shared", "independent"] = "independent"
    teacher_momentum: float = 0.995
    queue_size: int | None = None
    mask_ratio: float = 0.75
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class FinetuneConfig:
    """Stage 2: few labels, evidential fusion, distribution shift, pseudo-labels.

    Args:
        init: run folder or checkpoint whose pre-trained encoder to start from; default: this
            run's pre-training if there is one; "none": from scratch.
        epochs: passes over the train rows [ours].
        steps: optimiser steps; where given, ``epochs`` is not read [ours].
        select: the checkpoint that evaluation and prediction read: "best", by the fused macro-F1
            on the val rows, whose labels are then used, too; or "last" [ours].
        labelled_batch: labelled pairs a step [ours].
        unlabelled_batch: unlabelled pairs a step [ours].
        accumulate: parts that both batches are worked on in, one after the other, for less
            memory; the agreement of modalities is a mean over one part's complete pairs [ours].
        sampling: of the labelled rows: "natural", each row once an epoch; "balanced", each class
            equally often, for data in which some are rare [ours].
        lr: peak learning rate of the encoders (AdamW, cosine to 1 % of it) [ours].
        head_lr_factor: fusion encoder and heads learn this many times faster [ours].
        warmup: share of all steps with a linear warm-up [ours].
        weight_decay: on matrices only [ours].
        clip: largest gradient norm; 0 = no clipping [ours].
        ema_momentum: of the averaged weights, a step; they evaluate and pseudo-label [ours].
        kl_weight: weight of the KL term after annealing [EDL].
        kl_anneal: share of all steps over which it grows from 0 [TMC].
        unlabelled_weight: weight of the pseudo-label loss; 0 = off [ours].
        unlabelled_ramp: share of all steps over which that weight grows from 0 [ours].
        pseudo_labels: the rule of acceptance, as in ``stages/pseudo_labels.py``: "vacuity",
            "adaptive", "fixmatch" or "freematch" [ours].
        confidence: softmax probability that "fixmatch" asks for [FixMatch].
        max_uncertainty: a pseudo-label needs a fused vacuity at most this [ours].
        min_probability: ... and a class probability at least this [ours].
        modality_consistency_weight: agreement of the modalities' opinions; 0 = off [ours].
        modality_dropout: probability with which the student must do without a modality of a row,
            never without its last; evaluation and pseudo-labels see all [ours].
        shift: how fusion features are augmented: "none"; "diagonal": moved at random by their
            class's variance; "low-rank": moved along the latest rows of their class; both under
            the evidential loss; "closed-form": not moved, but a cross-entropy that bounds the
            expected one of the diagonal shift [ISDA].
        shift_weight: weight of that loss; 0 = off [ISDA].
        shift_strength: of the shift at the end of training, ramped from 0 (0.7: ISDA's 0.5) [ISDA].
        shift_momentum: of the class statistics, a row [ours].
        shift_rank: rows kept a class for the low-rank shift [ours].
        augment: image augmentation.
    """

    init: str = ""
    epochs: int = 50
    steps: int | None = None
    select: Literal["best", "last"] = "best"
    labelled_batch: int = 16
    unlabelled_batch: int = 48
    accumulate: int = 1
    sampling: Literal["natural", "balanced"] = "natural"
    lr: float = 1e-4
    head_lr_factor: float = 10.0
    warmup: float = 0.05
    weight_decay: float = 0.05
    clip: float = 1.0
    ema_momentum: float = 0.999
    kl_weight: float = 1.0
    kl_anneal: float = 0.2
    unlabelled_weight: float = 1.0
    unlabelled_ramp: float = 0.2
    pseudo_labels: PseudoLabelRule = "vacuity"
    confidence: float = 0.95
    max_uncertainty: float = 0.3
    min_probability: float = 0.8
    modality_consistency_weight: float = 0.1
    modality_dropout: float = 0.1
    shift: ShiftForm = "diagonal"
    shift_weight: float = 0.5
    shift_strength: float = 0.7
    shift_momentum: float = 0.01
    shift_rank: int = 32
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class TrainConfig:
    """One run.

    Args:
        out: run folder; holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints/.
        stage: pretrain, finetune, or both.
        seed: of weights, order, augmentation, masks and shifts.
        device: "auto" takes the GPU when there is one.
        precision: of the encoders' arithmetic; "auto": bf16 on a GPU (fp16 on one that lacks it),
            fp32 on a CPU; "tf32": fp32 whose matrix products a GPU takes on its tensor cores, as
            bf16 and fp16 do with what stays in fp32: losses and discriminator. fp16 scales the
            loss.
        compile: torch.compile; "auto": on a GPU.
        compile_scope: what is compiled: "blocks", each transformer block; "step", the forward pass
            and the losses of each optimiser as a whole, which takes longer to compile.
        cuda_graph: replays each step as one CUDA graph, which spares a small network the launches
            of its kernels; on one GPU.
        shard_parameters: each of several processes keeps a part of the encoders, their averages,
            gradients and optimiser state, for encoders that one device cannot hold (FSDP2): for
            more communication, the same run. A block is whole only while it runs; in bf16 its
            half-precision weights stay until the backward pass, but for
            ``model.activation_checkpointing``.
        threads: CPU threads that torch, the operators and the image pipeline share; default: all
            cores that the process may use (the rule: ``mics_fast/engine/threads.py``).
        log_every: steps between log lines.
        checkpoint_every: steps between checkpoints, 0 = off; one is also written when a stage ends.
        checkpoint_minutes: minutes between checkpoints, beside those; 0 = off.
        keep_checkpoints: how many of the latest to keep, beside the best.
        peak_tflops: of the device, in TFLOP/s, for the share of it that is used (MFU) in the log;
            default: 989, dense bf16, on an H100 (SXM) or H200, none elsewhere.
        profile: steps of each stage to profile, after some to warm up; 0 = none.
    """

    out: str = ""
    stage: Stage = "both"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: PrecisionName = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    compile_scope: CompileScope = "blocks"
    cuda_graph: bool = False
    shard_parameters: bool = False
    threads: int | None = None
    log_every: int = 10
    checkpoint_every: int = 200
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 2
    peak_tflops: float | None = None
    profile: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


Variant = Literal[
    "supervised", "supervised-long", "reconstruction", "pretraining", "pseudo-labels",
    "without-pretraining", "full", "without-consistency", "without-adversary", "without-shift",
    "without-modality-consistency", "fixmatch", "freematch",
]  # fmt: skip


@dataclass
class ExperimentConfig:
    """The grid of ``python -m mics_fast.experiment``: every variant on every draw of labels.

    Args:
        seeds: one run each; of the label draw, the weights, the order, masks and shifts.
        label_fractions: of the train rows of each class.
        label_counts: labelled train rows of each class, beside those fractions.
        variants: as in ``study/variants.py``; the first is what the others are compared with.
        out_of_distribution: a manifest of images that the models should be unsure of; "" = none.
        processes: runs at a time, each with its share of the CPU threads. Small networks do not
            use two threads well: as many processes as cores, where memory allows.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    label_fractions: list[float] = field(default_factory=list)
    label_counts: list[int] = field(default_factory=list)
    variants: list[Variant] = field(
        default_factory=lambda: ["supervised-long", "pretraining", "without-pretraining", "full"]
    )
    out_of_distribution: str = ""
    processes: int = 1


def check_experiment(config: ExperimentConfig) -> None:
    """Refuse a grid that cannot be run, naming the option.

    Raises:
        InputError: a list is empty or names something twice, or a number is out of range.
    """
    if config.processes < 1:
        raise InputError(f"option experiment.processes is {config.processes}, wanted at least 1")
    for name in ("seeds", "label_fractions", "label_counts", "variants"):
        values = getattr(config, name)
        may_be_empty = name.startswith("label_")
        if len(set(values)) < len(values) or not (values or may_be_empty):
            raise InputError(f"option experiment.{name} is {values}, wanted each value once")
    if not config.label_fractions and not config.label_counts:
        raise InputError(
            "experiment.label_fractions and experiment.label_counts are empty, wanted either"
        )
    for count in config.label_counts:
        if count < 1:
            raise InputError(f"option experiment.label_counts holds {count}, wanted at least 1")
    for fraction in config.label_fractions:
        if not 0 < fraction <= 1:
            raise InputError(
                f"option experiment.label_fractions holds {fraction}, wanted above 0 and up to 1"
            )


def check_config(config: TrainConfig) -> None:
    """Refuse values that no run can use, naming the option.

    Raises:
        InputError: the first option that is out of range.
    """
    positive = (
        "log_every keep_checkpoints data.prefetch model.projection "
        "model.fusion_depth pretrain.epochs pretrain.batch_size pretrain.accumulate pretrain.lr "
        "pretrain.discriminator_lr pretrain.temperature finetune.epochs finetune.labelled_batch "
        "finetune.unlabelled_batch finetune.accumulate finetune.lr finetune.head_lr_factor "
        "finetune.shift_rank"
    )
    non_negative = (
        "checkpoint_every checkpoint_minutes profile pretrain.clip pretrain.lr_final "
        "pretrain.weight_decay pretrain.consistency_weight pretrain.reconstruction_weight "
        "pretrain.adversarial_weight finetune.clip finetune.weight_decay finetune.kl_weight "
        "finetune.unlabelled_weight "
        "finetune.modality_consistency_weight finetune.shift_weight finetune.shift_strength"
    )
    shares = (
        "pretrain.warmup pretrain.alpha pretrain.teacher_momentum finetune.warmup "
        "finetune.ema_momentum finetune.kl_anneal finetune.unlabelled_ramp "
        "finetune.confidence finetune.max_uncertainty finetune.min_probability "
        "finetune.modality_dropout "
        "pretrain.augment.flip finetune.augment.flip"
    )
    between = "pretrain.mask_ratio finetune.shift_momentum"
    for names, accepts, wanted in (
        (positive, lambda value: value > 0, "a number above 0"),
        (non_negative, lambda value: value >= 0, "a number of at least 0"),
        (shares, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        (between, lambda value: 0 < value < 1, "a number between 0 and 1"),
    ):
        for name in names.split():
            value = attrgetter(name)(config)
            if not accepts(value):
                raise InputError(f"option {name} is {value}, wanted {wanted}")
    optional = (
        "threads data.threads data.cache.side pretrain.steps pretrain.queue_size finetune.steps "
        "peak_tflops"
    )
    for name in optional.split():
        value = attrgetter(name)(config)
        if value is not None and value <= 0:
            raise InputError(f"option {name} is {value}, wanted a number above 0")
    _check_accumulation(config)
    for stage in ("pretrain", "finetune"):
        _check_augment(f"{stage}.augment", getattr(config, stage).augment)


def _check_accumulation(config: TrainConfig) -> None:
    """Refuse parts of a batch that would not be equal, and a mode that knows no parts."""
    for batch in ("pretrain.batch_size", "finetune.labelled_batch", "finetune.unlabelled_batch"):
        parts = f"{batch.split('.')[0]}.accumulate"
        count, rows = attrgetter(parts)(config), attrgetter(batch)(config)
        if rows % count:
            raise InputError(f"option {parts} is {count}, wanted a divisor of {batch}, {rows}")
    if config.pretrain.adversarial == "alternating" and config.pretrain.accumulate > 1:
        raise InputError(
            f"option pretrain.accumulate is {config.pretrain.accumulate}, wanted 1 where "
            "pretrain.adversarial is alternating"
        )


def _check_augment(option: str, augment: AugmentConfig) -> None:
    """Refuse ranges that cannot be drawn from."""
    low, high = augment.crop_scale
    if not 0 < low <= high <= 1:
        raise InputError(f"option {option}.crop_scale is {low, high}, wanted 0 < low <= high <= 1")
    for name, most in (("rotation", 180), ("shear", 45), ("erasing", 1)):
        value = getattr(augment, name)
        if not 0 <= value <= most:
            raise InputError(f"option {option}.{name} is {value}, wanted a number from 0 to {most}")
    low, high = augment.crop_ratio
    if not 0 < low <= high:
        raise InputError(f"option {option}.crop_ratio is {low, high}, wanted 0 < low <= high")
    for view in ("weak", "strong"):
        for name, value in asdict(getattr(augment, view)).items():
            factor = name in ("brightness", "contrast", "saturation")
            if not 0 <= value <= (1 if factor else math.inf):
                wanted = "a number from 0 to 1" if factor else "a number of at least 0"
                raise InputError(f"option {option}.{view}.{name} is {value}, wanted {wanted}")
