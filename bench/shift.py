"""Time the feature shift and the class moments: every implementation in one run.

"eager" is what a user would have written: `x + strength * std[y] * torch.randn_like(x)`; for the
moments two one-hot matrix products, the second of squares around the class means, as safe as ours,
or of plain squares, E[x^2] - E[x]^2, which is cheaper and is not. "copy" is a copy of the features,
the floor of the shift. How it is timed: timing.py.

    python bench/shift.py [--device cuda] [--quick] [--threads N] [--json FILE]
"""

from __future__ import annotations

import torch
from timing import Step, rows_of, run, take_turns
from torch import Tensor

from mics_kernels import class_moments, shift_features
from mics_kernels.backends import explain

CLASSES, DIM = 8, 768
STRENGTH = 0.5


def eager_shift(x: Tensor, y: Tensor, deviation: Tensor) -> Tensor:
    """The shift as PyTorch's own generator draws it."""
    return x + STRENGTH * deviation[y] * torch.randn_like(x)


def one_hot_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean, m2 by two matrix products, the squares taken around the class means."""
    shares = torch.nn.functional.one_hot(y, CLASSES).to(x.dtype)
    count = shares.sum(0)
    mean = (shares.T @ x) / count.unsqueeze(1)
    return count, mean, shares.T @ (x - mean[y]).square()


def plain_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from E[x^2] - E[x]^2, which cancels where means are large."""
    shares = torch.nn.functional.one_hot(y, CLASSES).to(x.dtype)
    count = shares.sum(0).unsqueeze(1)
    total = shares.T @ x
    return count, total / count, shares.T @ x.square() - total.square() / count


def ours(device: torch.device) -> list[str]:
    """Fast backends that can run here; why the others cannot is printed."""
    found = []
    for name in ("cpu",) if device.type == "cpu" else ("triton",):
        try:
            explain("shift", torch.empty(0, device=device), name)
            found.append(name)
        except RuntimeError as error:
            print(f"{name}: not measured ({error})")
    return found


def shift_steps(x: Tensor, y: Tensor) -> dict[str, Step]:
    """What is compared, by name."""
    device = x.device
    variance = torch.rand(CLASSES, DIM, device=device)
    deviation = variance.sqrt().to(x.dtype)
    seed = torch.tensor([17, 0], device=device)
    compiled = torch.compile(eager_shift, fullgraph=True)

    def of(backend: str) -> Step:
        return lambda: shift_features(x, y, variance, strength=STRENGTH, seed=seed, backend=backend)

    steps: dict[str, Step] = {name: of(name) for name in ours(device)}
    steps["eager"] = lambda: eager_shift(x, y, deviation)
    steps["eager, compiled"] = lambda: compiled(x, y, deviation)
    steps["reference"] = of("reference")
    out = torch.empty_like(x)
    steps["copy"] = lambda: out.copy_(x)
    return steps


def moments_steps(x: Tensor, y: Tensor) -> dict[str, Step]:
    """What is compared, by name."""
    compiled = torch.compile(one_hot_moments, fullgraph=True)

    def of(backend: str) -> Step:
        return lambda: class_moments(x, y, CLASSES, backend=backend)

    steps: dict[str, Step] = {name: of(name) for name in ours(x.device)}
    steps["one-hot"] = lambda: one_hot_moments(x, y)
    steps["one-hot, compiled"] = lambda: compiled(x, y)
    steps["one-hot, E[x^2]"] = lambda: plain_moments(x, y)
    steps["reference"] = of("reference")
    return steps


def table(device: torch.device, budget: float) -> list[dict[str, object]]:
    """Measure everything; one row for each operator, shape, dtype and implementation."""
    shapes = [(8192, torch.float32)]
    if device.type == "cuda":
        shapes += [(8192, torch.bfloat16), (65536, torch.bfloat16)]
    rows: list[dict[str, object]] = []
    for operator, steps_of in (("shift_features", shift_steps), ("class_moments", moments_steps)):
        for batch, dtype in shapes:
            torch._dynamo.reset()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(batch, DIM, generator=generator).to(device, dtype)
            y = torch.randint(CLASSES, (batch,), generator=generator).to(device)
            times, cores = take_turns(steps_of(x, y), device, budget)
            shape = f"{batch}x{DIM} {str(dtype).removeprefix('torch.')}"
            rows += rows_of({"operator": operator, "shape": shape}, times, cores)
    return rows


if __name__ == "__main__":
    run(__doc__.splitlines()[0], table)
