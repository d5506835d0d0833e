"""Parameter groups and the learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float
) -> list[dict]:
    """Two parameter groups: matrices decay; biases, norms, tokens and positions do not.

    A matrix is a parameter named ``...weight`` with at least two dimensions.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in named:
        is_matrix = name.endswith("weight") and parameter.ndim > 1
        (decayed if is_matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": kept, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine_with_warmup(step: Tensor, steps: int, warmup: int, final: float) -> Tensor:
    """Learning-rate factor of a step: linear up to 1 over ``warmup`` steps, cosine to ``final``.

    Continuous: there is no jump where the warm-up ends.

    Args:
        step: 0-d int64.
        steps: of the schedule.
        warmup: of these, before the cosine.
        final: the factor at the end.

    Returns:
        0-d float64.
    """
    at = step.double()
    progress = ((at - warmup) / max(1, steps - warmup)).clamp(max=1.0)
    cosine = final + (1 - final) * 0.5 * (1 + torch.cos(math.pi * progress))
    return torch.where(step < warmup, (at + 1) / (warmup + 1), cosine)


def set_learning_rate(optimiser: Optimizer, factor: Tensor) -> None:
    """Scale every group's own peak rate; the peak is remembered in the group (and its state).

    The rate is a tensor that stays where it is, so that a recorded step reads the one of its step.

    Args:
        optimiser: a fused one, of parameters on the device of ``factor``.
        factor: 0-d.
    """
    for group in optimiser.param_groups:
        rate = group["lr"]
        group.setdefault("peak_lr", rate)
        if not isinstance(rate, Tensor) or rate.device != factor.device:  # new, or loaded
            group["lr"] = rate = torch.empty((), device=factor.device)  # float32: what fused reads
        rate.copy_(factor * group["peak_lr"])


def parameters_of(optimiser: Optimizer) -> list[nn.Parameter]:
    """All that an optimiser steps."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
