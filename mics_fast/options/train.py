"""Options of a run.

Defaults are those of ``vit_base`` on real frames; ``configs/`` holds the settings of other runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics_fast.options.data import DataConfig
from mics_fast.options.fields import option
from mics_fast.options.finetune import FinetuneConfig
from mics_fast.options.log import LogConfig
from mics_fast.options.model import ModelConfig
from mics_fast.options.pretrain import PretrainConfig

StageChoice = Literal["pretrain", "finetune", "both"]
PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
CompileScope = Literal["blocks", "step"]


@dataclass
class TrainConfig:
    """Options of one run."""

    out: str = option(
        "", "run folder; holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints/"
    )
    stage: StageChoice = option("both", "pretrain, finetune, or both")
    seed: int = option(
        0, "of weights, order, augmentation, masks and shifts", least=0, most=2**63 - 1
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", '"auto" takes the GPU if there is one')
    precision: PrecisionName = option(
        "auto",
        'of the encoders\' arithmetic; "auto": bf16 on a GPU (fp16 on one that lacks it) and on a '
        "CPU that multiplies it faster than fp32, which a short test at the start finds out; else "
        'fp32. "tf32": fp32 whose matrix products a GPU computes on its tensor cores, as bf16 and '
        "fp16 do with what stays in fp32: losses and discriminator. fp16 scales the loss",
    )
    compile: Literal["auto", "on", "off"] = option("auto", 'torch.compile; "auto": on a GPU')
    compile_scope: CompileScope = option(
        "blocks",
        'what is compiled: "blocks", each transformer block; "step", the forward pass and the '
        "losses of each optimiser as a whole, which takes longer to compile",
    )
    cuda_graph: bool = option(
        False,
        "replays each step as one CUDA graph, which saves a small network its kernel launches; on "
        "one GPU",
    )
    shard_parameters: bool = option(
        False,
        "each of several processes keeps a part of the encoders, their averages, gradients and "
        "optimiser state, for encoders that one device cannot hold (FSDP2): more communication, "
        "the same run. A block is whole only while it runs; in bf16 its half-precision weights "
        "stay until the backward pass, unless model.activation_checkpointing is on",
    )
    shard_across: Literal["run", "machine"] = option(
        "run",
        "the processes that share one copy of the networks with shard_parameters: all of the run, "
        "or those of one machine (HSDP), where only gradients travel between the machines",
    )
    communication: Literal["fp32", "bf16"] = option(
        "fp32",
        "dtype in which gradients travel between processes; bf16 halves the bytes and rounds each "
        "gradient to 8 bits before the sum. Gradients of sharded networks always travel in fp32",
    )
    timeout_minutes: float = option(
        30.0,
        "how long one of several processes waits for another, for example while the first one "
        "writes the last checkpoint",
        above=0, most=10080,
    )  # fmt: skip
    threads: int | None = option(
        None,
        "CPU threads that torch, the operators and the image pipeline share; null: all cores that "
        "the process may use (the rule: mics_fast/engine/threads.py)",
        above=0, most=1024,
    )  # fmt: skip
    log_every: int = option(10, "steps between log lines", above=0)
    validate_every: int = option(
        0,
        "steps between validations on the val rows; 0 = one with each checkpoint. The best step is "
        "saved whenever it is validated",
        least=0,
    )
    checkpoint_every: int = option(
        200, "steps between checkpoints; 0 = off; one is also written when a stage ends", least=0
    )
    checkpoint_minutes: float = option(0.0, "minutes between further checkpoints; 0 = off", least=0)
    keep_checkpoints: int = option(2, "latest checkpoints to keep, beside the best", above=0)
    peak_tflops: float | None = option(
        None,
        "peak of the device in TFLOP/s, for its utilisation (MFU) in the log; null: 989, "
        "dense bf16, on an H100 (SXM) or H200, none elsewhere",
        above=0,
    )
    profile: int = option(0, "steps of each stage to profile, after a warm-up; 0 = none", least=0)
    log: LogConfig = option(factory=LogConfig)
    data: DataConfig = option(factory=DataConfig)
    model: ModelConfig = option(factory=ModelConfig)
    pretrain: PretrainConfig = option(factory=PretrainConfig)
    finetune: FinetuneConfig = option(factory=FinetuneConfig)
