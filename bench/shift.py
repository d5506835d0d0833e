"""The feature shift and the class moments.

"eager" is what a user would have written: `x + strength * std[y] * torch.randn_like(x)`; for the
moments two one-hot matrix products, the second of squares around the class means, as safe as ours,
or of plain squares, E[x^2] - E[x]^2, which is cheaper and is not. "copy" is a copy of the features,
the floor of the shift. On a CPU with all threads and with one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import roofline
from bench.case import Case, Rivals, Step, close, own_backends
from mics_kernels import class_moments, shift_features

CLASSES, DIM = 8, 768
STRENGTH = 0.5


def cases(device: torch.device) -> list[Case]:
    """Both operators at every size, dtype and number of threads."""
    shapes = [(8192, torch.float32)]
    threads: list[int | None] = [None]
    if device.type == "cuda":
        shapes += [(8192, torch.bfloat16), (65536, torch.bfloat16)]
    elif torch.get_num_threads() > 1:
        threads.append(1)
    found = []
    for operator, work, make in (
        ("shift_features", roofline.shift, shift_rivals),
        ("class_moments", roofline.moments, moments_rivals),
    ):
        for batch, dtype in shapes:
            shape = f"{batch} x {DIM} {str(dtype).removeprefix('torch.')}"
            needed = work(batch, DIM, CLASSES, dtype.itemsize)
            call = partial(make, batch, dtype)
            found += [Case(operator, shape, needed, call, batch, number) for number in threads]
    return found


def inputs(
    batch: int, dtype: torch.dtype, device: torch.device, tiny: bool
) -> tuple[Tensor, Tensor]:
    """Features (B, D) and labels; of the tiny ones, two rows of each class."""
    generator = torch.Generator().manual_seed(0)
    batch = 2 * CLASSES if tiny else batch
    x = torch.randn(batch, DIM, generator=generator).to(device, dtype)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    return x, (torch.arange(batch) % CLASSES if tiny else labels).to(device)


def eager_shift(x: Tensor, y: Tensor, deviation: Tensor) -> Tensor:
    """The shift as PyTorch's own generator draws it."""
    return x + STRENGTH * deviation[y] * torch.randn_like(x)


def shift_rivals(batch: int, dtype: torch.dtype, device: torch.device, tiny: bool) -> Rivals:
    """Implementations on the same inputs."""
    x, y = inputs(batch, dtype, device, tiny)
    variance = torch.rand(CLASSES, DIM, generator=torch.Generator().manual_seed(1)).to(device)
    deviation = variance.sqrt().to(dtype)
    seed = torch.tensor([17, 0], device=device)
    compiled = torch.compile(eager_shift, fullgraph=True)

    def of(backend: str) -> Step:
        return lambda: shift_features(x, y, variance, strength=STRENGTH, seed=seed, backend=backend)

    names, absent = own_backends("shift", device)
    steps: dict[str, Step] = {name: of(name) for name in names}
    steps["eager"] = lambda: eager_shift(x, y, deviation)
    steps["eager, compiled"] = lambda: compiled(x, y, deviation)
    steps["reference"] = of("reference")
    out = x.clone()
    steps["copy"] = lambda: out.copy_(x)

    def check(name: str, result: Tensor) -> None:
        if name == "copy":
            assert torch.equal(result, x)
        elif name.startswith("eager"):
            check_noise(result, x, STRENGTH * deviation[y])
        else:
            close([result], [steps["reference"]()], 1e-5 if dtype == torch.float32 else 1e-2)

    return Rivals(steps, check, absent)


def check_noise(result: Tensor, x: Tensor, deviation: Tensor) -> None:
    """Another generator's numbers: their mean and variance are right, by six standard errors."""
    large = deviation > 0.1  # where rounding of the sum is nothing
    normal = ((result - x).double() / deviation.double())[large]
    error = 6 / normal.numel() ** 0.5 + 10 * torch.finfo(x.dtype).eps
    mean, variance = normal.mean().item(), normal.var().item()
    assert abs(mean) < error, f"the noise has a mean of {mean:.2g}"
    assert abs(variance - 1) < 2 * error, f"the noise has {variance:.3f} times its variance"


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
    return count.squeeze(1), total / count, shares.T @ x.square() - total.square() / count


def moments_rivals(batch: int, dtype: torch.dtype, device: torch.device, tiny: bool) -> Rivals:
    """Implementations on the same inputs."""
    x, y = inputs(batch, dtype, device, tiny)
    compiled = torch.compile(one_hot_moments, fullgraph=True)

    def of(backend: str) -> Step:
        return lambda: class_moments(x, y, CLASSES, backend=backend)

    names, absent = own_backends("shift", device)
    steps: dict[str, Step] = {name: of(name) for name in names}
    steps["one-hot"] = lambda: one_hot_moments(x, y)
    steps["one-hot, compiled"] = lambda: compiled(x, y)
    steps["one-hot, E[x^2]"] = lambda: plain_moments(x, y)
    steps["reference"] = of("reference")
    true = steps["reference"]()

    def check(name: str, result: Any) -> None:
        exact = name in names or dtype == torch.float32
        close(result, true, 1e-4 if exact else 5e-2)

    return Rivals(steps, check, absent)
