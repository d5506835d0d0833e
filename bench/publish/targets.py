"""Targets of the operators, and their values in the stored results."""

from __future__ import annotations

from typing import NamedTuple

from bench.publish.results import Result, figure, latest, measured


class Target(NamedTuple):
    """A bound on one column of one row: at least ``least``, or at most ``most``."""

    kind: str  # of device: cpu or cuda
    subject: str
    operator: str
    shape: str  # "" for any
    implementation: str
    column: str  # "ratio": time of this implementation over ours
    least: float | None = None
    most: float | None = None


FUSION, BOTH = "evidential_fusion_loss", "multimodal_consistency_loss"
SMALL, LARGE = "8192 x 3 x 8", "2048 x 3 x 1000"
HALF, STEP = "65536 x 768 bfloat16", "training step"
MICRO, TINY, BASE = "vit_micro, batch 32", "vit_tiny, batch 8", "vit_base, batch 16"
VIEWS, RATE = "training views", "pairs_per_second"
TARGETS = (
    Target("cpu", "evidential", FUSION, SMALL, "reference", "ratio", 50),
    Target("cpu", "evidential", FUSION, SMALL, "reference, compiled", "ratio", 50),
    Target("cpu", "evidential", FUSION, LARGE, "reference", "ratio", 30),
    Target("cpu", "evidential", FUSION, LARGE, "reference, compiled", "ratio", 30),
    Target("cpu", "consistency", BOTH, "B = 8", "ALBEF eager", "ratio", 12),
    Target("cpu", "consistency", BOTH, "B = 8", "ALBEF compiled", "ratio", 3),
    Target("cpu", "consistency", BOTH, "B = 64", "ALBEF eager", "ratio", 1.5),
    Target("cpu", "consistency", BOTH, "B = 64", "ALBEF compiled", "ratio", 1.4),
    Target("cpu", "consistency", BOTH, "B = 256", "ALBEF eager", "ratio", 2.5),
    Target("cpu", "consistency", BOTH, "B = 256", "ALBEF compiled", "ratio", 1.8),
    Target("cpu", "consistency", BOTH, "B = 256", "cpu", "extra_mb", most=64),
    Target("cpu", "shift", "shift_features", "8192 x 768 float32", "eager", "ratio", 6),
    Target("cpu", "shift", "shift_features", "8192 x 768 float32", "eager, compiled", "ratio", 3),
    Target("cpu", "shift", "class_moments", "8192 x 768 float32", "one-hot", "ratio", 3),
    Target("cpu", "pipeline", VIEWS, "", "Pillow", "ratio", 1),
    Target("cpu", "pipeline", VIEWS, "", "DALI, host cache", "ratio", most=1 / 3),
    Target("cpu", "training", STEP, MICRO, "a", "ratio", 3),
    Target("cpu", "training", STEP, MICRO, "c", "times_b", 1.25),
    Target("cpu", "training", STEP, TINY, "a", "ratio", 3),
    Target("cpu", "training", STEP, TINY, "c", "times_b", 1.25),
    Target("cuda", "evidential", FUSION, SMALL, "cuda", "median_ms", most=0.010),
    Target("cuda", "evidential", FUSION, SMALL, "reference", "ratio", 50),
    Target("cuda", "evidential", FUSION, SMALL, "reference, compiled", "ratio", 8),
    Target("cuda", "evidential", FUSION, LARGE, "cuda", "share_of_floor", 0.60),
    Target("cuda", "consistency", BOTH, "B = 8", "ALBEF eager", "ratio", 10),
    Target("cuda", "consistency", BOTH, "B = 1024", "ALBEF eager", "ratio", 5),
    Target("cuda", "consistency", BOTH, "B = 1024", "ALBEF compiled", "ratio", 3),
    Target("cuda", "consistency", BOTH, "B = 1024", "attention (SDPA)", "ratio", 1),
    Target("cuda", "consistency", BOTH, "B = 1024", "triton", "share_of_floor", 0.45),
    Target("cuda", "consistency", BOTH, "B = 1024", "triton", "extra_mb", most=60),
    Target("cuda", "shift", "shift_features", HALF, "triton", "share_of_floor", 0.65),
    Target("cuda", "shift", "shift_features", HALF, "eager", "ratio", 4),
    Target("cuda", "shift", "class_moments", HALF, "triton", "share_of_floor", 0.50),
    Target("cuda", "pipeline", VIEWS, "", "DALI", RATE, 2000),
    Target("cuda", "pipeline", VIEWS, "", "DALI, device cache", RATE, 10_000),
    Target("cuda", "training", STEP, BASE, "g", "data_wait", most=0.03),
    Target("cuda", "training", STEP, BASE, "g", RATE, 207),
    Target("cuda", "training", STEP, BASE, "g", "mfu", 0.40),
    Target("cuda", "training", STEP, BASE, "g", "times_b", 8),
    Target("cuda", "training", STEP, BASE, "turbo", RATE, 500),
)


def measured_value(target: Target, results: list[Result]) -> float | None:
    """Return a target's value from the newest device of its kind with the most threads."""
    for result in latest(results, target.subject, target.kind).values():
        rows = [
            row
            for row in measured(result.of(target.subject, target.operator))
            if row["implementation"] == target.implementation and target.shape in ("", row["shape"])
        ]
        most = max(rows, key=lambda row: row["threads"], default=None)
        return None if most is None else figure(most, target.column)
    return None


def holds(target: Target, value: float) -> bool:
    """Return True if the value satisfies the bound."""
    return (target.least is None or value >= target.least) and (
        target.most is None or value <= target.most
    )
