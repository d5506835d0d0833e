"""Build a stage from the options: networks, optimisers, plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import Manifest
from mics_fast.engine.distributed import local_gpu
from mics_fast.engine.meter import peak_tflops
from mics_fast.engine.optimiser import decay_groups
from mics_fast.engine.plan import Plan
from mics_fast.engine.precision import Precision
from mics_fast.models.classifier import Classifier
from mics_fast.models.lora import add_lora
from mics_fast.models.pooled import PooledEncoder
from mics_fast.models.sizes import size_of
from mics_fast.models.vit import VisionTransformer
from mics_fast.options import FinetuneConfig, PretrainConfig, TrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage
from mics_fast.training.flops import finetune_flops, pretrain_flops

FINAL_FINETUNE_LR = 0.01  # as a factor of its peak


def pick_device(name: str) -> torch.device:
    """Return the device for an option; each process of a machine gets its own GPU.

    Raises:
        InputError: the option is "cuda", but there is no GPU for this process.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("option device is cuda, but torch sees no GPU")
    return local_gpu() if available and name != "cpu" else torch.device("cpu")


def built_on(config: TrainConfig, device: torch.device) -> torch.device:
    """Return the device on which a stage is built: the CPU if it is sharded afterwards."""
    return torch.device("cpu") if config.shard_parameters else device


