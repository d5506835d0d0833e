"""Class moments of every fast implementation against numpy in float64.

Without a GPU this runs the C++ one; ``TRITON_INTERPRET=1 pytest <this file>`` the Triton one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mics_kernels import ClassStatistics, class_moments, merge_moments
from tests.kernels.implementations import INTERPRETED, device_of
from tests.kernels.properties import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def numpy_moments(
    features: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and m2 in float64, class by class, in two passes over the rows that count."""
    count = shares.sum(0)
    mean = np.zeros((shares.shape[1], features.shape[1]))
    m2 = np.zeros_like(mean)
    for c, share in enumerate(shares.T):
        rows = features[share > 0]
        if len(rows):
            mean[c] = np.average(rows, axis=0, weights=share[share > 0])
            m2[c] = share[share > 0] @ (rows - mean[c]) ** 2
    return count, mean, m2


def one_hot(target: Tensor, classes: int) -> Tensor:
    return target if target.dim() == 2 else (target[:, None] == torch.arange(classes)).double()


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor | None]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(0, 80 if INTERPRETED else 300))
    classes, dim = draw(st.sampled_from([1, 2, 8, 23])), draw(st.sampled_from([1, 4, 17, 64, 100]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    features = (torch.randn(rows, dim, generator=generator) + 3).to(dtype)
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(rows, generator=generator)
        weight[torch.rand(rows, generator=generator) < 0.2] = 0
        features[weight == 0] = float("nan")  # never read
    if draw(st.booleans()):
        return features, torch.rand(rows, classes, generator=generator).softmax(1), classes, weight
    target = torch.randint(-1, classes, (rows,), generator=generator)
    features[target < 0] = float("nan")  # never read
    return features, target, classes, weight


@examples(60, interpreted=15)
@given(batch=batches())
def test_moments_agree_with_numpy(
    backend: str, batch: tuple[Tensor, Tensor, int, Tensor | None]
) -> None:
    features, target, classes, weight = batch
    device = device_of(backend)
    moved = None if weight is None else weight.to(device)
    ours = class_moments(
        features.to(device), target.to(device), classes, weight=moved, backend=backend
    )
    shares = one_hot(target, classes).double()
    if weight is not None:
        shares = shares * weight.double().unsqueeze(1)
    exact = numpy_moments(features.double().numpy(), shares.numpy())
    assert [part.dtype for part in ours] == [torch.float64, torch.float32, torch.float32]
    for part, wanted, rtol in zip(ours, exact, (1e-12, 1e-6, 1e-6), strict=True):
        np.testing.assert_allclose(part.cpu().numpy(), wanted, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("distance", [1e4, 1e6])
def test_means_far_outside_the_spread_lose_nothing(
    backend: str, soft: bool, distance: float
) -> None:
    """The spread is 1; at 1e6, a float32 sum of a few rows is off by a tenth of that a row."""
    rows, classes, dim = 500 if INTERPRETED else 8192, 8, 33
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, dim, generator=generator) + distance
    target = torch.randint(classes, (rows,), generator=generator)
    features += target.unsqueeze(1) * 3.0
    if soft:
        target = torch.rand(rows, classes, generator=generator).softmax(1)
    device = device_of(backend)
    ours = class_moments(features.to(device), target.to(device), classes, backend=backend)
    exact = numpy_moments(features.double().numpy(), one_hot(target, classes).double().numpy())
    for part, wanted in zip(ours, exact, strict=True):
        np.testing.assert_allclose(part.cpu().numpy(), wanted, rtol=1e-6)


def test_an_outlier_in_the_first_row_spoils_nothing(backend: str) -> None:
    """A shift by the first row, E[(x - x_0)^2] - E[x - x_0]^2, would lose all digits here."""
    features = torch.randn(200, 20, generator=torch.Generator().manual_seed(2)) + 5
    features[0] = 1e6
    target = torch.zeros(200, dtype=torch.int64)
    target[0] = 1
    weight = torch.ones(200)
    device = device_of(backend)
    ours = class_moments(
        features.to(device), target.to(device), 2, weight=weight.to(device), backend=backend
    )
    shares = one_hot(target, 2).numpy()
    exact = numpy_moments(features.double().numpy(), shares)
    np.testing.assert_allclose(ours.m2.cpu().numpy()[0], exact[2][0], rtol=1e-6)


def test_merged_shards_are_the_whole(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    device = device_of(backend)
    features = (torch.randn(400, 24, generator=generator) * 2 + 100).to(device)
    target = torch.randint(-1, 5, (400,), generator=generator).to(device)
    whole = class_moments(features, target, 5, backend=backend)
    merged = class_moments(features[:0], target[:0], 5, backend=backend)
    for part in torch.arange(400, device=device).split([1, 0, 130, 2, 267]):
        shard = class_moments(features[part], target[part], 5, backend=backend)
        merged = merge_moments(merged, shard)
    # Measured 1.8e-6: between merges, means of 50 deviations are rounded to float32.
    for ours, wanted in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=4e-6, atol=0)


def test_a_nan_stays_in_its_class_and_column(backend: str) -> None:
    features = torch.randn(40, 6)
    features[7, 2] = float("nan")
    target = torch.arange(40) % 4
    device = device_of(backend)
    ours = class_moments(features.to(device), target.to(device), 4, backend=backend)
    for part in ours[1:]:
        spoiled = part.cpu().isnan()
        assert spoiled[3, 2] and spoiled.sum() == 1


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.01])
def test_statistics_are_updated_as_by_the_reference(
    backend: str, soft: bool, momentum: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several batches, one of them without rows of class 4, one with no row at all."""
    classes, dim, device = 5, 70, device_of(backend)
    generator = torch.Generator().manual_seed(4)
    ours = ClassStatistics(classes, dim, momentum=momentum).to(device)
    exact = ClassStatistics(classes, dim, momentum=momentum)
    for rows in (90, 3, 0, 200):
        features = torch.randn(rows, dim, generator=generator) * 2 + 7
        target = torch.randint(-1, classes - (rows == 3), (rows,), generator=generator)
        if soft:
            target = torch.rand(rows, classes, generator=generator).softmax(1)
        weight = torch.rand(rows, generator=generator) if rows == 90 else None
        monkeypatch.setenv("MICS_KERNELS_BACKEND", backend)
        ours.update(*(x if x is None else x.to(device) for x in (features, target, weight)))
        monkeypatch.setenv("MICS_KERNELS_BACKEND", "reference")
        exact.update(features.double(), target, weight)
    for name, wanted in exact.named_buffers():
        np.testing.assert_allclose(ours.get_buffer(name).cpu(), wanted, rtol=1e-6, err_msg=name)


def test_an_update_of_another_width_is_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICS_KERNELS_BACKEND", backend)
    device = device_of(backend)
    statistics = ClassStatistics(2, 3).to(device)
    with pytest.raises(ValueError, match=r"features must have shape \(B, 3\), got \(1, 4\)"):
        statistics.update(torch.zeros(1, 4, device=device), torch.zeros(1, dtype=torch.int64))
