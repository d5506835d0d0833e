"""Columns of a stored result, and options of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch


class Row(TypedDict, total=False):
    """One implementation of one case, as bench/results stores it.

    A row has only the columns of its subject. A row with ``absent`` has no figures.
    """

    subject: str  # evidential, consistency, shift, features, pipeline, training or host
    operator: str
    shape: str  # the size, in words
    batch: int  # rows, for plots
    threads: int  # CPU threads
    implementation: str
    ours: bool  # this project's
    absent: str  # why there are no figures
    failed: bool  # ... because it was wrong or raised an error
    # Times. A call of an operator, a pair of the pipeline, a step of training.
    median_ms: float
    min_ms: float
    p20_ms: float
    p80_ms: float
    cpu_ms: float  # median CPU time of all threads
    rounds: int
    cores: float  # CPU time over wall time of the whole case
    replayed: bool  # as a CUDA graph
    called_ms: float  # median of an ordinary call, as a user makes it
    called_ratio: float  # ... over that of our fastest implementation
    ratio: float | None  # median over that of our fastest implementation
    ratio_of_min: float | None
    ratio_of_cpu: float | None
    # Work, and the least time the machine needs for it.
    bytes: int
    flops: float | None
    bandwidth: float  # bytes/s of a stream as long as the case's bytes
    floor_ms: float | None
    share_of_floor: float | None
    extra_mb: float | None  # peak memory beyond the inputs
    # The image pipeline and training.
    pairs_per_second: float
    cpu_ms_per_pair: float
    slowest: float  # pairs/s of the slowest round
    fastest: float
    decoder: str
    pillow: str  # its version
    rung: str
    precision: str
    kind: str  # of a rung: ladder, variant or fine-tuning
    apart: float  # largest relative difference of a loss from the reference rung
    loss_first: dict[str, float]
    loss_last: dict[str, float]
    memory_mb: float | None  # peak of a step, beyond weights and optimisers
    ms: float  # median step
    gflop_per_pair: float
    tflops: float
    mfu: float
    data_wait: float | None  # share of time spent waiting for data
    frames: str  # "random" if no images could be read
    x_ms: float | None  # speed-up over rung a
    x_cpu_ms: float | None
    times_b: float | None  # speed-up over rung b
    # Host time and launches of a call on a GPU, counted without one.
    host_us: float
    launches: int  # of this project's Triton kernels
    torch_kernels: int  # of torch's operators that would launch one


class Machine(TypedDict, total=False):
    """Machine and versions of a run."""

    device: str
    kind: str  # cpu or cuda
    cpu: str
    cpus: int
    cpu_clock: str  # MHz
    threads: int
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    gpu: str  # name, driver and clocks
    gpu_under_load: str
    commit: str
    command: str
    date: str
    mode: str  # quick or full


class StoredPeaks(TypedDict):
    """``roofline.Peaks`` as stored, per number of threads."""

    bytes: float
    matrix_flops: float
    vector_flops: float
    source: str
    reached: bool


@dataclass(frozen=True)
class Options:
    """Options that every subject reads.

    Attributes:
        device: where operators and steps run.
        full: True if the documentation may show the result.
        threads: CPU threads.
        budget: seconds per case.
        end: ``time.monotonic()`` after which nothing new starts.
        manifest: images for ``pipeline`` and ``training``.
    """

    device: torch.device
    full: bool
    threads: int
    budget: float
    end: float
    manifest: Path | None = None
