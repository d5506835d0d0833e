"""One step: backward passes over the parts of a batch, then every optimiser once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mics_fast.engine.gradients import GradientAverager
from mics_fast.engine.guard import Guard
from mics_fast.engine.optimiser import (
    clear_gradients,
    cosine_with_warmup,
    parameters_of,
    set_learning_rate,
)
from mics_fast.engine.plan import Plan, Stage
from mics_fast.engine.profile import phase
from mics_fast.engine.sharding import Shards

Values = dict[str, Tensor | float | Callable[[], Tensor | Mapping[str, Tensor]]]
"""Reported values of a step: scalars, or functions that compute some on logged steps only."""


class Update:
    """Steps the optimisers of a plan without a host sync.

    Each part of a batch yields losses, divided by the number of parts, whose gradients add up. In
    the last part an optimiser steps before the stage is asked for the next losses. A loss scaler
    applies to the main optimiser only: a step whose gradients overflow is skipped and counted, and
    is an error only if the scale cannot be lowered further.

    Args:
        stage: models and losses.
        plan: optimisers, schedules, clipping, parts, scaler.
    """

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self.stage, self.plan = stage, plan
        self.averagers = {
            name: GradientAverager(in_order(optimiser, stage), message=plan.message)
            for name, optimiser in plan.optimisers.items()
        }
        self.guard = Guard()
        self.at = torch.zeros((), dtype=torch.int64, device=plan.device)
        self.skipped = torch.zeros((), dtype=torch.float64, device=plan.device)

    def __call__(self, batch: Any, step: int) -> Values:
        """Train on a batch; return the values to log, on the device, averaged over its parts."""
        self.begin(step)
        return self.compute(batch)

    def begin(self, step: int) -> None:
        """Write the number and the learning rates of a step to where ``compute`` reads them."""
        plan = self.plan
        self.at.fill_(step)
        for name, final in plan.final_lr.items():
            factor = cosine_with_warmup(step, plan.steps, plan.warmup, final)
            set_learning_rate(plan.optimisers[name], factor)

    def compute(self, batch: Any) -> Values:
        """Run the step that has begun; all lasting state is updated in place."""
        parts = self.plan.accumulate
        if parts == 1:
            micro_batches = [batch]
        else:
            micro_batches = list(zip(*(own.split(parts) for own in batch), strict=True))
        sums: Values = {}
        for number, micro in enumerate(micro_batches):
            values = self._part(micro, first=number == 0, last=number == parts - 1)
            for name, value in values.items():
                before = sums.get(name)
                if isinstance(value, Tensor) and isinstance(before, Tensor):
                    value = before + value
                sums[name] = value
        if parts > 1:
            sums = {n: v / parts if isinstance(v, Tensor) else v for n, v in sums.items()}
        with phase("after_step"):
            self.stage.after_step()
        return sums | self._step_values(sums)

    def _part(self, batch: Any, *, first: bool, last: bool) -> Values:
        """Run the backward passes of one part of a batch; after the last, step the optimisers."""
        plan, values = self.plan, Values()
        remaining = iter(self.stage.losses(batch, self.at, 1 / plan.accumulate))
        while True:
            with phase("forward"):
                losses = next(remaining, None)
                if losses is None:
                    return values
                total = losses.total()
            name = losses.optimiser
            if first:
                clear_gradients(plan.optimisers[name])
            with phase("backward"):
                self._backward(name, total, last)
            if last:
                with phase("optimiser"):
                    self._step(name)
            if name == plan.main:
                values["loss"] = total.detach()
            values |= {f"loss_{term}": loss.detach() for term, loss in losses.terms.items()}
            values |= {f"weight_{term}": weight for term, weight in losses.weights.items()}
            values |= losses.metrics
            values |= losses.on_log

    def _backward(self, name: str, total: Tensor, last: bool) -> None:
        if self.plan.accumulate > 1:
            total = total / self.plan.accumulate
        if name == self.plan.main and self.plan.scaler is not None:
            total = self.plan.scaler.scale(total)
        with self.averagers[name].averaging() if last else nullcontext():
            total.backward()
        if last and self.plan.shards is not None:
            self.plan.shards.hand_over(self.plan.optimisers[name])

    def _step(self, name: str) -> None:
        """Clip the main optimiser's gradients and step."""
        plan = self.plan
        optimiser = plan.optimisers[name]
        if name != plan.main:
            optimiser.step()
            return
        if plan.scaler is not None:
            plan.scaler.unscale_(optimiser)
        self._norm = clip_gradients(optimiser, plan.clip, plan.shards)
        if plan.scaler is None:
            optimiser.step()
        else:
            self._scale = plan.scaler.scale(torch.ones((), device=self._norm.device))
            plan.scaler.step(optimiser)
            plan.scaler.update()

    def _step_values(self, losses: Values) -> Values:
        """Return gradient norm, rates and scaler state, and let the guard check the values."""
        norm = self._norm
        watched = {n: v for n, v in losses.items() if n.startswith("loss_")}
        watched |= {"loss": losses["loss"], "gradient_norm": norm}
        values: Values = {"gradient_norm": norm}
        for name, optimiser in self.plan.optimisers.items():
            for group in optimiser.param_groups:
                of = group.get("name", "" if name == self.plan.main else name)
                values[f"lr_{of}" if of else "lr"] = group["lr"]
        if self.plan.scaler is not None:
            watched["gradient_norm"] = torch.where(self._scale > 1, 0.0, norm)
            self.skipped += ~norm.isfinite()
            values |= {"gradient_scale": self._scale, "skipped_steps": self.skipped}
        self.guard.watch(self.at + 1, {n: v for n, v in watched.items() if isinstance(v, Tensor)})
        return values


def computed(values: Values) -> dict[str, Tensor | float]:
    """Call the functions among the values of a step."""
    found: dict[str, Tensor | float] = {}
    for name, value in values.items():
        own = value() if callable(value) else value
        found |= own if isinstance(own, Mapping) else {name: own}
    return found


def clip_gradients(optimiser: Optimizer, largest: float, shards: Shards | None = None) -> Tensor:
    """Scale gradients to a norm of at most ``largest`` (0: no clipping); return the norm, 0-d."""
    gradients = [own.grad for own in parameters_of(optimiser) if own.grad is not None]
    if shards is None:
        norm = get_total_norm(gradients, foreach=True)
    else:
        norm = shards.gradient_norm(optimiser)
    if largest:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def in_order(optimiser: Optimizer, stage: Stage) -> list[nn.Parameter]:
    """List an optimiser's parameters in the order of the stage, roughly that of the forward pass;
    the optimiser itself sorts them by weight decay."""
    own = set(parameters_of(optimiser))
    return [parameter for parameter in stage.parameters() if parameter in own]
