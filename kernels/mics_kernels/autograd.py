"""What the operators' autograd functions share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True``; torch's ``once_differentiable`` lets through what asks for it
    by way of the inputs alone, without a gradient and without a word."""

    @wraps(backward)
    def checked(ctx: Any, *outer: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of this operator cannot be differentiated again (create_graph=True): "
                'use backend="reference"'
            )
        return backward(ctx, *outer)

    return checked
