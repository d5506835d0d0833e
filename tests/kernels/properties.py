"""Settings of the property tests: many examples, the same in every run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.kernels.implementations import GPU, INTERPRETED

ON_A_GPU = 12  # kernels are compiled for nearly every example: seconds


def examples(count: int, *, interpreted: int) -> settings:
    """Decorator of a property: how many examples it is tried on, fewer in the interpreter."""
    return settings(
        max_examples=interpreted if INTERPRETED else min(count, ON_A_GPU) if GPU else count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
