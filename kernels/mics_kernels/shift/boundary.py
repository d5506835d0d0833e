"""Where autograd and torch.compile meet the fast implementations of this folder.

One registered operator a call (``torch.library``), so that ``torch.compile(fullgraph=True)`` traces
through it; in eager mode the same functions run without crossing that border, which costs more
than a small kernel. The shift saves nothing for its backward pass, since its gradient is the
identity; the loss comes with its gradient, which the backward pass scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mics_kernels.backends import implementation
from mics_kernels.registration import differentiable_once, library, register


def shifted_features(
    features: Tensor,
    target: Tensor,
    variance: Tensor | None,
    strength: float | Tensor,
    seed: Tensor,
    row_ids: Tensor | None,
    directions: Tensor | None,
    backend: str,
) -> Tensor:
    """``shift_features``; its gradient is the identity.

    Args:
        backend: the implementation, by name; never "reference", which needs no border.
    """
    wanted = features.requires_grad and torch.is_grad_enabled()
    run: Any = _Shift.apply if wanted else _shift
    if torch.compiler.is_compiling():
        run = torch.ops.mics_kernels.shift_features
        strength = _as_tensor(strength, features)
    return run(features, target, variance, strength, seed, row_ids, directions, backend)


def moments(
    features: Tensor, target: Tensor, num_classes: int, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``class_moments``: constants, as far as autograd is concerned."""
    run: Any = _moments
    if torch.compiler.is_compiling():
        run = torch.ops.mics_kernels.class_moments
    return run(features.detach(), target, num_classes, weight, backend)


def shifted_losses(
    logits: Tensor, target: Tensor, table: Tensor, strength: float | Tensor, backend: str
) -> Tensor:
    """Losses (B,) of ``shifted_cross_entropy``; differentiable once, in logits and table.

    Args:
        table: (C, C), float32.
    """
    wanted = (logits.requires_grad or table.requires_grad) and torch.is_grad_enabled()
    run: Any = _ShiftedLosses.apply if wanted else _losses
    if torch.compiler.is_compiling():
        run = torch.ops.mics_kernels.shifted_losses
        strength = _as_tensor(strength, logits)
    losses, _ = run(logits, target, table, strength, backend, wanted)
    return losses


def _as_tensor(strength: float | Tensor, like: Tensor) -> Tensor:
    """A float of a registered operator is a constant: one that is ramped would be compiled anew
    every step. torch.full would make it a constant, too."""
    if isinstance(strength, Tensor):
        return strength
    return torch.ones((), device=like.device) * strength


def _shift(
    features: Tensor,
    target: Tensor,
    variance: Tensor | None,
    strength: float | Tensor,
    seed: Tensor,
    row_ids: Tensor | None,
    directions: Tensor | None,
    backend: str,
) -> Tensor:
    return implementation("shift", features, backend).shift_features(
        features, target, variance, strength, seed, row_ids, directions
    )


def _shift_shapes(features: Tensor, *_: Any) -> Tensor:
    return features.new_empty(features.shape)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _pass_on(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    return outer, *(None,) * 7


def _moments(
    features: Tensor, target: Tensor, num_classes: int, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("moments", features, backend).class_moments(
        features, target, num_classes, weight
    )


def _moments_shapes(
    features: Tensor, target: Tensor, num_classes: int, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (num_classes, features.shape[1])
    count = features.new_empty(num_classes, dtype=torch.float64)
    mean, m2 = (features.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return count, mean, m2


def _losses(
    logits: Tensor,
    target: Tensor,
    table: Tensor,
    strength: float | Tensor,
    backend: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (B,), and the gradient of each for its own logits (B, C)."""
    return implementation("shift", logits, backend).shifted_losses(
        logits, target, table, strength, want_gradient
    )


def _losses_shapes(
    logits: Tensor,
    target: Tensor,
    table: Tensor,
    strength: float | Tensor,
    backend: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, logits.new_empty(logits.shape if want_gradient else 0)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, target, _, strength, ctx.backend, _ = inputs
    _, gradient = output
    ctx.strength = None if isinstance(strength, Tensor) else strength
    ctx.save_for_backward(gradient, target, strength if ctx.strength is None else None)
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)


def _scale_gradient_by(run_moments: Any) -> Any:
    """The backward pass, with class sums by the registered operator or in plain eager mode."""

    @differentiable_once
    def scale_gradient(ctx: Any, outer: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if outer is None:
            return (None,) * 6
        gradient, target, strength = ctx.saved_tensors
        strength = ctx.strength if strength is None else strength.reshape(-1, 1)
        rows = gradient * outer.unsqueeze(1)
        of_table = None
        if ctx.needs_input_grad[2]:
            # Row y of the table is part of every logit of the rows of class y.
            parts = rows.float() * (0.5 * strength**2)
            count, mean, _ = run_moments(parts, target, rows.shape[1], None, ctx.backend)
            of_table = (mean * count.unsqueeze(1)).float()
        return rows.to(gradient.dtype), None, of_table, None, None, None

    return scale_gradient


class _Shift(torch.autograd.Function):
    forward = staticmethod(_shift)
    setup_context = staticmethod(_keep_nothing)
    backward = staticmethod(_pass_on)


class _ShiftedLosses(torch.autograd.Function):
    forward = staticmethod(_losses)
    setup_context = staticmethod(_keep_gradient)
    backward = staticmethod(_scale_gradient_by(_moments))


register(
    "shift_features(Tensor features, Tensor target, Tensor? variance, Tensor strength, "
    "Tensor seed, Tensor? row_ids, Tensor? directions, str backend) -> Tensor",
    _shift,
    _shift_shapes,
)
register(
    "class_moments(Tensor features, Tensor target, int num_classes, Tensor? weight, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _moments,
    _moments_shapes,
)
register(
    "shifted_losses(Tensor logits, Tensor target, Tensor table, Tensor strength, str backend, "
    "bool want_gradient) -> (Tensor, Tensor)",
    _losses,
    _losses_shapes,
)
torch.library.register_autograd(
    "mics_kernels::shift_features", _pass_on, setup_context=_keep_nothing, lib=library
)
torch.library.register_autograd(
    "mics_kernels::shifted_losses",
    _scale_gradient_by(torch.ops.mics_kernels.class_moments),
    setup_context=_keep_gradient,
    lib=library,
)
