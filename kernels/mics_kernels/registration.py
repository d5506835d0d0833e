"""What every operator's boundary needs: a place in ``torch.library``, and a backward pass once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

library = torch.library.Library("mics_kernels", "FRAGMENT")


def register(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Register an operator of ``torch.ops.mics_kernels``.

    Args:
        schema: name, arguments and results, as ``torch.library`` writes them.
        run: computes the results, on any device.
        shapes: makes empty results of the same shapes, dtypes and strides.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mics_kernels::{name}", shapes, lib=library)


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
