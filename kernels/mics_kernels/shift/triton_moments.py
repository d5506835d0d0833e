"""Class moments in Triton, and their merge into running statistics; formulas: README.md beside this
file.

The order of sums depends on shapes alone, without atomics: every run gives the same bits.
"""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from mics_kernels.shift.records import ClassMoments, MomentsInputs
from mics_kernels.triton_common import (
    cdiv,
    dense,
    device_of,
    launch,
    next_power_of_2,
)


@triton.jit
def _rows_of_class(target, weight, found, c, first, end, L: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """Write to ``found`` which rows of a segment have label c and a weight, relative to ``first``,
    in order; return their number."""
    n = tl.full((), 0, tl.int32)
    for start in range(first, end, L):
        row = start + tl.arange(0, L)
        own = tl.load(target + row, mask=row < end, other=-1) == c
        if HAS_WEIGHT:
            own = own & (tl.load(weight + row, mask=own, other=0.0) != 0.0)
        place = n + tl.cumsum(own.to(tl.int32), 0) - 1
        tl.store(found + place, (row - first).to(tl.int32), mask=own)
        n += tl.sum(own.to(tl.int32), 0)
    return n


@triton.jit
def _merge_rows(
    features, row, w, mass, column, count, mean, m2, D: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Merge rows (R,) of a class, with weights w (R,) and their sum, into its count, mean and m2
    (K,). A row with weight 0 is not read."""
    reads = (w != 0.0)[:, None]
    w = w[:, None]
    x = tl.load(
        features + row[:, None] * D + column[None, :],
        mask=reads & (column < D)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    # The mean up to rounding, the remainder, and the squares around it.
    each = 1.0 / tl.where(mass > 0.0, mass, 1.0)
    centre = tl.sum(w * x if WEIGHTED else x, 0) * each.to(tl.float32)
    distance = tl.where(reads, x - centre[None, :], 0.0)
    weighted = w * distance if WEIGHTED else distance
    rest = tl.sum(weighted, 0).to(tl.float64)
    squares = tl.sum(weighted * distance, 0).to(tl.float64)
    # Chan, Golub, LeVeque, 1979.
    whole = count + mass
    share = mass / tl.where(whole > 0.0, whole, 1.0)
    offset = rest * each
    gap = centre.to(tl.float64) + offset - mean
    m2 += squares - rest * offset + gap * gap * (share * count)
    return whole, mean + gap * share, m2


@triton.jit(do_not_specialize=["rows", "segment"])
def moments_kernel(
    features, target, weight, found, counts, means, m2s, rows, segment,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    SOFT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """features (B, D), target (B,) or (B, C), weight (B,) -> moments of each ``segment`` rows:
    counts (S, C), means and m2s (S, C, D), all float64. found (S, T, segment) is scratch.

    A program takes one class after another: it lists the rows that have its label, L labels at a
    time, and merges them R at a time. With posteriors, each row is one of every class.
    """
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * K + tl.arange(0, K)
    first = part * segment
    end = tl.minimum(first + segment, rows)
    if not SOFT:
        found += (part * tl.num_programs(1) + tl.program_id(1)) * segment
    for c in range(C):
        n = (end - first).to(tl.int32)
        if not SOFT:
            n = _rows_of_class(target, weight, found, c, first, end, L, HAS_WEIGHT)
            tl.debug_barrier()  # threads read what others have written
        count = tl.full((), 0.0, tl.float64)
        mean = tl.zeros((K,), tl.float64)
        m2 = tl.zeros((K,), tl.float64)
        for start in range(0, n, R):
            row = start + tl.arange(0, R)
            reads = row < n
            if not SOFT:
                row = tl.load(found + row, mask=reads, other=0)
            row = first + row
            w = reads.to(tl.float32)
            mass = tl.minimum(n - start, R).to(tl.float64)
            if HAS_WEIGHT:
                w = tl.load(weight + row, mask=reads, other=0.0)
            if SOFT:
                w *= tl.load(target + row * C + c, mask=w != 0.0, other=0.0)
            if SOFT or HAS_WEIGHT:
                mass = tl.sum(w.to(tl.float64), 0)
            count, mean, m2 = _merge_rows(
                features, row, w, mass, column, count, mean, m2, D, SOFT or HAS_WEIGHT
            )
        place = part * C + c
        if tl.program_id(1) == 0:
            tl.store(counts + place, count)
        tl.store(means + place * D + column, mean, mask=column < D)
        tl.store(m2s + place * D + column, m2, mask=column < D)
        tl.debug_barrier()  # every thread has read the list


@triton.jit
def _joined_segments(
    counts, means, m2s, label, column,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 (K,) of a class over the S segments that ``moments_kernel`` left."""
    part = tl.arange(0, SP).to(tl.int64)
    n = tl.load(counts + part * C + label, mask=part < S, other=0.0)
    total = tl.sum(n, 0)
    place = (part[:, None] * C + label) * D + column[None, :]
    mask = (part < S)[:, None] & (column < D)[None, :]
    own = tl.load(means + place, mask=mask, other=0.0)
    share = n / tl.where(total != 0.0, total, 1.0)
    mean = tl.sum(share[:, None] * own, 0)
    gap = own - mean[None, :]
    squares = tl.load(m2s + place, mask=mask, other=0.0) + n[:, None] * gap * gap
    return total, mean, tl.sum(squares, 0)


@triton.jit
def merge_kernel(
    counts, means, m2s, count, mean, m2,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Moments of S segments -> count (C,) float64, mean, m2 (C, D) float32."""
    label = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * K + tl.arange(0, K)
    n, centre, squares = _joined_segments(counts, means, m2s, label, column, D, C, S, SP)
    out = label * D + column
    tl.store(mean + out, centre.to(tl.float32), mask=column < D)
    tl.store(m2 + out, squares.to(tl.float32), mask=column < D)
    if tl.program_id(1) == 0:
        tl.store(count + label, n)


@triton.jit
def _absorb(count, n, mean, m2, place, real, centre, squares, kept):
    """Merge n rows with these moments (K,) into mean and m2 in memory, where ``count`` rows weigh
    ``kept``; the merged rows weigh count + n."""
    old = tl.load(mean + place, mask=real, other=0.0)
    spread = tl.load(m2 + place, mask=real, other=0.0) * (kept / tl.where(count > 0.0, count, 1.0))
    whole = kept + n
    share = n / tl.where(whole > 0.0, whole, 1.0)
    gap = centre - old
    scale = (count + n) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(mean + place, old + gap * share, mask=real)
    tl.store(m2 + place, (spread + squares + gap * gap * share * kept) * scale, mask=real)


@triton.jit
def update_kernel(
    counts, means, m2s, pending_count, pending_mean, pending_m2, count, mean, m2,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr,
    FADE: tl.constexpr,
):  # fmt: skip
    """Moments of S segments, merged into those of ``ClassStatistics``, in place; one class.

    FADE: ln(1 - momentum), or 0 for cumulative statistics.
    """
    label = tl.program_id(0).to(tl.int64)
    before = tl.load(count + label)
    pending = tl.load(pending_count + label)
    n = before * 0.0
    for start in range(0, D, K):
        column = start + tl.arange(0, K)
        real = column < D
        place = label * D + column
        n, centre, squares = _joined_segments(counts, means, m2s, label, column, D, C, S, SP)
        kept = before
        if FADE != 0.0:
            fade = tl.exp(n * FADE)
            cap = n * fade / tl.where(n > 0.0, 1.0 - fade, 1.0)
            kept = tl.where(n > 0.0, tl.minimum(before, cap), before)
        # Merged rows weigh their number again: m2 / count is the variance.
        _absorb(before, n, mean, m2, place, real, centre, squares, kept)
        _absorb(pending, n, pending_mean, pending_m2, place, real, centre, squares, pending)
    tl.debug_barrier()  # every thread has read the counts
    tl.store(count + label, before + n)
    tl.store(pending_count + label, pending + n)


# --- Launches ---------------------------------------------------------------------------------


def moments_blocks(rows: int, dim: int, classes: int, soft: bool) -> dict[str, int]:
    """Return tile and segments of the moments: at most 64, fewer if they need much memory.

    They depend on shapes alone, and so does every bit of the result. Weights of posteriors take
    registers of the tile.
    """
    block = {"R": 32 if soft else 64, "K": min(128, next_power_of_2(dim))}
    most = max(1, min(64, 2**23 // (classes * dim)))
    segment = cdiv(cdiv(max(rows, 1), most), block["R"]) * block["R"]
    labels = min(1024, next_power_of_2(segment))
    return {**block, "L": labels, "segment": segment, "S": cdiv(max(rows, 1), segment)}


def update_columns(dim: int, segments: int) -> int:
    """Return the columns that a program of ``update_kernel`` takes at once, a power of 2."""
    return min(next_power_of_2(dim), 512, max(32, 2048 // segments))


def class_moments(inputs: MomentsInputs) -> ClassMoments:
    """Count (C,) float64, mean and sum of squared deviations (C, D) float32, in one read."""
    features, classes = inputs.features, inputs.num_classes
    shape = (classes, features.shape[1])
    moments = ClassMoments(
        features.new_empty(classes, dtype=torch.float64),
        features.new_empty(shape, dtype=torch.float32),
        features.new_empty(shape, dtype=torch.float32),
    )
    with device_of(features):
        segments, options = _moments_of_segments(inputs)
        grid = (classes, cdiv(shape[1], 32))
        launch(merge_kernel, grid, (*segments, *moments), K=32, **options)
    return moments


def update_statistics(
    inputs: MomentsInputs, pending: ClassMoments, running: ClassMoments, momentum: float | None
) -> None:
    """Merge the moments of rows into float64 moments in place; into ``running`` with momentum."""
    with device_of(inputs.features):
        segments, options = _moments_of_segments(inputs)
        columns = update_columns(options["D"], options["SP"])
        fade = 0.0 if momentum is None else math.log1p(-momentum)
        launch(
            update_kernel, (inputs.num_classes,), (*segments, *pending, *running),
            K=columns, FADE=fade, **options,
        )  # fmt: skip


def _moments_of_segments(inputs: MomentsInputs) -> tuple[ClassMoments, dict[str, int]]:
    """Count, mean and m2 of segments of rows, and the options of the kernels that join them."""
    features, classes = inputs.features.contiguous(), inputs.num_classes
    soft = inputs.target.dim() == 2
    rows, dim = features.shape
    target = dense(inputs.target, torch.float32 if soft else torch.int64)
    weight = None if inputs.weight is None else dense(inputs.weight, torch.float32)
    tile = moments_blocks(rows, dim, classes, soft)
    parts, segment, columns = tile["S"], tile["segment"], cdiv(dim, tile["K"])
    segments = ClassMoments(
        features.new_empty((parts, classes), dtype=torch.float64),
        features.new_empty((parts, classes, dim), dtype=torch.float64),
        features.new_empty((parts, classes, dim), dtype=torch.float64),
    )
    found = None if soft else features.new_empty((parts, columns, segment), dtype=torch.int32)
    launch(
        moments_kernel, (parts, columns),
        (features, target, weight, found, *segments, rows, segment),
        D=dim, C=classes, R=tile["R"], K=tile["K"], L=tile["L"], SOFT=soft,
        HAS_WEIGHT=weight is not None,
    )  # fmt: skip
    return segments, {"D": dim, "C": classes, "S": parts, "SP": next_power_of_2(parts)}
