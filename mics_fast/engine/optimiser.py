"""Parameter groups and the learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
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


def cosine_with_warmup(step: int, steps: int, warmup: int, final: float) -> float:
    """Learning-rate factor of a step: linear up to 1 over ``warmup`` steps, cosine to ``final``.

    Continuous: there is no jump where the warm-up ends.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimiser: Optimizer, factor: float) -> None:
    """Scale every group's own peak rate; the peak is remembered in the group (and its state)."""
    for group in optimiser.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor


def parameters_of(optimiser: Optimizer) -> list[nn.Parameter]:
    """All that an optimiser steps."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
