"""Consistency losses: forward + gradient, D = 256, a queue of 65,536.

`multimodal_consistency_loss` of two modalities stands against the published ALBEF lines (queue in
columns, cloned and concatenated at every step), torch.compile of them, the same loss in chunks of
keys that are computed again in the backward pass, and the same loss written over
scaled_dot_product_attention (V = K).

With hard targets (alpha = 0) and one direction the loss is a cross-entropy over keys, and public
kernels compute it, from queries divided by the temperature in bfloat16 (ours divides the scores, in
float32). They need a GPU, and are timed where they are installed:

- Liger-Kernel (as of 0.8.2), fused linear cross-entropy with the keys as classifier, whose
  gradient is not computed, as nobody asks for it. Scores are rounded to bfloat16. It works on as
  many rows at a time as keep a block of scores the size of the queries: a few, for so many keys.
- cut-cross-entropy (25.1.1 to 25.6.4), the same without a block of scores, as "cce_exact": by
  default the backward pass leaves out blocks of scores whose probabilities are all below 2^-12,
  and the gradient is another one.
- Inf-CL (1.2), a contrastive loss a row, averaged here. It converts queries and keys to float32,
  multiplies in TF32, and always computes the gradient of the keys, too: two products of its five.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import roofline
from bench.baselines.albef import albef
from bench.case import Case, Rivals, Step, close, in_a_line, own_backends
from mics_kernels import consistency_loss, multimodal_consistency_loss

DIM, QUEUE, TEMPERATURE, ALPHA, CHUNK = 256, 65536, 0.07, 0.4, 8192
BATCHES = (8, 64, 256)
WAITING = frozenset({"Liger-Kernel", "cut-cross-entropy"})
"""Which count targets, or list them, on the host: no CUDA graph captures them."""
Loss = Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]


def cases(device: torch.device) -> list[Case]:
    """Both losses at every batch size."""
    batches = (*BATCHES, 1024) if device.type == "cuda" else BATCHES
    size = dtype_on(device).itemsize
    soft = [
        Case("multimodal_consistency_loss", f"B = {batch}",
             roofline.consistency(batch, DIM, QUEUE, size), partial(rivals, batch), batch)
        for batch in batches
    ]  # fmt: skip
    hard = [
        Case("consistency_loss", f"B = {batch}, alpha = 0",
             roofline.contrastive(batch, DIM, QUEUE, size), partial(hard_rivals, batch), batch)
        for batch in batches[-1:]
    ]  # fmt: skip
    return soft + hard


def dtype_on(device: torch.device) -> torch.dtype:
    """What the loss is computed from there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def ours(backend: str) -> Loss:
    """The operator itself."""
    return lambda features, teachers, queues: multimodal_consistency_loss(
        features, teachers, queues, temperature=TEMPERATURE, alpha=ALPHA, backend=backend
    )


