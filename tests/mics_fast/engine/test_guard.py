"""The guard names the first broken value, and stores the data to reproduce it."""

from __future__ import annotations

import pytest
import torch

from mics_fast.engine.guard import NEVER, Guard, describe_samples, first_broken, is_out_of_memory


def scalars(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def steps(guard):
    return {name: int(step) for name, step in guard.first_steps().items()}


def test_the_first_step_that_was_not_finite_is_kept():
    guard, nan, inf = Guard(), float("nan"), float("inf")
    guard.watch(1, scalars(loss_a=1.0, loss_b=1.0))
    assert steps(guard) == {"loss_a": NEVER, "loss_b": NEVER}
    guard.watch(2, scalars(loss_a=1.0, loss_b=-inf))
    guard.watch(3, scalars(loss_a=nan, loss_b=nan))
    guard.watch(4, scalars(loss_a=1.0, loss_b=1.0))
    assert steps(guard) == {"loss_a": 3, "loss_b": 2}


def test_terms_may_come_and_go():
    guard = Guard()
    guard.watch(1, scalars(loss_a=1.0))
    guard.watch(2, scalars(loss_a=1.0, loss_b=float("nan")))
    assert steps(guard)["loss_b"] == 2


def test_a_broken_term_is_named_and_not_what_follows_from_it():
    assert first_broken({"loss_a": NEVER, "loss": NEVER}) is None
    assert first_broken({"loss_a": 7, "loss_b": 9, "loss": 7}) == (7, ["loss_a"])
    assert first_broken({"loss_a": 9, "gradient_norm": 8}) == (8, ["gradient_norm"])


def test_many_samples_are_counted(make_batch):
    parts = (make_batch(4), make_batch(8, first_id=20))
    assert describe_samples(parts) == "0, 1, 2, 3, 20, 21, 22, 23 and 4 more"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError("CUDA allocation failed"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_a_cpu_without_memory_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
