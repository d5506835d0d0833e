"""The contract between a stage of the method and the loop: losses, and how they are minimised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from mics_fast.engine.sharding import Shards


@dataclass
class Losses:
    """What one optimiser minimises in one step.

    Args:
        optimiser: its name.
        terms: name -> unweighted scalar loss.
        weights: name -> weight, a number or 0-d; a term that is not named weighs 1.
        metrics: name -> scalar that is only logged.
    """

    optimiser: str
    terms: dict[str, Tensor]
    weights: Mapping[str, Tensor | float] = field(default_factory=dict)
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)

    def total(self) -> Tensor:
        """The weighted sum of the terms."""
        return torch.stack(
            [self.weights.get(name, 1.0) * term for name, term in self.terms.items()]
        ).sum()


class Stage(Protocol):
    """One stage of the method: models and losses. Its ``state_dict`` is all it remembers."""

    def losses(self, batch: Any, step: Tensor, share: float = 1.0) -> Iterator[Losses]:
        """The losses of a step, or of one part of its batch, in the order in which they are
        minimised; in the last part, the loop has stepped the optimiser of one before it asks for
        the next.

        Before each backward pass the loop multiplies the loss by ``share``, the part's share of
        the batch: gradients that a stage finds between two losses are that much smaller.

        ``step`` is 0-d int64 on the device. What changes from step to step is computed from it
        there, and what lasts is changed in place: a step may be recorded once and then replayed.
        """

    def after_step(self) -> None:
        """Called once when every optimiser has stepped: averages, queues, statistics advance, by
        all parts of the batch since the last call."""

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """What looks wrong in a log record, a sentence each."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """Length of a stage, its optimisers, and when to log and save.

    Args:
        name: of the stage.
        steps: optimiser steps in all.
        steps_per_epoch: for the log.
        optimisers: name -> optimiser; the first is the main one, whose losses are ``loss``.
        warmup: steps of linear warm-up.
        clip: largest gradient norm of the main optimiser; 0 = none.
        log_every: steps between log records.
        checkpoint_every: steps between checkpoints, 0 = off; each is scored where there are val
            rows.
        final_lr: name -> learning rate at the end as a factor of its peak; absent: constant.
        checkpoint_minutes: minutes between checkpoints; 0 = off.
        accumulate: equal parts that a batch is worked on in.
        scaler: of the main optimiser's loss, where something is computed in float16.
        flops: loss term -> floating-point operations of a step; empty: not known.
        peak_tflops: of the device, in TFLOP/s; None: not known.
        profile: steps to profile.
        cuda_graph: whether the step is recorded and replayed.
        choose_best: whether the first score names the best checkpoint; else the latest counts.
        shards: the parts of the stage that are sharded over the ranks; None: nothing is.
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
    shards: Shards | None = None

    @property
    def main(self) -> str:
        """The name of the main optimiser."""
        return next(iter(self.optimisers))

    @property
    def device(self) -> torch.device:
        """Where the parameters of the main optimiser live."""
        return self.optimisers[self.main].param_groups[0]["params"][0].device
