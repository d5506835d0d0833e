"""Time of the host and launches per call on a GPU, measured without one (bench/stub).

Everything up to a launch is real: argument checks, dispatch, autograd, allocation (of CPU memory),
Triton's launcher. "us" is the time per call on one thread; a faster GPU waits for it. "Launches"
counts our kernels, "torch kernels" the torch operators beside them that would launch one. Measure
on a quiet machine.

    python -m bench --full --only host
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import ROOT
from bench.rows import Options, Row
from bench.stub import Stub, install, obstacle
from mics_kernels import (
    ClassStatistics,
    class_moments,
    evidential_fusion_loss,
    evidential_loss,
    fuse_evidence,
    multimodal_consistency_loss,
    shift_features,
    shifted_cross_entropy,
)

ROUNDS = 7
WARM_UP = 50  # calls
NONE_ITSELF = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "chunk", "contiguous",
        "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "expand_as", "full",
        "full_like", "lift_fresh", "narrow", "new_empty", "new_full", "new_ones", "new_zeros",
        "numpy_T", "ones", "ones_like", "permute", "promote_types", "requires_grad_", "reshape",
        "resize_", "resolve_conj", "resolve_neg", "result_type", "select", "set_", "slice", "split",
        "squeeze", "squeeze_", "t", "to", "transpose", "unbind", "unflatten", "unsafe_split",
        "unsqueeze", "unsqueeze_", "view", "view_as", "zeros", "zeros_like",
    )
)  # fmt: skip
"""torch operators that launch no kernel themselves; operators that they call may."""


class Call(NamedTuple):
    """A call of an operator.

    Args:
        operator, shape: the operator and its inputs.
        passes: forward, or forward and backward.
        run: the call.
    """

    operator: str
    shape: str
    passes: str
    run: Callable[[], Any]


def calls() -> Iterator[Call]:
    """Yield every operator, forward and, if it has gradients, backward."""
    yield from consistency_calls()
    yield from evidential_calls()
    yield from shift_calls()


def both(operator: str, shape: str, loss: Callable[[], Tensor], leaves: list[Tensor]) -> list[Call]:
    """Make calls of a loss without and with gradients."""

    def forward() -> None:
        with torch.no_grad():
            loss()

    def backward() -> None:
        torch.autograd.grad(loss(), leaves)

    return [
        Call(operator, shape, "forward", forward),
        Call(operator, shape, "forward + backward", backward),
    ]


def consistency_calls(batch: int = 8, dim: int = 256, queue: int = 4096) -> Iterator[Call]:
    """Yield calls with a full queue and no ids, and with all arguments of pre-training."""

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, dim), dim=1).bfloat16()

    features = [unit(batch).requires_grad_() for _ in range(2)]
    teachers, queues = [unit(batch) for _ in range(2)], [unit(queue) for _ in range(2)]
    temperature = torch.tensor(0.07, requires_grad=True)
    masks: dict[str, Any] = {
        "queue_lengths": [torch.tensor(queue)] * 2,
        "key_ids": torch.arange(batch),
        "queue_ids": [torch.arange(queue)] * 2,
        "present": torch.ones(batch, 2, dtype=torch.bool),
    }
    name, alpha = "multimodal_consistency_loss", torch.tensor(0.4)
    yield from both(name, f"B = {batch}", lambda: multimodal_consistency_loss(
        features, teachers, queues, temperature=0.07, alpha=0.4), features)  # fmt: skip
    yield from both(name, f"B = {batch}, in training", lambda: multimodal_consistency_loss(
        features, teachers, queues, temperature=temperature, alpha=alpha, **masks,
    ), [*features, temperature])  # fmt: skip


def evidential_calls(rows: int = 64, views: int = 3, classes: int = 8) -> Iterator[Call]:
    """Yield fusion loss, loss and fusion of one size."""
    logits = torch.randn(rows, views, classes).requires_grad_()
    evidence = torch.rand(rows, views, classes).requires_grad_()
    target, shape = torch.arange(rows) % classes, f"{rows} x {views} x {classes}"
    yield from both("evidential_fusion_loss", shape, lambda: evidential_fusion_loss(
        logits, target, kl_weight=0.5).loss, [logits])  # fmt: skip
    yield from both("evidential_loss", shape, lambda: evidential_loss(
        evidence, target, kl_weight=0.5), [evidence])  # fmt: skip
    outer = torch.ones(rows, classes)

    def fused_gradient() -> None:
        torch.autograd.grad(fuse_evidence(evidence), evidence, outer)

    fused, gradient = both("fuse_evidence", shape, lambda: fuse_evidence(evidence), [evidence])
    yield fused
    yield gradient._replace(run=fused_gradient)


def shift_calls(rows: int = 64, dim: int = 768, classes: int = 8) -> Iterator[Call]:
    """Yield the shift, its bound, the moments and an update of the statistics."""
    features = torch.randn(rows, dim).bfloat16()
    target, variance = torch.arange(rows) % classes, torch.rand(classes, dim)
    seed, shape = torch.tensor([17, 0]), f"{rows} x {dim}"
    logits = torch.randn(rows, classes).requires_grad_()
    weight = torch.randn(classes, dim).requires_grad_()
    statistics = ClassStatistics(classes, dim, momentum=0.01)
    yield Call("shift_features", shape, "forward", lambda: shift_features(
        features, target, variance, strength=0.5, seed=seed))  # fmt: skip
    yield Call("class_moments", shape, "forward", lambda: class_moments(features, target, classes))
    yield Call("ClassStatistics.update", shape, "forward", lambda: statistics.update(
        features, target))  # fmt: skip
    yield from both("shifted_cross_entropy", shape, lambda: shifted_cross_entropy(
        logits, target, weight, variance, strength=0.5), [logits, weight])  # fmt: skip


def rows(options: Options) -> Iterator[Row]:
    """Yield one row per call, from a child process: the driver's stand-in cannot be removed."""
    if reason := obstacle():
        print(f"host: not measured ({reason})")
        yield {"absent": reason}
        return
    command = [sys.executable, "-m", "bench.host", str(2000 if options.full else 200)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            row: Row = json.loads(line)
            print(
                f"{row['operator']:28} {row['shape']:22} {row['implementation']:20} "
                f"{row['host_us']:7.1f} us {row['launches']:3} launches "
                f"{row['torch_kernels']:3} torch kernels"
            )
            yield row
    if process.returncode:
        raise RuntimeError(f"bench.host ended with exit status {process.returncode}")


def measured(call: Call, stub: Stub, count: int) -> Row:
    """Time ``count`` calls in rounds, and count the launches of one."""
    for _ in range(WARM_UP):
        call.run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(max(1, count // ROUNDS)):
            call.run()
        times.append((time.perf_counter() - start) / max(1, count // ROUNDS))
    with stub.launches() as launches:
        call.run()
    with torch.autograd.profiler.profile() as profiled:
        call.run()
    roots = [event for event in profiled.function_events if event.cpu_parent is None]
    return {
        "operator": call.operator, "shape": call.shape, "threads": 1, "ours": True,
        "implementation": call.passes, "host_us": 1e6 * statistics.median(times),
        "launches": len(launches), "torch_kernels": sum(map(kernels_of, roots)),
    }  # fmt: skip


def kernels_of(event: Any) -> int:
    """Count the kernels that a torch operator would launch: one, or those of its callees."""
    if event.name.startswith("aten::") and event.name not in NONE_ITSELF:
        return 1
    return sum(map(kernels_of, event.cpu_children))


def main() -> None:
    """Measure every call; one JSON object per line."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # of results without values; a GPU takes no longer for them
    stub = install()
    for call in calls():
        print(json.dumps(measured(call, stub, int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
