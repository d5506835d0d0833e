"""What each operator cannot do without, in closed form, and the least time a machine needs for it.

Bytes: every input read once and every result written once, in its dtype. FLOPs: of matrix products
two for each multiply-add; of the special functions the polynomials alone (two for each
coefficient), so that a floor of theirs is low rather than high. Tests compare these with counted
sizes, with torch's own FLOP counter, and (tools/check_kernels) with what the compiled kernels do.
"""

from __future__ import annotations

from typing import NamedTuple

from mics_kernels import coefficients


class Work(NamedTuple):
    """What has to be done; ``matrix``: its FLOPs are of matrix products."""

    bytes: int
    flops: int
    matrix: bool = False


class Peaks(NamedTuple):
    """What a machine does in a second at most, and how that is known; ``reached``: only what torch
    reaches there, which other code may exceed."""

    bytes: float
    matrix_flops: float
    vector_flops: float
    source: str
    reached: bool = False


def floor_seconds(work: Work, peaks: Peaks) -> float:
    """The longer of moving the bytes and of computing."""
    flops = peaks.matrix_flops if work.matrix else peaks.vector_flops
    return max(work.bytes / peaks.bytes, work.flops / flops)


def consistency(
    batch: int, dim: int, queue: int, itemsize: int, *, views: int = 2, alpha: float = 0.4
) -> Work:
    """Losses and gradients of all ordered pairs of views.

    Each view has features, teachers, a queue and a gradient. A pair takes two products of (batch,
    dim) with (batch + queue, dim) for its students and, unless alpha is 0, two for its teachers.
    """
    rows = views * (3 * batch + queue)
    product = 2 * batch * (batch + queue) * dim
    products = (4 if alpha else 2) * views * (views - 1)
    return Work(rows * dim * itemsize, products * product, matrix=True)


def contrastive(batch: int, dim: int, queue: int, itemsize: int) -> Work:
    """One direction with hard targets: queries, keys, queue and a gradient; two products."""
    rows = 3 * batch + queue
    return Work(rows * dim * itemsize, 4 * batch * (batch + queue) * dim, matrix=True)


def evidential(batch: int, views: int, classes: int, *, fuse: bool, judge: bool) -> Work:
    """Evidential operators in float32 with labels: evidence (or logits, where both) to gradient.

    Args:
        fuse: Dempster's rule: one more opinion, (batch, classes), is written.
        judge: the loss, of the fused opinion too: labels are read, special functions computed.
    """
    elements = batch * views * classes
    opinions = elements + batch * classes * fuse
    moved = 4 * (2 * elements + batch * classes * fuse) + (8 * batch if judge else 0)
    if not judge:
        return Work(moved, 2 * elements)
    flops = 2 * opinions * (len(coefficients.H_REST) + len(coefficients.H_SLOPE))
    return Work(moved, flops + 2 * elements * len(coefficients.LOG1P) * fuse)


def shift(batch: int, dim: int, classes: int, itemsize: int) -> Work:
    """Features to shifted features, with labels and a table of variances: a normal, a product and
    a sum for each. A normal is half of a logarithm, and a sine or cosine, as polynomials."""
    elements = batch * dim
    normal = len(coefficients.LOG_SHORT) + len(coefficients.SINE) + len(coefficients.COSINE)
    moved = 2 * elements * itemsize + 8 * batch + 4 * classes * dim
    return Work(moved, elements * (normal + 2))


def moments(batch: int, dim: int, classes: int, itemsize: int) -> Work:
    """Features and labels to count (float64), mean and m2: a sum, and a sum of squares."""
    moved = batch * dim * itemsize + 8 * batch + classes * (8 + 8 * dim)
    return Work(moved, 4 * batch * dim)
