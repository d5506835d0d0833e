"""The contract between stage and loop: losses, optimisers, schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from mics_fast.engine.sharding import Shards


@dataclass
class Losses:
    """The losses that one optimiser minimises in one step.

    Args:
        optimiser: its name.
        terms: name -> unweighted scalar loss.
        weights: name -> weight, a number or 0-d; default 1.
        metrics: name -> scalar for the log only.
        on_log: name -> function that computes a further scalar for the log, or several by name. It
            is called on logged steps only, after the step and on all ranks, and for the last part
            of a batch only.
    """

    optimiser: str
    terms: dict[str, Tensor]
    weights: Mapping[str, Tensor | float] = field(default_factory=dict)
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    on_log: Mapping[str, Callable[[], Tensor | Mapping[str, Tensor]]] = field(default_factory=dict)

    def total(self) -> Tensor:
        """Return the weighted sum of the terms."""
        return torch.stack(
            [
                self.weights[name] * term if name in self.weights else term
                for name, term in self.terms.items()
            ]
        ).sum()


class Stage(Protocol):
    """One stage of the method: models and losses. Its ``state_dict`` is its complete state."""

    def losses(self, batch: Any, step: Tensor, share: float = 1.0) -> Iterator[Losses]:
        """Yield the losses of a step, or of one part of its batch, in the order of minimisation.

        In the last part, the loop steps each optimiser before it asks for the next losses. Before
        each backward pass it multiplies the loss by ``share``, the part's share of the batch:
        gradients that a stage reads between two losses are scaled by it.

        ``step`` is 0-d int64 on the device. Values that change per step are computed from it on the
        device, and lasting state is updated in place, so that a step can be recorded and replayed.
        """

    def after_step(self) -> None:
        """Advance averages, queues and statistics by all parts of the batch; called once per step,
        after every optimiser has stepped."""

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """Return a sentence for each suspicious value in a log record."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """Length of a stage, its optimisers, and when to log and save.

    Args:
        name: of the stage.
        steps: total number of optimiser steps.
        steps_per_epoch: for the log.
        optimisers: name -> optimiser; the first is the main one, whose losses are ``loss``.
        warmup: steps of linear warm-up.
        clip: largest gradient norm of the main optimiser; 0: no clipping.
        log_every: steps between log records.
        checkpoint_every: steps between checkpoints; 0: off.
        final_lr: name -> final learning rate as a factor of its peak; absent: constant.
        checkpoint_minutes: minutes between checkpoints; 0: off.
        accumulate: number of equal parts in which a batch is processed.
        scaler: loss scaler of the main optimiser, for float16.
        flops: loss term -> floating-point operations per step; empty: unknown.
        peak_tflops: of the device, in TFLOP/s; None: unknown.
        profile: number of steps to profile.
        cuda_graph: record and replay the step.
        choose_best: choose the best checkpoint by the first score, and save each new best; False:
            use the latest.
        validate_every: steps between validations; 0: validate with each checkpoint.
        score: title of the first score, for the terminal.
        patience: validations without a better first score after which the stage ends; 0: off.
        shards: the sharded parts of the stage; None: nothing is sharded.
        message: dtype in which gradients travel between ranks; None: their own.
    """

    name: str
    steps: int
    steps_per_epoch: int
    optimisers: dict[str, Optimizer]
    warmup: int
    clip: float
    log_every: int
    checkpoint_every: int
    final_lr: dict[str, float] = field(default_factory=dict)
    checkpoint_minutes: float = 0.0
    accumulate: int = 1
    scaler: GradScaler | None = None
    flops: dict[str, float] = field(default_factory=dict)
    peak_tflops: float | None = None
    profile: int = 0
    cuda_graph: bool = False
    choose_best: bool = True
    validate_every: int = 0
    score: str = "val"
    patience: int = 0
    shards: Shards | None = None
    message: torch.dtype | None = None

    @property
    def epochs(self) -> int:
        """Passes over the data, the last one of which may not be complete."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def main(self) -> str:
        """Name of the main optimiser."""
        return next(iter(self.optimisers))

    @property
    def device(self) -> torch.device:
        """Device of the main optimiser's parameters."""
        return self.optimisers[self.main].param_groups[0]["params"][0].device
