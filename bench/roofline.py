"""The unavoidable work of each operator, in closed form, and the least time it takes.

Bytes: every input read once and every result written once, in its dtype. FLOPs: two per
multiply-add of a matrix product; for special functions only the polynomials (two per coefficient),
so that floors are low rather than high. Tests compare the counts with tensor sizes and torch's FLOP
counter, tools/check_kernels with the compiled kernels.
"""

from __future__ import annotations

from typing import NamedTuple

from mics_kernels import coefficients


class Work(NamedTuple):
    """Work of a case."""

    bytes: int
    flops: int
    matrix: bool = False  # True if its FLOPs are those of matrix products


class Peaks(NamedTuple):
    """Peak rates of a machine per second."""

    bytes: float
    matrix_flops: float
    vector_flops: float
    source: str  # of the figures
    reached: bool = False  # True if only measured with torch, which other code may exceed


def floor_seconds(work: Work, peaks: Peaks) -> float:
    """Return the longer of moving the bytes and computing the FLOPs."""
    flops = peaks.matrix_flops if work.matrix else peaks.vector_flops
    return max(work.bytes / peaks.bytes, work.flops / flops)


def consistency(
    batch: int, dim: int, queue: int, itemsize: int, *, views: int = 2, alpha: float = 0.4
) -> Work:
    """Count losses and gradients of all ordered pairs of modalities.

    Each modality has features, teachers, a queue and a gradient. Each pair takes two products of
    (batch, dim) with (batch + queue, dim) for its students and, unless alpha is 0, two for its
    teachers.
    """
    rows = views * (3 * batch + queue)
    product = 2 * batch * (batch + queue) * dim
    products = (4 if alpha else 2) * views * (views - 1)
    return Work(rows * dim * itemsize, products * product, matrix=True)


def contrastive(batch: int, dim: int, queue: int, itemsize: int) -> Work:
    """Count one direction with hard targets: queries, keys, queue, a gradient; two products."""
    rows = 3 * batch + queue
    return Work(rows * dim * itemsize, 4 * batch * (batch + queue) * dim, matrix=True)


def evidential(batch: int, views: int, classes: int, *, fuse: bool, judge: bool) -> Work:
    """Count evidential operators in float32 with labels, up to the gradient of their input.

    Args:
        fuse: with Dempster's rule, which writes one more opinion, (batch, classes).
        judge: with the loss, which reads labels and evaluates special functions.
    """
    elements = batch * views * classes
    opinions = elements + batch * classes * fuse
    moved = 4 * (2 * elements + batch * classes * fuse) + (8 * batch if judge else 0)
    if not judge:
        return Work(moved, 2 * elements)
    flops = 2 * opinions * (len(coefficients.H_REST) + len(coefficients.H_SLOPE))
    return Work(moved, flops + 2 * elements * len(coefficients.LOG1P) * fuse)


def shift(batch: int, dim: int, classes: int, itemsize: int) -> Work:
    """Count the shift with labels and a table of variances: per element a normal draw, a product
    and a sum.

    A normal draw takes half a logarithm and a sine or cosine, as polynomials.
    """
    elements = batch * dim
    normal = len(coefficients.LOG_SHORT) + len(coefficients.SINE) + len(coefficients.COSINE)
    moved = 2 * elements * itemsize + 8 * batch + 4 * classes * dim
    return Work(moved, elements * (normal + 2))


def moments(batch: int, dim: int, classes: int, itemsize: int) -> Work:
    """Count the moments: count (float64), mean and m2; a sum and a sum of squares per element."""
    moved = batch * dim * itemsize + 8 * batch + classes * (8 + 8 * dim)
    return Work(moved, 4 * batch * dim)
