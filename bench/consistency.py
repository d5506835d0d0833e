"""Time and weigh the consistency loss: forward + gradient of both directions, D = 256, Q = 65,536.

Against it stand the published ALBEF lines (queue in columns, cloned and concatenated at every
step), torch.compile of them, the same loss in chunks of keys that are computed again in the
backward pass, and the same loss written over scaled_dot_product_attention (V = K). Agreement is
checked before anything is timed. "extra" is the most memory a call took beyond what it was given:
on a CPU the peak of the resident size, in a process of its own (Linux). How it is timed: timing.py.

    python bench/consistency.py [--device cuda] [--quick] [--threads N] [--json FILE]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Step, rows_of, run, take_turns
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mics_kernels import multimodal_consistency_loss

DIM, QUEUE, TEMPERATURE, ALPHA, CHUNK = 256, 65536, 0.07, 0.4, 8192
BATCHES = (8, 64, 256)
Loss = Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]


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


def albef(query: Tensor, teacher: Tensor, keys: Tensor, columns: Tensor) -> Tensor:
    """As published; ``columns`` is the queue as (D, Q)."""
    pool = torch.cat([keys.T, columns.clone().detach()], dim=1)
    with torch.no_grad():
        soft = teacher @ pool / TEMPERATURE
        target = torch.zeros_like(soft).fill_diagonal_(1)
        target = ALPHA * F.softmax(soft, dim=1) + (1 - ALPHA) * target
    logits = query @ pool / TEMPERATURE
    return -(F.log_softmax(logits, dim=1) * target).sum(1).mean()


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
    parts = [checkpoint(part, query, chunk, log_soft, use_reentrant=False) for chunk in chunks]
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


def losses_of(device: torch.device) -> dict[str, Loss]:
    """What is compared, by name; queues as rows, or as columns for the published code."""
    albef_loss = both_directions(albef)
    return {
        "triton" if device.type == "cuda" else "cpu": ours(
            "triton" if device.type == "cuda" else "cpu"
        ),
        "ALBEF eager": albef_loss,
        "ALBEF compiled": torch.compile(albef_loss),
        "chunked, recomputed": both_directions(chunked),
        "attention (SDPA)": both_directions(attention),
    }


def inputs(batch: int, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features that want gradients, teachers, and queues (Q, D), as unit vectors."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        numbers = torch.randn(rows, DIM, generator=generator)
        return F.normalize(numbers, dim=1).to(device, dtype)

    features = [unit(batch).requires_grad_() for _ in range(2)]
    return features, [unit(batch) for _ in range(2)], [unit(QUEUE) for _ in range(2)]


def steps_of(batch: int, device: torch.device) -> dict[str, Step]:
    """One call of each implementation: the gradients of both features."""
    features, teachers, queues = inputs(batch, device)
    columns = [queue.T.contiguous() for queue in queues]

    def step_of(name: str, loss: Loss) -> Step:
        held = columns if name.startswith("ALBEF") else queues
        return lambda: torch.autograd.grad(loss(features, teachers, held), features)

    steps = {name: step_of(name, loss) for name, loss in losses_of(device).items()}
    wanted = steps["ALBEF eager"]()
    for name, step in steps.items():
        for got, true in zip(step(), wanted, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(
                got, true, rtol=0, atol=(2e-2 if got.dtype == torch.bfloat16 else 2e-5) / batch,
                msg=lambda text, name=name: f"{name} disagrees: {text}",
            )  # fmt: skip
    return steps


def extra_megabytes(batch: int, name: str, step: Step, device: torch.device) -> float:
    """Peak memory of a call beyond what it was given."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--weigh", str(batch), name, str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def weigh(batch: int, name: str) -> float:
    """``extra_megabytes`` on a CPU, in this process: a call of batch 1 first, for what stays."""
    device = torch.device("cpu")
    loss, columns = losses_of(device)[name], name.startswith("ALBEF")
    features, teachers, queues = inputs(batch, device)
    if columns:
        queues = [queue.T.contiguous() for queue in queues]
    first, teacher, _ = inputs(1, device)
    short = [(queue[:, :1] if columns else queue[:1]).contiguous() for queue in queues]
    torch.autograd.grad(loss(first, teacher, short), first)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident_megabytes("VmRSS")
    torch.autograd.grad(loss(features, teachers, queues), features)
    return resident_megabytes("VmHWM") - before


def resident_megabytes(entry: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 2**10 for line in lines if line.startswith(entry))


def table(device: torch.device, budget: float) -> list[dict[str, object]]:
    """Measure everything; one row for each batch size and implementation."""
    rows: list[dict[str, object]] = []
    for batch in (*BATCHES, *((1024,) if device.type == "cuda" else ())):
        torch._dynamo.reset()
        steps = steps_of(batch, device)
        times, cores = take_turns(steps, device, budget)
        for row in rows_of({"batch": f"B = {batch}"}, times, cores):
            name = str(row["implementation"])
            rows.append(row | {"extra_mb": extra_megabytes(batch, name, steps[name], device)})
            print(f"{'':63} {rows[-1]['extra_mb']:10.1f} MB extra", flush=True)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--weigh"]:
        torch.set_num_threads(int(sys.argv[4]))
        print(weigh(int(sys.argv[2]), sys.argv[3]))
    else:
        run(__doc__.splitlines()[0], table)
