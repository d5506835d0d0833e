"""Time and check the evidential operators: forward + gradient, every implementation in one run.

Implementations take turns, a few calls each a round; the ratio of medians and the ratio of minima
are both shown. "cores" is CPU time over wall time of the whole row: well below the number of
threads, the machine was busy with something else, and the row proves nothing (a reference that
waits at OpenMP barriers suffers more from that than plain threads do). Then measure again, with
--threads 1. Beside the reference (float64 inside) stands the textbook formula in float32, the
code a user would have written: cheaper, and less exact. On a GPU times are those of a replayed
CUDA graph (torch.compile: of an ordinary call, where a graph of the compiled backward cannot be
captured).

    python bench/evidential.py [--device cuda] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mics_kernels import evidential_fusion_loss, evidential_loss, fuse_evidence
from mics_kernels.backends import explain

SHAPES = ((8192, 3, 8), (2048, 3, 1000))
Step = Callable[[], object]


def textbook_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Softplus, Dempster's rule in closed form, the published loss: float32 throughout."""
    evidence = torch.nn.functional.softplus(logits)
    classes = logits.shape[2]
    fused = classes * (torch.prod(1.0 + evidence / classes, dim=1) - 1.0)
    opinions = torch.cat([evidence, fused.unsqueeze(1)], dim=1)
    right = torch.nn.functional.one_hot(target, classes).unsqueeze(1)
    alpha = opinions + 1.0
    strength = alpha.sum(2, keepdim=True)
    expected = (right * (torch.digamma(strength) - torch.digamma(alpha))).sum(2)
    cleared = opinions * (1 - right) + 1.0
    total = cleared.sum(2, keepdim=True)
    kl = torch.lgamma(total).squeeze(2) - torch.lgamma(cleared).sum(2)
    kl = kl - torch.lgamma(torch.tensor(float(classes), device=logits.device))
    kl = kl + ((cleared - 1.0) * (torch.digamma(cleared) - torch.digamma(total))).sum(2)
    return (expected + 0.5 * kl).sum(1).mean()


def losses_of(operator: str, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is compared, by name: (logits (B, V, C), target (B,)) -> loss."""

    def of(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        if operator == "fuse_evidence":
            return lambda x, y: fuse_evidence(x, backend=backend).mean()
        if operator == "evidential_loss":
            return lambda x, y: evidential_loss(x, y, kl_weight=0.5, backend=backend)
        return lambda x, y: evidential_fusion_loss(x, y, kl_weight=0.5, backend=backend).loss

    names = ["cpu"] if device.type == "cpu" else ["triton", "cuda"]
    found = {}
    for name in names:
        try:
            explain("evidential", torch.empty(0, device=device), name)
            found[name] = of(name)
        except RuntimeError as error:
            print(f"{name}: not measured ({error})")
    found["reference"] = of("reference")
    found["reference, compiled"] = torch.compile(of("reference"), fullgraph=True)
    if operator == "evidential_fusion_loss":
        found["textbook float32"] = textbook_loss
        found["textbook, compiled"] = torch.compile(textbook_loss, fullgraph=True)
    return found


def step_of(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Step:
    """One call: loss and gradient."""
    return lambda: torch.autograd.grad(loss(logits, target), logits)[0]


def replayed(step: Step) -> Step:
    """The same call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Step, device: torch.device, repeats: int) -> float:
    """Mean time of ``repeats`` calls in a row."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats


def measure(
    operator: str, shape: tuple[int, int, int], device: torch.device, budget: float
) -> tuple[dict[str, list[float]], float]:
    """Seconds a call of each implementation, round by round, and CPU time over wall time."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    if operator != "evidential_fusion_loss":
        logits = logits.exp()  # evidence
    logits = logits.to(device).requires_grad_()
    target = torch.randint(shape[2], shape[:1], generator=generator).to(device)
    steps: dict[str, Step] = {}
    for name, loss in losses_of(operator, device).items():
        step = step_of(loss, logits, target)
        step()  # compiles
        graphed = device.type == "cuda" and "compiled" not in name
        steps[name] = replayed(step) if graphed else step
    repeats = {name: max(1, int(0.02 / seconds(step, device, 1))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, used = time.perf_counter(), time.process_time()
    while len(times["reference"]) < 5 or time.perf_counter() - start < budget:
        for name, step in steps.items():
            times[name].append(seconds(step, device, repeats[name]))
    cores = (time.process_time() - used) / (time.perf_counter() - start)
    return times, cores


def row_of(values: list[float], best: list[float]) -> dict[str, float]:
    """Median and minimum of an implementation, and how they compare with the best of ours."""
    return {
        "median_ms": statistics.median(values) * 1e3,
        "min_ms": min(values) * 1e3,
        "ratio_of_medians": statistics.median(values) / statistics.median(best),
        "ratio_of_minima": min(values) / min(best),
        "rounds": len(values),
    }


def table(device: torch.device, budget: float) -> list[dict]:
    """Measure everything; one row for each operator, shape and implementation."""
    rows = []
    for operator in ("evidential_fusion_loss", "evidential_loss", "fuse_evidence"):
        for shape in SHAPES:
            torch._dynamo.reset()
            times, cores = measure(operator, shape, device, budget)
            ours = [name for name in ("cpu", "triton", "cuda") if name in times]
            best = min(ours or ["reference"], key=lambda name: statistics.median(times[name]))
            for name, values in times.items():
                row = row_of(values, times[best])
                rows.append({"operator": operator, "shape": shape, "implementation": name} | row)
                rows[-1]["cores"] = cores
                print(
                    f"{operator:23} {'x'.join(map(str, shape)):12} {name:20} "
                    f"{row['median_ms']:10.4f} ms (min {row['min_ms']:.4f})  "
                    f"{row['ratio_of_medians']:7.1f}x (of minima {row['ratio_of_minima']:.1f}x)  "
                    f"cores {cores:.2f}",
                    flush=True,
                )
    return rows


def main() -> None:
    """Print the table; write it, with what it ran on, as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="1 s for each row instead of 10")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write results here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    rows = table(device, 1.0 if arguments.quick else 10.0)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
