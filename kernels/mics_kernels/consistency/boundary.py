"""Where autograd and torch.compile meet the fast implementations of the consistency losses.

One registered operator a call (``torch.library``); in eager mode the same function runs in a plain
``autograd.Function``, since crossing that border costs more than a small kernel. Losses and their
gradients come out of one sweep over the keys: the backward pass only scales.

Shapes: B samples, D feature width, K keys, Q queue rows, V modalities, P ordered pairs of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mics_kernels.backends import implementation
from mics_kernels.registration import differentiable_once, library, register


def losses_and_counted(
    queries: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keys: Sequence[Tensor],
    queues: Sequence[Tensor] | None,
    temperature: float | Tensor,
    alpha: float | Tensor,
    queue_lengths: Sequence[int | Tensor] | None,
    key_ids: Tensor | None,
    queue_ids: Sequence[Tensor] | None,
    present: Tensor | None,
    pairs: Sequence[tuple[int, int]],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Losses (P, B) float32 and which of them count (P, B) bool; differentiable once.

    Args:
        pairs: which modality's queries are held against which one's keys.
        backend: the implementation, by name; never "reference", which needs no border.
        The others: see ``mics_kernels.multimodal_consistency_loss``; ``present`` is (K, V).
    """
    asks = [*queries, temperature] if isinstance(temperature, Tensor) else [*queries]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in asks)
    lengths: list[int | Tensor] = list(queue_lengths or ())
    if torch.compiler.is_compiling():
        # As tensors: a number of a registered operator is a constant, and one that changes from
        # step to step would be compiled anew every step.
        device = queries[0].device
        temperature, alpha = _on_device(temperature, device), _on_device(alpha, device)
        lengths = [_on_device(length, device, torch.int64) for length in lengths]
    arguments: tuple[Any, ...] = (
        list(teachers), list(keys), list(queues or ()), temperature, alpha, lengths, key_ids,
        list(queue_ids or ()), present, [index for pair in pairs for index in pair], backend,
    )  # fmt: skip
    if wanted and not torch.compiler.is_compiling():
        return _Losses.apply(arguments, temperature, *queries)
    run: Any = _losses
    if torch.compiler.is_compiling():
        run = torch.ops.mics_kernels.consistency_losses
    losses, counted, _, _ = run(list(queries), *arguments, wanted)
    return losses, counted


def _on_device(
    value: float | Tensor, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # torch.full would make a constant of it
    return torch.ones((), dtype=dtype, device=device) * value


def _losses(
    queries: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keys: Sequence[Tensor],
    queues: Sequence[Tensor],
    temperature: float | Tensor,
    alpha: float | Tensor,
    queue_lengths: Sequence[int | Tensor],
    key_ids: Tensor | None,
    queue_ids: Sequence[Tensor],
    present: Tensor | None,
    pairs: Sequence[int],
    backend: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, what counts, and their gradients (P, B, D) in the queries, (P, B) in T."""
    return implementation("consistency", queries[0], backend).losses_and_gradients(
        queries, teachers, keys, queues, temperature, alpha, queue_lengths,
        key_ids, queue_ids, present, list(zip(pairs[::2], pairs[1::2], strict=True)), want_gradient,
    )  # fmt: skip


def _shapes(
    queries: Sequence[Tensor],
    teachers: Sequence[Tensor],
    keys: Sequence[Tensor],
    queues: Sequence[Tensor],
    temperature: Tensor,
    alpha: Tensor,
    queue_lengths: Sequence[Tensor],
    key_ids: Tensor | None,
    queue_ids: Sequence[Tensor],
    present: Tensor | None,
    pairs: Sequence[int],
    backend: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, count = queries[0], len(pairs) // 2
    losses = query.new_empty((count, query.shape[0]), dtype=torch.float32)
    counted = query.new_empty(losses.shape, dtype=torch.bool)
    gradient = query.new_empty((count, *query.shape) if want_gradient else 0, dtype=torch.float32)
    slope = query.new_empty(losses.shape if want_gradient else 0, dtype=torch.float32)
    return losses, counted, gradient, slope


def _query_gradients(
    outer: Tensor, gradient: Tensor, pairs: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Of each modality's queries: the sum over the pairs in which they ask."""
    sums: list[Tensor | None] = [None] * len(dtypes)
    for pair, view in enumerate(pairs[::2]):
        part = outer[pair].unsqueeze(1) * gradient[pair]
        sums[view] = part if (before := sums[view]) is None else before + part
    return [
        None if total is None else total.to(dtype)
        for total, dtype in zip(sums, dtypes, strict=True)
    ]


class _Losses(torch.autograd.Function):
    # ``arguments`` holds the temperature as well; it is given by itself so that autograd sees it.
    @staticmethod
    def forward(
        ctx: Any, arguments: tuple[Any, ...], temperature: float | Tensor, *queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        run: Any = _losses
        losses, counted, gradient, slope = run(queries, *arguments, True)
        ctx.save_for_backward(gradient, slope)
        ctx.pairs, ctx.dtypes = arguments[-2], [query.dtype for query in queries]
        ctx.temperature = temperature.dtype if isinstance(temperature, Tensor) else None
        ctx.mark_non_differentiable(counted)
        return losses, counted

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, outer: Tensor, _: Any) -> tuple[Any, ...]:
        gradient, slope = ctx.saved_tensors
        temperature = None
        if ctx.temperature is not None:
            temperature = (outer * slope).sum().to(ctx.temperature)
        return None, temperature, *_query_gradients(outer, gradient, ctx.pairs, ctx.dtypes)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, counted, gradient, slope = output
    ctx.save_for_backward(gradient, slope)
    ctx.pairs, ctx.dtypes = inputs[10], [query.dtype for query in inputs[0]]
    ctx.temperature, ctx.lists = inputs[4].dtype, [len(inputs[i]) for i in (1, 2, 3, 6, 8)]
    ctx.mark_non_differentiable(counted, gradient, slope)
    ctx.set_materialize_grads(False)


@differentiable_once
def _scale_gradients(ctx: Any, outer: Tensor | None, *_: Any) -> tuple[Any, ...]:
    queries: list[Tensor | None] = [None] * len(ctx.dtypes)
    temperature = None
    if outer is not None:
        gradient, slope = ctx.saved_tensors
        queries = _query_gradients(outer, gradient, ctx.pairs, ctx.dtypes)
        temperature = (outer * slope).sum().to(ctx.temperature)
    teachers, keys, queues, lengths, ids = ([None] * count for count in ctx.lists)
    nothing = (None,) * 4
    return queries, teachers, keys, queues, temperature, None, lengths, None, ids, *nothing


register(
    "consistency_losses(Tensor[] queries, Tensor[] teachers, Tensor[] keys, Tensor[] queues, "
    "Tensor temperature, Tensor alpha, Tensor[] queue_lengths, Tensor? key_ids, "
    "Tensor[] queue_ids, Tensor? present, int[] pairs, str backend, bool want_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _losses,
    _shapes,
)
torch.library.register_autograd(
    "mics_kernels::consistency_losses",
    _scale_gradients,
    setup_context=_keep_gradients,
    lib=library,
)
