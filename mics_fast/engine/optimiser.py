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
    """Make two parameter groups: matrices decay; biases, norms, tokens and positions do not.

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
    """Compute the learning-rate factor: linear warm-up to 1, then cosine decay to ``final``.

    The two parts join continuously.

    Args:
        step: from 0.
        steps: length of the schedule.
        warmup: number of warm-up steps, part of ``steps``.
        final: factor at the end.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimiser: Optimizer, factor: float) -> None:
    """Scale each group's peak rate, which is stored in the group (and so in the state).

    The rate is a tensor updated in place, so that a recorded step reads the current value.

    Args:
        optimiser: fused.
        factor: of the peak rates.
    """
    for group in optimiser.param_groups:
        rate, device = group["lr"], group["params"][0].device
        group.setdefault("peak_lr", rate)
        if not isinstance(rate, Tensor) or rate.device != device:  # new, or loaded
            group["lr"] = rate = torch.empty((), device=device)  # fused needs float32
        rate.fill_(factor * group["peak_lr"])


def parameters_of(optimiser: Optimizer) -> list[nn.Parameter]:
    """List all parameters of an optimiser."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def clear_gradients(optimiser: Optimizer) -> None:
    """Drop the gradients; torch's ``zero_grad`` opens a profiler's range each time."""
    for parameter in parameters_of(optimiser):
        parameter.grad = None
