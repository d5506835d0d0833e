"""The loop: backward passes, optimiser steps, log, checkpoints. It knows nothing of the method."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.engine.log import RunLog, Timer
from mics_fast.engine.optimiser import cosine_with_warmup, set_learning_rate
from mics_fast.errors import InputError


@dataclass
class Losses:
    """What one optimiser minimises in one step.

    Args:
        optimiser: its name.
        terms: name -> unweighted scalar loss.
        weights: name -> weight; a term that is not named weighs 1.
        metrics: name -> scalar that is only logged.
    """

    optimiser: str
    terms: dict[str, Tensor]
    weights: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Tensor | float] = field(default_factory=dict)

    def total(self) -> Tensor:
        """The weighted sum of the terms."""
        return torch.stack(
            [self.weights.get(name, 1.0) * term for name, term in self.terms.items()]
        ).sum()


class Stage(Protocol):
    """One stage of the method: models and losses. Its ``state_dict`` is all it remembers."""

    def losses(self, batch: Any, step: int) -> Iterator[Losses]:
        """The losses of a step in the order in which they are minimised; the loop has stepped
        the optimiser of one before it asks for the next."""

    def after_step(self) -> None:
        """Called once when every optimiser has stepped: averages, queues, statistics advance."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass
class Plan:
    """How long a stage runs and how its optimisers behave.

    Args:
        name: of the stage.
        steps: optimiser steps in all.
        steps_per_epoch: for the log.
        optimisers: name -> optimiser; the first is the main one, whose losses are ``loss``.
        warmup: steps of linear warm-up.
        final_lr: name -> learning rate at the end as a factor of its peak; absent: constant.
        clip: largest gradient norm of the main optimiser; 0 = none.
        log_every: steps between log records.
        checkpoint_every: steps between checkpoints; each is scored where there are val rows.
        choose_best: whether the first score names the best checkpoint; else the latest counts.
    """

    name: str
    steps: int
    steps_per_epoch: int
    optimisers: dict[str, Optimizer]
    warmup: int
    final_lr: dict[str, float]
    clip: float
    log_every: int
    checkpoint_every: int
    choose_best: bool = True


class Loop:
    """Runs one stage from wherever its last checkpoint left it.

    Args:
        stage: models and losses.
        plan: length, optimisers, intervals.
        checkpoints: where they go.
        meta: what the checkpoints belong to.
        log: where records go.
        validate: scores the stage as it is; name -> value, higher is better for the first, which
            may choose the best checkpoint.
    """

    def __init__(
        self,
        stage: Stage,
        plan: Plan,
        checkpoints: Checkpoints,
        meta: Mapping[str, Any],
        log: RunLog,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.stage, self.plan, self.checkpoints = stage, plan, checkpoints
        self.meta, self.log, self.validate = dict(meta), log, validate
        self.step = 0
        self.timer = Timer()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to what a checkpoint holds."""
        self.step = state["step"]
        self.stage.load_state_dict(state["stage"])
        for name, optimiser in self.plan.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        torch.set_rng_state(state["rng"])
        self.timer = Timer(state["seconds"])

    def run(self, batches: Iterator[Any]) -> bool:
        """Train to the end of the plan on batches that start at the current step.

        Returns:
            True at the end; False where SIGTERM asked to stop (a checkpoint is then saved).
        """
        plan, timer = self.plan, self.timer
        with StopOnSigterm() as stop:
            while self.step < plan.steps:
                began = time.perf_counter()
                batch = next(batches)
                timer.add(sum(len(part.label) for part in batch), time.perf_counter() - began)
                values = self._train_step(batch)
                self.step += 1
                last = self.step == plan.steps or stop.asked
                save = last or self.step % plan.checkpoint_every == 0
                if save or self.step % plan.log_every == 0:
                    self._record(values, save, last)
                if stop.asked:
                    break
        return self.step == plan.steps

    def _train_step(self, batch: Any) -> dict[str, Tensor | float]:
        """Step every optimiser once; what to log, still on the device."""
        values: dict[str, Tensor | float] = {}
        main = next(iter(self.plan.optimisers))
        for losses in self.stage.losses(batch, self.step):
            optimiser = self.plan.optimisers[losses.optimiser]
            self._set_rate(losses.optimiser)
            total = losses.total()
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            if losses.optimiser == main:
                parameters = [p for group in optimiser.param_groups for p in group["params"]]
                norm = torch.nn.utils.clip_grad_norm_(parameters, self.plan.clip or math.inf)
                values |= {"loss": total.detach(), "gradient_norm": norm}
                values["lr"] = optimiser.param_groups[0]["lr"]
            optimiser.step()
            values |= {f"loss_{name}": term.detach() for name, term in losses.terms.items()}
            values |= {f"weight_{name}": weight for name, weight in losses.weights.items()}
            values |= losses.metrics
        self.stage.after_step()
        return values

    def _set_rate(self, name: str) -> None:
        final = self.plan.final_lr.get(name)
        if final is not None:
            factor = cosine_with_warmup(self.step, self.plan.steps, self.plan.warmup, final)
            set_learning_rate(self.plan.optimisers[name], factor)

    def _record(self, values: dict[str, Tensor | float], save: bool, last: bool) -> None:
        """One log record, after the checkpoint and its score where one is due."""
        plan = self.plan
        record = {
            "epoch": self.step / plan.steps_per_epoch,
            **read_back(values),
            **self.timer.read(),
        }
        for name, value in record.items():
            if name.startswith("loss") and not math.isfinite(value):
                raise FloatingPointError(f"{plan.name} step {self.step}: {name} is {value}")
        if save:
            record |= self._save(last)
        progress = (
            f"{plan.name}  epoch {record['epoch']:.1f}  step {self.step}/{plan.steps}  "
            f"{record['pairs_per_second']:.0f} pairs/s  data wait {record['data_wait']:.0%}"
        )
        self.log.write(plan.name, self.step, record, progress)
        self.timer.restart()

    def _save(self, last: bool) -> dict[str, float]:
        """Write a checkpoint; its scores, where there is something to score it on.

        Raises:
            InputError: the last one cannot be written; without another, training goes on.
        """
        scores = self.validate() if self.validate else {}
        state = {
            "step": self.step,
            "stage": self.stage.state_dict(),
            "optimisers": {name: o.state_dict() for name, o in self.plan.optimisers.items()},
            "rng": torch.get_rng_state(),
            "seconds": self.timer.read()["seconds"],
        }
        try:
            self.checkpoints.save(self.step, state, self.meta)
        except OSError as error:
            where = f"the checkpoint of {self.plan.name} step {self.step}"
            sentence = f"{where} cannot be written: {error.strerror or error}"
            if last:
                raise InputError(sentence) from None
            print(f"{sentence}; going on without it", file=sys.stderr)
            return scores
        if scores and self.plan.choose_best:
            self.checkpoints.offer_best(self.step, next(iter(scores.values())))
        return scores


def read_back(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Scalars as Python numbers, with one transfer from the device."""
    tensors = {name: v.float() for name, v in values.items() if isinstance(v, Tensor)}
    numbers = torch.stack(list(tensors.values())).tolist()
    return {
        **{n: float(v) for n, v in values.items() if not isinstance(v, Tensor)},
        **dict(zip(tensors, numbers, strict=True)),
    }


class StopOnSigterm:
    """Within this context SIGTERM sets ``asked`` instead of ending the process."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopOnSigterm:
        self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True