def both_directions(one: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Mean of ``one(query, teacher, keys, queue)`` over the two ordered pairs."""

    def loss(features: list[Tensor], teachers: list[Tensor], queues: list[Tensor]) -> Tensor:
        first = one(features[0], teachers[0], teachers[1], queues[1])
        return (first + one(features[1], teachers[1], teachers[0], queues[0])) / 2

    return loss


def chunked(query: Tensor, teacher: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """Chunks of keys, each computed again in the backward pass: memory flat in the queue."""

    def part(query: Tensor, chunk: Tensor, log_soft: Tensor) -> tuple[Tensor, Tensor]:
        logits = query @ chunk.T / TEMPERATURE
        soft = (teacher @ chunk.T / TEMPERATURE - log_soft).exp()
        return logits.logsumexp(1), (soft * logits).sum(1)

    chunks = [keys, *queue.split(CHUNK)]
    with torch.no_grad():
        sums = [(teacher @ chunk.T / TEMPERATURE).logsumexp(1) for chunk in chunks]
        log_soft = torch.stack(sums, 1).logsumexp(1, keepdim=True)
    parts = [
        checkpoint(part, query, chunk, log_soft, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    log_sum = torch.stack([log for log, _ in parts], 1).logsumexp(1)
    positive = (query * keys[: len(query)]).sum(1) / TEMPERATURE
    target = ALPHA * sum(soft for _, soft in parts) + (1 - ALPHA) * positive
    return (log_sum - target).mean()


def attention(query: Tensor, teacher: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """The gradient from attention with V = K; a loss of the right gradient, not of the right value
    (scaled_dot_product_attention returns no log of its sums)."""
    pool = torch.cat([keys, queue])[None]
    asks = torch.cat([query, teacher]).detach()[None]
    outer, taught = F.scaled_dot_product_attention(asks, pool, pool, scale=1 / TEMPERATURE)[
        0
    ].chunk(2)
    target = ALPHA * taught + (1 - ALPHA) * keys[: len(query)]
    return (query * (outer - target)).sum(1).mean() / TEMPERATURE


def inputs(
    batch: int, device: torch.device, queue: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features that want gradients, teachers, and queues (Q, D), as unit vectors."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        numbers = torch.randn(rows, DIM, generator=generator)
        return F.normalize(numbers, dim=1).to(device, dtype_on(device))

    features = [unit(batch).requires_grad_() for _ in range(2)]
    return features, [unit(batch) for _ in range(2)], [unit(queue) for _ in range(2)]


def step_of(loss: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Step:
    """One call: loss, and the gradients of ``wanted``."""

    def step() -> tuple[Tensor, ...]:
        result = loss()
        return result.detach(), *torch.autograd.grad(result, wanted)

    return step


def rivals(batch: int, device: torch.device, tiny: bool) -> Rivals:
    """Implementations on the same inputs; queues as rows, or as columns for the published code."""
    features, teachers, queues = inputs(1 if tiny else batch, device, 1 if tiny else QUEUE)
    columns = [queue.T.contiguous() for queue in queues]
    names, absent = own_backends("consistency", device)
    published = both_directions(partial(albef, temperature=TEMPERATURE, alpha=ALPHA))
    losses = {name: ours(name) for name in names} | {
        "ALBEF eager": published,
        "ALBEF compiled": torch.compile(published),
        "chunked, recomputed": both_directions(chunked),
        "attention (SDPA)": both_directions(attention),
    }

    def call(name: str, loss: Loss) -> Step:
        held = columns if name.startswith("ALBEF") else queues
        return step_of(lambda: loss(features, teachers, held), features)

    steps = {name: call(name, loss) for name, loss in losses.items()}
    exact = [x.detach().float().requires_grad_() for x in features]
    others = [[x.float() for x in held] for held in (teachers, columns)]
    true = step_of(lambda: published(exact, *others), exact)()

    def check(name: str, result: Any) -> None:
        first = 1 if name.startswith("attention") else 0  # which has no loss
        close(result[first:], true[first:], tolerance_on(device))

    return Rivals(steps, check, absent)


def tolerance_on(device: torch.device) -> float:
    """Of loss and gradient against float32, as a share of the largest element."""
    return 5e-2 if dtype_on(device) == torch.bfloat16 else 1e-4


def hard_rivals(batch: int, device: torch.device, tiny: bool) -> Rivals:
    """alpha = 0, one direction: cross-entropy over [keys, queue] with class i for query i."""
    features, teachers, queues = inputs(1 if tiny else batch, device, 1 if tiny else QUEUE)
    query, keys, queue = features[0], teachers[1], queues[1]
    pool = torch.cat([keys, queue])
    target = torch.arange(len(query), device=device)

    def own(backend: str) -> Tensor:
        return consistency_loss(
            query, teachers[0], keys, queue, temperature=TEMPERATURE, alpha=0.0, backend=backend
        )

    def eager() -> Tensor:
        return F.cross_entropy(query @ pool.T / TEMPERATURE, target)

    names, absent = own_backends("consistency", device)
    losses: dict[str, Callable[[], Tensor]] = {name: partial(own, name) for name in names}
    losses |= {"cross_entropy eager": eager, "cross_entropy compiled": torch.compile(eager)}
    exact = query.detach().float().requires_grad_()
    true = step_of(lambda: F.cross_entropy(exact @ pool.float().T / TEMPERATURE, target), [exact])()
    public, missing = public_kernels(device, query, pool, target, true)
    steps = {name: step_of(loss, [query]) for name, loss in (losses | public).items()}

    def check(name: str, result: Any) -> None:
        close(result, true, tolerance_on(device))

    return Rivals(steps, check, absent | missing, synchronises=WAITING)


def public_kernels(
    device: torch.device, query: Tensor, pool: Tensor, target: Tensor, true: tuple[Tensor, ...]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Kernels of others for the cross-entropy of query . pool / T, and why some are not here: those
    whose loss and gradient are not the ``true`` ones, too, because their fault is not ours."""

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(pool, query / TEMPERATURE, target)

    def cut() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(query / TEMPERATURE, pool, target, impl="cce_exact")

    def inf_cl() -> Tensor:
        from inf_cl import cal_flash_loss

        # Without labels key i is the positive of query i; head_dim divides the width.
        return cal_flash_loss(query, pool, scale=1 / TEMPERATURE, head_dim=DIM).mean()

    found: dict[str, Callable[[], Tensor]] = {}
    absent = {}
    for name, package, call in (
        ("Liger-Kernel", "liger_kernel", liger),
        ("cut-cross-entropy", "cut_cross_entropy", cut),
        ("Inf-CL", "inf_cl", inf_cl),
    ):
        if device.type != "cuda":
            absent[name] = "needs a GPU"
        elif importlib.util.find_spec(package) is None:
            absent[name] = f"{package} is not installed"
        else:
            try:
                close(step_of(call, [query])(), true, tolerance_on(device))
                found[name] = call
            except Exception as error:  # of others' code, of whatever kind
                absent[name] = in_a_line(error)
    return found, absent
