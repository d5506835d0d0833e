"""The consistency losses as autograd and ``torch.compile`` see them.

Losses and gradients come out of one sweep over the keys; the backward pass only scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mics_kernels.backends import implementation
from mics_kernels.consistency.records import ConsistencyInputs, ConsistencyResults
from mics_kernels.registration import Gradients, Operator, differentiable_once


def _losses(inputs: ConsistencyInputs) -> ConsistencyResults:
    return implementation("consistency", inputs.backend).losses_and_gradients(inputs)


def _shapes(inputs: ConsistencyInputs) -> ConsistencyResults:
    query, wanted = inputs.queries[0], inputs.want_gradient
    shape = (len(inputs.query_modalities), query.shape[0])
    return ConsistencyResults(
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty(shape, dtype=torch.bool),
        query.new_empty((*shape, query.shape[1]) if wanted else 0, dtype=torch.float32),
        query.new_empty(shape if wanted else 0, dtype=torch.float32),
    )


def _save_gradients(ctx: Any, inputs: ConsistencyInputs, results: ConsistencyResults) -> None:
    ctx.save_for_backward(results.gradient, results.slope)
    ctx.query_modalities = inputs.query_modalities
    ctx.dtypes = [query.dtype for query in inputs.queries]
    temperature = inputs.temperature
    ctx.temperature = temperature.dtype if isinstance(temperature, Tensor) else None


@differentiable_once
def _scale_gradients(ctx: Any, outer: Tensor) -> Gradients:
    gradient, slope = ctx.saved_tensors
    sums: list[Tensor | None] = [None] * len(ctx.dtypes)
    parts = (gradient * outer.unsqueeze(2)).unbind()  # of the pairs
    for part, modality in zip(parts, ctx.query_modalities, strict=True):
        sums[modality] = part if (before := sums[modality]) is None else before + part
    queries = [
        None if total is None else total.to(dtype)
        for total, dtype in zip(sums, ctx.dtypes, strict=True)
    ]
    if ctx.temperature is None:
        return {"queries": queries}
    return {"queries": queries, "temperature": (outer * slope).sum().to(ctx.temperature)}


losses_and_counted = Operator(
    "consistency_losses",
    ConsistencyInputs,
    ConsistencyResults,
    run=_losses,
    shapes=_shapes,
    save=_save_gradients,
    backward=_scale_gradients,
    differentiable=("queries", "temperature"),
    slopes=("gradient", "slope"),
)
