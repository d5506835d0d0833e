"""Checks that span several options, or an option and the data or device."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from mics_fast.common.errors import InputError
from mics_fast.options.fields import check_ranges
from mics_fast.options.finetune import wants_unlabelled
from mics_fast.options.pretrain import PretrainConfig, contrasted_pairs
from mics_fast.options.train import TrainConfig

BATCHES = ("pretrain.batch_size", "finetune.labelled_batch", "finetune.unlabelled_batch")


def check_config(config: TrainConfig) -> None:
    """Refuse options that are invalid for any run.

    Raises:
        InputError: names the first option that is out of range or conflicts with another.
    """
    check_ranges(config)
    for name in BATCHES:
        parts = f"{name.split('.')[0]}.accumulate"
        count, rows = attrgetter(parts)(config), attrgetter(name)(config)
        if rows % count:
            raise InputError(f"option {parts} is {count}, wanted a divisor of {name}, {rows}")
    if config.finetune.patience and not (config.validate_every or config.checkpoint_every):
        raise InputError(
            f"option finetune.patience is {config.finetune.patience}, wanted validations to count: "
            "validate_every or checkpoint_every above 0"
        )
    if config.pretrain.adversarial == "alternating" and config.pretrain.accumulate > 1:
        raise InputError(
            f"option pretrain.accumulate is {config.pretrain.accumulate}, wanted 1 where "
            "pretrain.adversarial is alternating"
        )
    if config.shard_across == "machine" and not config.shard_parameters:
        raise InputError("option shard_across is machine, wanted shard_parameters true with it")


def check_modality_options(config: TrainConfig, modalities: Sequence[str]) -> None:
    """Refuse normalisation options for a modality that the run does not have.

    Raises:
        InputError: names the modality.
    """
    for name in (*config.data.mean, *config.data.std):
        if name not in modalities:
            raise InputError(
                f"option data.mean or data.std names {name}, wanted modalities of the run: "
                f"{', '.join(modalities)}"
            )


def check_shares(config: TrainConfig, processes: int) -> None:
    """Refuse a batch that the processes of a run cannot share equally.

    Raises:
        InputError: names the option.
    """
    for name in BATCHES:
        stage = name.split(".")[0]
        rows, parts = attrgetter(name)(config), getattr(config, stage).accumulate
        if config.stage in (stage, "both") and rows % (parts * processes):
            times = f" times {stage}.accumulate, {parts}" if parts > 1 else ""
            raise InputError(
                f"option {name} is {rows}, wanted a multiple of {parts * processes}, the number "
                f"of processes that share it{times}"
            )


def check_batches(config: TrainConfig, rows: int) -> None:
    """Refuse a batch that would hold a row twice.

    Args:
        config: the run's options.
        rows: train rows of the manifest.

    Raises:
        InputError: names the option.
    """
    sizes = {"pretrain.batch_size": config.pretrain.batch_size}
    if wants_unlabelled(config.finetune):
        sizes["finetune.unlabelled_batch"] = config.finetune.unlabelled_batch
    for name, size in sizes.items():
        if config.stage in (name.split(".")[0], "both") and size > rows:
            raise InputError(f"option {name} is {size}, wanted at most {rows}, the train rows")


def check_cuda_graph(config: TrainConfig, device: str, processes: int) -> None:
    """Refuse CUDA graphs on a CPU or with several processes.

    Args:
        config: the run's options.
        device: "cpu" or "cuda".
        processes: number of processes of the run.

    Raises:
        InputError: names the option.
    """
    if config.cuda_graph and (device != "cuda" or processes > 1):
        where = f"{processes} processes" if processes > 1 else f"a {device.upper()}"
        raise InputError(f"option cuda_graph is true, wanted false on {where}: it takes one GPU")


def check_dtype(config: TrainConfig, arithmetic: str) -> None:
    """Refuse half-precision views for encoders that run in another precision.

    Args:
        config: the run's options.
        arithmetic: "fp32", "bf16" or "fp16", of the encoders.

    Raises:
        InputError: names the option.
    """
    if config.data.dtype == "bf16" and arithmetic != "bf16":
        raise InputError(
            "option data.dtype is bf16, wanted fp32 as the encoders do not run in bf16"
        )


def check_sharding(config: TrainConfig, arithmetic: str, processes: int) -> None:
    """Refuse sharding where it is not supported.

    Args:
        config: the run's options.
        arithmetic: as for ``check_dtype``.
        processes: number of processes of the run.

    Raises:
        InputError: names the option.
    """
    if not config.shard_parameters:
        return
    if processes == 1:
        raise InputError("option shard_parameters is on, wanted several processes (torchrun)")
    if config.stage != "pretrain" and config.finetune.encoder != "full":
        raise InputError(
            f"option finetune.encoder is {config.finetune.encoder}, wanted full with "
            "shard_parameters"
        )
    if config.compile != "off" and config.compile_scope == "step":
        raise InputError("option compile_scope is step, wanted blocks with shard_parameters")
    if arithmetic == "fp16":
        # Each rank's loss scaler would check only its own gradients for overflow.
        raise InputError("option precision is fp16, wanted another with shard_parameters")


def check_pretraining(options: PretrainConfig, modalities: Sequence[str]) -> None:
    """Refuse pre-training without a loss, and positives that are the query's own pixels.

    Raises:
        InputError: every weight is 0, except of terms that need two modalities; or the teacher
            shares the student's views, and the positives are views of the same frame.
    """
    pairs = contrasted_pairs(options, len(modalities))
    if not (options.reconstruction_weight or options.adversarial_weight or pairs):
        alone = f", with {modalities[0]} alone and pretrain.positives modalities"
        raise InputError(
            "pre-training has no loss: wanted pretrain.reconstruction_weight, "
            "pretrain.adversarial_weight or pretrain.consistency_weight above 0"
            + (alone if options.consistency_weight else "")
        )
    if options.teacher_views == "shared" and any(a == b for a, b in pairs):
        raise InputError(
            f"pretrain.positives is {options.positives}, but pretrain.teacher_views is shared: "
            "each image would be its own positive; wanted independent views"
        )
