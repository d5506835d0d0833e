"""Consistency losses: loss and gradient, D = 256, a queue of 65,536.

`multimodal_consistency_loss` of two modalities is compared with the published ALBEF code (queue in
columns, cloned and concatenated at every step), with torch.compile of it, with the same loss in
chunks of keys that are recomputed in the backward pass, and with the same loss written with
scaled_dot_product_attention (V = K).

With hard targets (alpha = 0) and one direction the loss is a cross-entropy over keys. Public
kernels compute it from queries divided by the temperature in bfloat16 (ours divides the scores, in
float32). They need a GPU, and are measured if installed:

- Liger-Kernel (as of 0.8.2): fused linear cross-entropy with the keys as classifier, whose
  gradient is not computed. Scores are rounded to bfloat16. It processes only as many rows at once
  as keep a block of scores the size of the queries: few, for this many keys.
- cut-cross-entropy (25.1.1 to 25.6.4): the same without a block of scores, as "cce_exact". Its
  default skips blocks whose probabilities are all below 2^-12 in the backward pass, which changes
  the gradient.
- Inf-CL (1.2): one contrastive loss per row, averaged here. It converts queries and keys to
  float32, multiplies in TF32, and always computes the keys' gradient: two of its five products.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import roofline
from bench.baselines.albef import albef
from bench.case import Case, Rival, Rivals, close, in_a_line, own_backends
from mics_kernels import consistency_loss, multimodal_consistency_loss

DIM, QUEUE, TEMPERATURE, ALPHA, CHUNK = 256, 65536, 0.07, 0.4, 8192
BATCHES = {"cpu": (8, 64, 256), "cuda": (1024, 256, 8, 64)}  # most important first on a GPU
PUBLIC = (
    ("Liger-Kernel", "liger_kernel"),
    ("cut-cross-entropy", "cut_cross_entropy"),
    ("Inf-CL", "inf_cl"),
)
"""Name and package of public kernels."""
WAITING = ("Liger-Kernel", "cut-cross-entropy")
"""Those that count or list targets on the host, so that no CUDA graph can capture them."""
Loss = Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]


def cases(device: torch.device) -> list[Case]:
    """List the loss of two modalities at every batch size, and of one direction at the largest."""
    batches = BATCHES[device.type]
    size = dtype_on(device).itemsize
    soft = [
        Case("multimodal_consistency_loss", f"B = {batch}",
             roofline.consistency(batch, DIM, QUEUE, size), partial(rivals, batch), batch)
        for batch in batches
    ]  # fmt: skip
    largest = max(batches)
    hard = Case(
        "consistency_loss", f"B = {largest}, alpha = 0",
        roofline.contrastive(largest, DIM, QUEUE, size), partial(hard_rivals, largest), largest,
    )  # fmt: skip
    return [*soft, hard]


def dtype_on(device: torch.device) -> torch.dtype:
    """Return the dtype of the inputs."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def ours(backend: str) -> Loss:
    """Wrap the operator itself."""
    return lambda features, teachers, queues: multimodal_consistency_loss(
        features, teachers, queues, temperature=TEMPERATURE, alpha=ALPHA, backend=backend
    )