def build_pretraining(
    config: TrainConfig, manifest: Manifest, rows: int, precision: Precision, device: torch.device
) -> tuple[PretrainStage, Plan]:
    """Build stage 1 for a number of train rows, with weights drawn from the seed, and its plan."""
    options, model = config.pretrain, config.model
    steps_per_epoch = max(1, rows // options.batch_size)
    queue = queue_size(options, rows)
    torch.manual_seed(config.seed)
    stage = PretrainStage(
        options,
        size_of(model),
        manifest.modalities,
        pool=model.pool,
        projection=model.projection,
        queue_size=queue,
        steps_per_epoch=steps_per_epoch,
        seed=config.seed,
        autocast=precision.autocast,
    ).to(built_on(config, device))
    optimisers = pretrain_optimisers(stage)
    plan = make_plan(
        config,
        "pretrain",
        optimisers,
        steps_per_epoch,
        precision,
        device,
        final_lr={"model": options.lr_final / options.lr},
        choose_best=False,
        score="k-NN accuracy",
        flops=pretrain_flops(config, stage.size, len(manifest.modalities), queue),
    )
    return stage, plan


def pretrain_optimisers(stage: PretrainStage, *, fused: bool | None = True) -> dict[str, Optimizer]:
    """Make AdamW for the model and, with an adversarial term, Adam for the discriminator.

    Args:
        stage: its options give learning rates and weight decay.
        fused: argument of torch.optim.AdamW and Adam; None: torch decides.
    """
    options = stage.config
    parameters = [(n, p) for n, p in stage.model.named_parameters() if p.requires_grad]
    groups = decay_groups(parameters, lr=options.lr, weight_decay=options.weight_decay)
    optimisers: dict[str, Optimizer] = {"model": torch.optim.AdamW(groups, fused=fused)}
    if options.adversarial_weight:
        optimisers["discriminator"] = torch.optim.Adam(
            stage.discriminator.parameters(),
            lr=options.discriminator_lr,
            betas=(0.5, 0.999),
            fused=fused,
        )
    return optimisers


def as_from_scratch(config: TrainConfig) -> TrainConfig:
    """Return options by which encoders that start untrained learn as fast as the heads."""
    options = config.finetune
    lr = options.lr * options.head_lr_factor
    options = replace(options, lr=lr, head_lr_factor=1.0, layer_decay=1.0)
    return replace(config, finetune=options)


def finetune_optimisers(model: Classifier, options: FinetuneConfig) -> dict[str, Optimizer]:
    """Make AdamW for what a classifier learns: encoders at ``lr``, less in their earlier blocks
    with ``layer_decay``, and heads at ``lr * head_lr_factor``."""
    named = [(name, own) for name, own in model.named_parameters() if own.requires_grad]
    encoders = [(name, own) for name, own in named if name.startswith("encoders.")]
    heads = [(name, own) for name, own in named if not name.startswith("encoders.")]
    layers: dict[int, list[tuple[str, torch.nn.Parameter]]] = {}
    for (name, own), steps in zip(
        encoders, decay_steps([name for name, _ in encoders]), strict=True
    ):
        layers.setdefault(steps if options.layer_decay < 1 else 0, []).append((name, own))
    groups = []
    for steps, layer in sorted(layers.items()):
        lr = options.lr * options.layer_decay**steps
        groups += decay_groups(layer, lr=lr, weight_decay=options.weight_decay)
    head_lr = options.lr * options.head_lr_factor
    for group in decay_groups(heads, lr=head_lr, weight_decay=options.weight_decay):
        groups.append({**group, "name": "heads"})  # in the log: lr_heads
    return {"model": torch.optim.AdamW(groups, fused=True)}


def decay_steps(names: Sequence[str]) -> list[int]:
    """Count, for parameters of encoders, the layers from theirs to the final norm.

    Args:
        names: in the classifier, as "encoders.wli.blocks.3.norm1.weight", of all blocks.

    Returns:
        0 for the final norm, 1 for the last block, and the most for embedding and positions.
    """
    parts = [name.split(".")[2:] for name in names]
    depth = 1 + max((int(part[1]) for part in parts if part[0] == "blocks"), default=-1)
    return [
        depth - int(part[1]) if part[0] == "blocks" else 0 if part[0] == "norm" else depth + 1
        for part in parts
    ]


def build_classifier(config: TrainConfig, manifest: Manifest) -> Classifier:
    """Build the classifier that fine-tuning starts from, with weights drawn from the seed."""
    torch.manual_seed(config.seed)
    return new_classifier(config, manifest.modalities, len(manifest.classes))


def new_classifier(config: TrainConfig, modalities: Sequence[str], num_classes: int) -> Classifier:
    """Build the classifier of a run: without frozen encoders, before ``adapt``."""
    model, frozen = config.model, config.finetune.encoder == "frozen"
    return Classifier(
        size_of(model),
        modalities,
        num_classes,
        pool=model.pool,
        fusion_depth=model.fusion_depth,
        pooled=model.pooled_fusion if frozen else None,
    )


def adapt(model: Classifier, options: FinetuneConfig) -> None:
    """Add low-rank matrices to the encoders, and freeze the rest of them, where asked for."""
    if options.encoder == "lora":
        for encoder in model.encoders.values():
            assert isinstance(encoder, VisionTransformer)
            add_lora(encoder, rank=options.lora_rank, alpha=options.lora_alpha)


def attach_encoder(model: Classifier, encoder: VisionTransformer) -> None:
    """Make a classifier of frozen features read images."""
    for own in model.encoders.values():
        assert isinstance(own, PooledEncoder)
        own.attach(encoder)


def build_finetuning(
    config: TrainConfig,
    manifest: Manifest,
    model: Classifier,
    rows: int,
    precision: Precision,
    device: torch.device,
) -> tuple[FinetuneStage, Plan]:
    """Build stage 2 for a classifier and a number of train rows, and its plan."""
    options = config.finetune
    steps_per_epoch = max(1, rows // options.unlabelled_batch)
    stage = FinetuneStage(
        options,
        model,
        num_classes=len(manifest.classes),
        width=size_of(config.model).width,
        steps=stage_steps(options, steps_per_epoch),
        seed=config.seed,
        autocast=precision.autocast,
        class_weights=class_weights(options, manifest),
        class_shares=labelled_shares(manifest) if options.align_distribution else None,
    ).to(built_on(config, device))
    optimisers = finetune_optimisers(model, options)
    sizes = len(manifest.modalities), len(manifest.classes)
    plan = make_plan(
        config,
        "finetune",
        optimisers,
        steps_per_epoch,
        precision,
        device,
        final_lr={"model": FINAL_FINETUNE_LR},
        choose_best=options.select == "best",
        score="val F1",
        patience=options.patience,
        flops=finetune_flops(config, size_of(config.model), *sizes),
    )
    return stage, plan


def class_weights(options: FinetuneConfig, manifest: Manifest) -> Tensor | None:
    """Return the factor of each class, (C,) float32; None if all are 1.

    Raises:
        InputError: an option names a class that the manifest does not have.
    """
    foreign = [name for name in options.class_weights if name not in manifest.classes]
    if foreign:
        raise InputError(
            f"option finetune.class_weights names {foreign[0]}, wanted classes of {manifest.path}: "
            f"{', '.join(manifest.classes)}"
        )
    if not options.class_weights:
        return None
    return torch.tensor([options.class_weights.get(name, 1.0) for name in manifest.classes])


def labelled_shares(manifest: Manifest) -> Tensor:
    """Return the share of each class in the labelled train rows, (C,) float32."""
    labels = torch.from_numpy(manifest.select("train", labelled=True).label)
    counts = torch.bincount(labels, minlength=len(manifest.classes))
    return counts / counts.sum()


def queue_size(options: PretrainConfig, rows: int) -> int:
    """Return the number of rows per queue: the option, or a quarter of the train rows."""
    return options.queue_size or max(1, min(65536, rows // 4))


def stage_steps(options: PretrainConfig | FinetuneConfig, steps_per_epoch: int) -> int:
    """Return the number of optimiser steps of a stage: the option, or that of its epochs."""
    return options.steps or options.epochs * max(1, steps_per_epoch)


def make_plan(
    config: TrainConfig,
    stage: Literal["pretrain", "finetune"],
    optimisers: dict[str, Optimizer],
    steps_per_epoch: int,
    precision: Precision,
    device: torch.device,
    **own: Any,
) -> Plan:
    """Make the plan of a stage.

    Args:
        config: of the run.
        stage: its name.
        optimisers: of the stage, the main one first.
        steps_per_epoch: for schedules and log.
        precision: of the encoders; float16 needs a loss scaler.
        device: training device.
        own: fields of ``Plan`` that differ between the stages.
    """
    options: PretrainConfig | FinetuneConfig = getattr(config, stage)
    steps = stage_steps(options, steps_per_epoch)
    return Plan(
        name=stage,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        optimisers=optimisers,
        warmup=round(options.warmup * steps),
        clip=options.clip,
        log_every=config.log_every,
        validate_every=config.validate_every,
        checkpoint_every=config.checkpoint_every,
        checkpoint_minutes=config.checkpoint_minutes,
        accumulate=options.accumulate,
        scaler=precision.scaler(device),
        peak_tflops=config.peak_tflops or peak_tflops(device),
        profile=config.profile,
        cuda_graph=config.cuda_graph,
        message=torch.bfloat16 if config.communication == "bf16" else None,
        **own,
    )
