"""The native module checks the sizes that it is called with."""

import importlib

import pytest

from tests.kernels.implementations import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="C++ backend: needs a run without interpreter")

ROWS = {"rows": 1, "dim": 0, "classes": 2}
CONSISTENCY = {
    "key_ids": 0, "queries": 0, "keys": 0, "present_stride": 1, "dim": 0, "temperature": 1.0,
    "alpha": 0.5, "want_gradient": False, "threads": 1,
}  # fmt: skip


def null_arguments(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def test_a_width_of_zero_is_refused() -> None:
    native = importlib.import_module("mics_kernels._native")
    with pytest.raises(ValueError, match="dim must be >= 1"):
        native.consistency_cpu([], **CONSISTENCY)
    addresses = null_arguments("features", "labels", "shares", "weight", "count", "mean", "m2")
    with pytest.raises(ValueError, match="dim and classes >= 1"):
        native.MomentsCall(dtype="float32", **addresses, **ROWS)


def test_fewer_keys_than_queries_are_refused() -> None:
    native = importlib.import_module("mics_kernels._native")
    with pytest.raises(ValueError, match="keys at least as many"):
        native.consistency_cpu([], **{**CONSISTENCY, "dim": 4, "queries": 2, "keys": 1})


@pytest.mark.parametrize("views", [0, 9])
def test_numbers_of_views_beyond_the_kernels_are_refused(views: int) -> None:
    native = importlib.import_module("mics_kernels._native")
    addresses = null_arguments("evidence", "present", "fused", "outer", "gradient")
    with pytest.raises(ValueError, match=r"views must be in \[1, 8\]"):
        native.FusionCall(dtype="float32", **addresses, rows=1, views=views, classes=2)