def both_directions(one: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Average ``one(query, teacher, keys, queue)`` over the two ordered pairs."""

    def loss(features: list[Tensor], teachers: list[Tensor], queues: list[Tensor]) -> Tensor:
        first = one(features[0], teachers[0], teachers[1], queues[1])
        return (first + one(features[1], teachers[1], teachers[0], queues[0])) / 2

    return loss


def chunked(query: Tensor, teacher: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """Process keys in chunks, recomputed in the backward pass, so that memory is bounded."""

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
    """Compute a value with the gradient of the loss, by attention with V = K.

    scaled_dot_product_attention returns no log-sum-exp, so the value itself is not the loss.
    """
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
    """Draw unit vectors: features (B, D) that require gradients, teachers, and queues (Q, D)."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        numbers = torch.randn(rows, DIM, generator=generator)
        return F.normalize(numbers, dim=1).to(device, dtype_on(device))

    features = [unit(batch).requires_grad_() for _ in range(2)]
    return features, [unit(batch) for _ in range(2)], [unit(queue) for _ in range(2)]


def gradients(loss: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute the loss and its gradients."""
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def fresh(features: list[Tensor]) -> list[Tensor]:
    """Copy features to new leaves that require gradients."""
    return [(one.detach() * 1.0).requires_grad_() for one in features]


def rivals(batch: int, device: torch.device, tiny: bool) -> Rivals:
    """Make implementations on the same inputs; the published code has its queues in columns."""
    features, teachers, queues = inputs(1 if tiny else batch, device, 1 if tiny else QUEUE)
    columns = [queue.T.contiguous() for queue in queues]
    published = both_directions(partial(albef, temperature=TEMPERATURE, alpha=ALPHA))

    def rival(
        loss: Loss, held: list[Tensor] = queues, *, valued: bool = True, **about: bool
    ) -> Rival:
        def check(result: Any) -> None:
            first = 0 if valued else 1  # the loss comes before the gradients
            close(result[first:], true[first:], tolerance_on(device))

        def step() -> tuple[Tensor, ...]:
            return gradients(loss(features, teachers, held), features)

        return Rival(step, check, lambda leaves: loss(leaves, teachers, held).backward(), **about)

    names, absent = own_backends("consistency", device)
    found = {name: rival(ours(name), ours=True) for name in names} | {
        "ALBEF eager": rival(published, columns),
        "ALBEF compiled": rival(torch.compile(published), columns, compiled=True),
        "chunked, recomputed": rival(both_directions(chunked)),
        "attention (SDPA)": rival(both_directions(attention), valued=False),
    }
    exact = [x.detach().float().requires_grad_() for x in features]
    others = [[x.float() for x in held] for held in (teachers, columns)]
    true = gradients(published(exact, *others), exact)
    return Rivals(lambda: fresh(features), found, absent)


def tolerance_on(device: torch.device) -> float:
    """Return the allowed difference of loss and gradient, relative to the largest element."""
    return 5e-2 if dtype_on(device) == torch.bfloat16 else 1e-4


def hard_rivals(batch: int, device: torch.device, tiny: bool) -> Rivals:
    """Make implementations for alpha = 0, one direction: class i of [keys, queue] for query i."""
    features, teachers, queues = inputs(1 if tiny else batch, device, 1 if tiny else QUEUE)
    query, keys, queue = features[0], teachers[1], queues[1]
    pool = torch.cat([keys, queue])
    target = torch.arange(len(query), device=device)

    def own(backend: str, query: Tensor) -> Tensor:
        return consistency_loss(
            query, teachers[0], keys, queue, temperature=TEMPERATURE, alpha=0.0, backend=backend
        )

    def eager(query: Tensor) -> Tensor:
        return F.cross_entropy(query @ pool.T / TEMPERATURE, target)

    def check(result: Any) -> None:
        close(result, true, tolerance_on(device))

    def rival(loss: Callable[[Tensor], Tensor], **about: bool) -> Rival:
        def call(leaves: list[Tensor]) -> None:
            loss(leaves[0]).backward()

        return Rival(lambda: gradients(loss(query), [query]), check, call, **about)

    exact = query.detach().float().requires_grad_()
    scores = exact @ pool.float().T / TEMPERATURE
    true = gradients(F.cross_entropy(scores, target), [exact])
    names, absent = own_backends("consistency", device)
    found = {name: rival(partial(own, name), ours=True) for name in names} | {
        "cross_entropy eager": rival(eager),
        "cross_entropy compiled": rival(torch.compile(eager), compiled=True),
    }
    public, missing = public_kernels(device, query, pool, target, true)
    found |= {name: rival(loss, waits=name in WAITING) for name, loss in public.items()}
    return Rivals(lambda: fresh([query]), found, absent | missing)


def public_kernels(
    device: torch.device, query: Tensor, pool: Tensor, target: Tensor, true: tuple[Tensor, ...]
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    """Wrap others' kernels for the cross-entropy of query . pool / T; say why some are absent.

    A kernel whose loss or gradient differs from ``true`` counts as absent, not as a failure of this
    benchmark.
    """

    def liger(query: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(pool, query / TEMPERATURE, target)

    def cut(query: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(query / TEMPERATURE, pool, target, impl="cce_exact")

    def inf_cl(query: Tensor) -> Tensor:
        from inf_cl import cal_flash_loss

        # Without labels key i is the positive of query i; head_dim divides the width.
        return cal_flash_loss(query, pool, scale=1 / TEMPERATURE, head_dim=DIM).mean()

    found: dict[str, Callable[[Tensor], Tensor]] = {}
    absent = {}
    for (name, package), call in zip(PUBLIC, (liger, cut, inf_cl), strict=True):
        if device.type != "cuda":
            absent[name] = "needs a GPU"
        elif importlib.util.find_spec(package) is None:
            absent[name] = f"{package} is not installed"
        else:
            try:
                close(gradients(call(query), [query]), true, tolerance_on(device))
                found[name] = call
            except Exception as error:  # others' code may raise anything
                absent[name] = in_a_line(error)
    return found, absent
