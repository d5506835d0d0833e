"""Feature shift and class moments.

"eager" is the obvious code: ``x + strength * std[y] * torch.randn_like(x)``. For the moments it is
two one-hot matrix products: squares around the class means, as accurate as ours, or
E[x^2] - E[x]^2, which is cheaper but cancels. "copy" only copies the features, the lower bound for
a shift. On a CPU each is measured with all threads and with one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import roofline
from bench.case import Case, Rival, Rivals, close, own_backends
from mics_kernels import class_moments, shift_features

CLASSES, DIM = 8, 768
STRENGTH = 0.5
COPY = "copy"


def cases(device: torch.device) -> list[Case]:
    """List both operators at every size, dtype and number of threads."""
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
    """Draw features (B, D) and labels; the tiny ones have two rows per class."""
    generator = torch.Generator().manual_seed(0)
    batch = 2 * CLASSES if tiny else batch
    x = torch.randn(batch, DIM, generator=generator).to(device, dtype)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    return x, (torch.arange(batch) % CLASSES if tiny else labels).to(device)


def eager_shift(x: Tensor, y: Tensor, deviation: Tensor) -> Tensor:
    """Shift features with noise from PyTorch's generator."""
    return x + STRENGTH * deviation[y] * torch.randn_like(x)


def shift_rivals(batch: int, dtype: torch.dtype, device: torch.device, tiny: bool) -> Rivals:
    """Make implementations of the shift on the same inputs."""
    x, y = inputs(batch, dtype, device, tiny)
    variance = torch.rand(CLASSES, DIM, generator=torch.Generator().manual_seed(1)).to(device)
    deviation = variance.sqrt().to(dtype)
    seed = torch.tensor([17, 0], device=device)
    compiled, out = torch.compile(eager_shift, fullgraph=True), x.clone()

    def own(backend: str, x: Tensor) -> Tensor:
        return shift_features(x, y, variance, strength=STRENGTH, seed=seed, backend=backend)

    def same_noise(result: Tensor) -> None:
        close([result], [own("reference", x)], 1e-5 if dtype == torch.float32 else 1e-2)

    def other_noise(result: Tensor) -> None:
        check_noise(result, x, STRENGTH * deviation[y])

    def same_features(result: Tensor) -> None:
        assert torch.equal(result, x)

    def rival(call: Callable[[Tensor], Tensor], check: Any, **about: bool) -> Rival:
        return Rival(lambda: call(x), check, call, **about)

    names, absent = own_backends("shift", device)
    found = {name: rival(partial(own, name), same_noise, ours=True) for name in names} | {
        "eager": rival(lambda x: eager_shift(x, y, deviation), other_noise),
        "eager, compiled": rival(lambda x: compiled(x, y, deviation), other_noise, compiled=True),
        "reference": rival(partial(own, "reference"), same_noise),
        COPY: rival(out.copy_, same_features),
    }
    return Rivals(lambda: x * 1.0, found, absent)


def check_noise(result: Tensor, x: Tensor, deviation: Tensor) -> None:
    """Check mean and variance of another generator's noise to six standard errors.

    Raises:
        AssertionError: one of them differs by more.
    """
    large = deviation > 0.1  # where rounding of the sum does not matter
    normal = ((result - x).double() / deviation.double())[large]
    error = 6 / normal.numel() ** 0.5 + 10 * torch.finfo(x.dtype).eps
    mean, variance = normal.mean().item(), normal.var().item()
    assert abs(mean) < error, f"the noise has a mean of {mean:.2g}"
    assert abs(variance - 1) < 2 * error, f"the noise has {variance:.3f} times its variance"


def one_hot_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute count, mean and m2 by two matrix products, with squares around the class means."""
    shares = torch.nn.functional.one_hot(y, CLASSES).to(x.dtype)
    count = shares.sum(0)
    mean = (shares.T @ x) / count.unsqueeze(1)
    return count, mean, shares.T @ (x - mean[y]).square()


def plain_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same from E[x^2] - E[x]^2, which cancels for large means."""
    shares = torch.nn.functional.one_hot(y, CLASSES).to(x.dtype)
    count = shares.sum(0).unsqueeze(1)
    total = shares.T @ x
    return count.squeeze(1), total / count, shares.T @ x.square() - total.square() / count


def moments_rivals(batch: int, dtype: torch.dtype, device: torch.device, tiny: bool) -> Rivals:
    """Make implementations of the class moments on the same inputs."""
    x, y = inputs(batch, dtype, device, tiny)
    compiled = torch.compile(one_hot_moments, fullgraph=True)

    def own(backend: str, x: Tensor) -> Any:
        return class_moments(x, y, CLASSES, backend=backend)

    def rival(call: Callable[[Tensor], Any], *, exact: bool = False, **about: bool) -> Rival:
        def check(result: Any) -> None:
            close(result, true, 1e-4 if exact or dtype == torch.float32 else 5e-2)

        return Rival(lambda: call(x), check, call, **about)

    names, absent = own_backends("shift", device)
    found = {name: rival(partial(own, name), exact=True, ours=True) for name in names} | {
        "one-hot": rival(lambda x: one_hot_moments(x, y)),
        "one-hot, compiled": rival(lambda x: compiled(x, y), compiled=True),
        "one-hot, E[x^2]": rival(lambda x: plain_moments(x, y)),
        "reference": rival(partial(own, "reference"), exact=True),
    }
    true = own("reference", x)
    return Rivals(lambda: x * 1.0, found, absent)
