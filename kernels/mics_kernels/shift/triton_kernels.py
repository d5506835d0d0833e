"""Class moments, shift and shifted cross-entropy in Triton; formulas: README.md beside this file.

A program works on R rows and K columns (or classes) at a time. The order of sums depends on shapes
alone, without atomics: every run gives the same bits.
"""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mics_kernels import coefficients
from mics_kernels.shift.records import (
    BoundGradientInputs,
    BoundGradients,
    BoundInputs,
    BoundResults,
    ClassMoments,
    MomentsInputs,
    ShiftedLossInputs,
    ShiftedLossResults,
    ShiftInputs,
)
from mics_kernels.triton_common import constant, device_of, polynomial

_LOG = constant(coefficients.LOG_SHORT)
_SINE = constant(coefficients.SINE)
_COSINE = constant(coefficients.COSINE)


# --- Random numbers -------------------------------------------------------------------------------


@triton.jit
def _low(wide):
    return wide.to(tl.uint32)


@triton.jit
def _high(wide):
    return (wide >> 32).to(tl.uint32)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10: key and counter to four random words, all uint32 but the seed (int64)."""
    k0 = _low(seed)
    k1 = _high(seed)
    for _ in tl.static_range(10):
        # One wide product gives both words: its halves are two registers.
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = _high(second) ^ c1 ^ k0
        c2 = _high(first) ^ c3 ^ k1
        c1 = _low(second)
        c3 = _low(first)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) with u = (n + 1/2) 2^-24, n the upper 24 bits of the word."""
    n = (word >> 8).to(tl.float32)
    # u = 2^k (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]; k stays in the exponent field.
    k = ((n + 0.5).to(tl.int32, bitcast=True) - 0x4B3504F3) & -0x800000
    scale = (0x33800000 - k).to(tl.float32, bitcast=True)
    # u has 25 bits, but f at most 24: every step is exact, so ln(u) is accurate up to u = 1.
    f = (n * scale - 1.0) + 0.5 * scale
    rest = f + f * f * (f * polynomial(f, _LOG) - 0.5)
    log = k.to(tl.float32) * 8.2629582e-8 + rest  # ln(2) / 2^23
    return tl.sqrt(-2.0 * log)


@triton.jit
def _turn(word):
    """cos and sin of 2 pi u, with the same u; a quarter turn is a swap and a sign."""
    angle = (word & 0xFFFFFF00) | 0x80  # u in units of 2^-32
    quarter = angle + 0x20000000  # the nearest quarter turn, in the upper two bits
    t = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    square = t * t
    s = t * polynomial(square, _SINE)
    c = 1.0 + square * polynomial(square, _COSINE)
    odd = (quarter & 0x40000000) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True)
    cosine = cosine ^ ((quarter + 0x40000000) & 0x80000000)
    sine = sine ^ (quarter & 0x80000000)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def _normals(seed, offset, row_id, draw):
    """Four normals of each draw of each row; row_id (int64) and draw broadcast."""
    zero = draw.to(tl.uint32) * 0 + _low(row_id) * 0
    w0, w1, w2, w3 = philox(
        seed, draw.to(tl.uint32) + zero, _low(row_id) + zero, _high(row_id) + zero,
        _low(offset) + zero,
    )  # fmt: skip
    cosine, sine = _turn(w1)
    radius = _radius(w0)
    other_cosine, other_sine = _turn(w3)
    other_radius = _radius(w2)
    return radius * cosine, radius * sine, other_radius * other_cosine, other_radius * other_sine


# --- Shift ----------------------------------------------------------------------------------------


@triton.jit
def _strength(strength, row, inside, IN_MEMORY: tl.constexpr, STRIDE: tl.constexpr):
    """Strength of each row (R,)."""
    if IN_MEMORY:
        value = tl.load(strength + row * STRIDE, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.zeros_like(row).to(tl.float32) + strength
    return value


@triton.jit(do_not_specialize=["strength", "rows"])
def shift_kernel(
    features, target, spread, seed, row_ids, moved, rows, strength,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SOFT: tl.constexpr,
    HAS_IDS: tl.constexpr, IN_MEMORY: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """features (B, D), target (B,) or (B, C), row_ids (B,) -> moved (B, D); spread (C, D) holds
    deviations for labels, variances for posteriors."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * K + tl.arange(0, K)
    inside = row < rows
    mask = inside[:, None] & (column < D)[None, :]
    row_id = row
    if HAS_IDS:
        row_id = tl.load(row_ids + row, mask=inside, other=0)
    draw = tl.program_id(1) * (K // 4) + tl.arange(0, K // 4)
    z0, z1, z2, z3 = _normals(tl.load(seed), tl.load(seed + 1), row_id[:, None], draw[None, :])
    normal = tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape((R, K))

    if SOFT:
        total = tl.zeros((R, K), tl.float32)
        for c in range(C):
            share = tl.load(target + row * C + c, mask=inside, other=0.0)
            place = tl.cast(c, tl.int64) * D + column
            own = tl.load(spread + place, mask=column < D, other=0.0)
            total += share[:, None] * own[None, :]
        spread = tl.sqrt(total)
    else:
        label = tl.load(target + row, mask=inside, other=-1)
        is_class = (label >= 0) & (label < C)
        there = mask & is_class[:, None]
        spread = tl.load(spread + label[:, None] * D + column[None, :], mask=there, other=0.0)
    scale = _strength(strength, row, inside, IN_MEMORY, STRIDE)
    place = row[:, None] * D + column[None, :]
    x = tl.load(features + place, mask=mask, other=0.0)
    out = (x.to(tl.float32) + (scale[:, None] * spread) * normal).to(moved.dtype.element_ty)
    if not SOFT:
        out = tl.where(is_class[:, None], out, x)
    tl.store(moved + place, out, mask=mask)


@triton.jit
def _along(directions, first, j, normal, column, shares, row, counts, n,
           D: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr, SOFT: tl.constexpr):  # fmt: skip
    """normal * direction j of the class of each row, times the root of the share of posteriors."""
    there = counts & (j < n)
    if SOFT:
        share = tl.load(shares + row * C + j // RANK, mask=there, other=0.0)
        normal = normal * tl.sqrt(share)
    mask = there[:, None] & (column < D)[None, :]
    place = (first + j)[:, None] * D + column[None, :]
    return normal[:, None] * tl.load(directions + place, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["strength", "rows"])
def combine_kernel(
    features, target, directions, seed, row_ids, moved, rows, scale, strength,
    D: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    SOFT: tl.constexpr, HAS_IDS: tl.constexpr, IN_MEMORY: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """As ``shift_kernel`` with directions (C, RANK, D); scale = 1 / sqrt(RANK)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * K + tl.arange(0, K)
    inside = row < rows
    row_id = row
    if HAS_IDS:
        row_id = tl.load(row_ids + row, mask=inside, other=0)
    is_class = inside
    first = tl.zeros_like(row)
    n: tl.constexpr = C * RANK if SOFT else RANK
    if not SOFT:
        label = tl.load(target + row, mask=inside, other=-1)
        is_class = (label >= 0) & (label < C)
        first = label * RANK
    key = tl.load(seed)
    offset = tl.load(seed + 1)
    total = tl.zeros((R, K), tl.float32)
    for j in range(0, n, 4):
        z0, z1, z2, z3 = _normals(key, offset, row_id, tl.zeros_like(row) + j // 4)
        total += _along(
            directions, first, j, z0, column, target, row, is_class, n, D, RANK, C, SOFT
        )
        total += _along(
            directions, first, j + 1, z1, column, target, row, is_class, n, D, RANK, C, SOFT
        )
        total += _along(
            directions, first, j + 2, z2, column, target, row, is_class, n, D, RANK, C, SOFT
        )
        total += _along(
            directions, first, j + 3, z3, column, target, row, is_class, n, D, RANK, C, SOFT
        )
    mask = inside[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    x = tl.load(features + place, mask=mask, other=0.0)
    own = _strength(strength, row, inside, IN_MEMORY, STRIDE) * scale
    out = x.to(tl.float32) + own[:, None] * total
    tl.store(
        moved + place, tl.where(is_class[:, None], out.to(moved.dtype.element_ty), x), mask=mask
    )


# --- Moments --------------------------------------------------------------------------------------


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


# --- Shifted cross-entropy ------------------------------------------------------------------------


@triton.jit
def _moved_logits(logits, table, half_square, row, label, counts, k, C: tl.constexpr):
    """Raise (R, K) logits by the shift; -inf for padding classes."""
    mask = counts[:, None] & (k < C)[None, :]
    z = tl.load(logits + row[:, None] * C + k[None, :], mask=mask, other=0.0).to(tl.float32)
    extra = tl.load(table + label[:, None] * C + k[None, :], mask=mask, other=0.0)
    return tl.where((k < C)[None, :], z + half_square[:, None] * extra, -float("inf"))


@triton.jit(do_not_specialize=["strength", "rows"])
def losses_kernel(
    logits, target, table, losses, gradient, rows, strength,
    C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, GRADIENT: tl.constexpr,
    IN_MEMORY: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """logits (B, C), target (B,), table (C, C) -> losses (B,), gradient (B, C)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    label = tl.load(target + row, mask=inside, other=-1)
    counts = (label >= 0) & (label < C)
    scale = _strength(strength, row, inside, IN_MEMORY, STRIDE)
    half_square = 0.5 * scale * scale
    top = tl.full((R,), -float("inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    right = tl.zeros((R,), tl.float32)
    for start in range(0, C, K):
        k = start + tl.arange(0, K)
        z = _moved_logits(logits, table, half_square, row, label, counts, k, C)
        right += tl.sum(tl.where(label[:, None] == k[None, :], z, 0.0), 1)
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
    tl.store(losses + row, tl.where(counts, tl.log(total) - (right - top), 0.0), mask=inside)
    if GRADIENT:
        for start in range(0, C, K):
            k = start + tl.arange(0, K)
            z = _moved_logits(logits, table, half_square, row, label, counts, k, C)
            one = (label[:, None] == k[None, :]).to(tl.float32)
            g = tl.exp(z - top[:, None]) / total[:, None] - one
            g = tl.where(counts[:, None], g, 0.0).to(gradient.dtype.element_ty)
            mask = inside[:, None] & (k < C)[None, :]
            tl.store(gradient + row[:, None] * C + k[None, :], g, mask=mask)


# --- Shifted cross-entropy with its table, one kernel each way ------------------------------------


@triton.jit
def _squared_gaps(weight, variance, D: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
                  K: tl.constexpr):  # fmt: skip
    """Table (CP, CP): of class y and logit j the sum of variance[y] (weight[j] - weight[y])^2."""
    label = tl.arange(0, CP)
    table = tl.zeros((CP, CP), tl.float32)
    for start in range(0, D, K):
        column = start + tl.arange(0, K)
        w, own = _weight_and_variance(weight, variance, label, column, D, C)
        gap = w[None, :, :] - w[:, None, :]
        table += tl.sum(own[:, None, :] * gap * gap, 2)
    return table


@triton.jit
def _weight_and_variance(weight, variance, label, column, D: tl.constexpr, C: tl.constexpr):
    mask = (label < C)[:, None] & (column < D)[None, :]
    place = label.to(tl.int64)[:, None] * D + column[None, :]
    w = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
    return w, tl.load(variance + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["strength", "rows", "steps"])
def bound_kernel(
    logits, target, weight, variance, loss, sums, gradient, rows, strength, steps,
    D: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    ALONE: tl.constexpr, BY_ROW: tl.constexpr, MEAN: tl.constexpr,
    GRADIENT: tl.constexpr, IN_MEMORY: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """logits (B, C), target (B,), weight and variance (C, D) -> loss (B,) by row, else (1,), sums
    (G, 2) = number of rows that count and loss of G programs, gradient (B, C) of each row's loss.

    A program takes ``steps`` blocks of R rows. One ALONE finishes the loss.
    """
    label = tl.arange(0, CP)
    table = _squared_gaps(weight, variance, D, C, CP, K)
    losses = tl.zeros((R,), tl.float32)
    counted = tl.zeros((R,), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * R + tl.arange(0, R)
        inside = row < rows
        own = tl.load(target + row, mask=inside, other=-1)
        counts = (own >= 0) & (own < C)
        scale = _strength(strength, row, inside, IN_MEMORY, STRIDE)
        one = own[:, None] == label[None, :]
        extra = tl.sum(tl.where(one[:, :, None], table[None, :, :], 0.0), 1)
        place = row[:, None] * C + label[None, :]
        mask = inside[:, None] & (label < C)[None, :]
        z = tl.load(logits + place, mask=mask & counts[:, None], other=0.0).to(tl.float32)
        z = tl.where(
            (label < C)[None, :], z + (0.5 * scale * scale)[:, None] * extra, -float("inf")
        )
        top = tl.max(z, 1)
        likely = tl.exp(z - top[:, None])
        total = tl.sum(likely, 1)
        right = tl.sum(tl.where(one, z, 0.0), 1)
        value = tl.where(counts, tl.log(total) - (right - top), 0.0)
        if GRADIENT:
            g = tl.where(counts[:, None], likely / total[:, None] - one.to(tl.float32), 0.0)
            tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=mask)
        if BY_ROW:
            tl.store(loss + row, value, mask=inside)
        losses += value
        counted += counts.to(tl.float32)
    if not BY_ROW:
        whole = tl.sum(losses, 0)
        number = tl.sum(counted, 0)
        tl.store(sums + 2 * tl.program_id(0), number)
        tl.store(sums + 2 * tl.program_id(0) + 1, whole)
        if ALONE:
            tl.store(loss, whole / tl.maximum(number, 1.0) if MEAN else whole)


@triton.jit(do_not_specialize=["parts"])
def bound_sum_kernel(sums, loss, parts, N: tl.constexpr, MEAN: tl.constexpr):
    """sums (G, 2) of ``bound_kernel`` -> loss (1,), and first the number of all rows that count."""
    losses = tl.zeros((N,), tl.float32)
    counted = tl.zeros((N,), tl.float32)
    for start in range(0, parts, N):
        part = start + tl.arange(0, N)
        counted += tl.load(sums + 2 * part, mask=part < parts, other=0.0)
        losses += tl.load(sums + 2 * part + 1, mask=part < parts, other=0.0)
    whole = tl.sum(losses, 0)
    number = tl.sum(counted, 0)
    tl.debug_barrier()  # every thread has read the first number
    tl.store(loss, whole / tl.maximum(number, 1.0) if MEAN else whole)
    tl.store(sums, number)


@triton.jit(do_not_specialize=["strength", "rows"])
def bound_gradient_kernel(
    gradient, target, weight, variance, outer, sums, of_logits, of_weight, rows, strength,
    D: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, BY_ROW: tl.constexpr, MEAN: tl.constexpr,
    IN_MEMORY: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """gradient (B, C), outer (B,) by row, else (1,) -> of_logits (B, C), of_weight (C, D).

    The first T programs take K columns of the weight each, the others R rows.
    """
    label = tl.arange(0, CP)
    part = tl.program_id(0)
    scale = 1.0
    if MEAN:
        scale = 1.0 / tl.maximum(tl.load(sums), 1.0)
    first = tl.where(part < T, 0, (part - T) * R)
    last = tl.where(part < T, rows, first + 1)
    table = tl.zeros((CP, CP), tl.float32)  # of class y and logit j, of the table's entry
    for start in range(first, last, R):
        row = tl.cast(start, tl.int64) + tl.arange(0, R)
        inside = row < rows
        place = row[:, None] * C + label[None, :]
        mask = inside[:, None] & (label < C)[None, :]
        g = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        if BY_ROW:
            g *= tl.load(outer + row, mask=inside, other=0.0)[:, None]
        else:
            g *= tl.load(outer) * scale
        if part >= T:
            tl.store(of_logits + place, g.to(of_logits.dtype.element_ty), mask=mask)
        else:
            own = tl.load(target + row, mask=inside, other=-1)
            size = _strength(strength, row, inside, IN_MEMORY, STRIDE)
            g *= tl.where(own >= 0, 0.5 * size * size, 0.0)[:, None]
            one = own[:, None] == label[None, :]
            table += tl.sum(tl.where(one[:, :, None], g[:, None, :], 0.0), 0)
    if part < T:
        column = part * K + tl.arange(0, K)
        w, own_variance = _weight_and_variance(weight, variance, label, column, D, C)
        gap = w[None, :, :] - w[:, None, :]
        each = 2.0 * table[:, :, None] * own_variance[:, None, :] * gap
        total = tl.sum(each, 0) - tl.sum(each, 1)
        mask = (label < C)[:, None] & (column < D)[None, :]
        place = label.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(of_weight + place, total.to(of_weight.dtype.element_ty), mask=mask)


# --- Launches ---------------------------------------------------------------------------------


def shift_blocks(dim: int) -> dict[str, int]:
    """Return the shift's tile: 4,096 elements, 32 per thread, share work per row and column.

    The number of columns is a power of two, one that divides D where possible.
    """
    block = dim & -dim
    if block < 32:
        block = triton.next_power_of_2(dim)
    block = max(4, min(block, 256))
    return {"D": dim, "R": 4096 // block, "K": block}


def moments_blocks(rows: int, dim: int, classes: int, soft: bool) -> dict[str, int]:
    """Return tile and segments of the moments: at most 64, fewer if they need much memory.

    They depend on shapes alone, and so does every bit of the result. Weights of posteriors take
    registers of the tile.
    """
    block = {"R": 32 if soft else 64, "K": min(128, triton.next_power_of_2(dim))}
    most = max(1, min(64, 2**23 // (classes * dim)))
    segment = triton.cdiv(triton.cdiv(max(rows, 1), most), block["R"]) * block["R"]
    labels = min(1024, triton.next_power_of_2(segment))
    return {**block, "L": labels, "segment": segment, "S": triton.cdiv(max(rows, 1), segment)}


def update_columns(dim: int, segments: int) -> int:
    """Return the columns that a program of ``update_kernel`` takes at once, a power of 2."""
    return min(triton.next_power_of_2(dim), 512, max(32, 2048 // segments))


def loss_blocks(classes: int) -> dict[str, int]:
    """Return the tile of the shifted cross-entropy: 1,024 logits, in whole rows if they fit."""
    block = min(triton.next_power_of_2(classes), 1024)
    return {"C": classes, "R": 1024 // block, "K": block}


def bound_blocks(dim: int, classes: int) -> dict[str, int]:
    """Return the tile of the shifted cross-entropy with its table.

    A block of rows meets the table as (R, CP, CP), a block of columns as (CP, CP, K).
    """
    padded = triton.next_power_of_2(classes)
    block = max(1, min(2048 // padded**2, 128))
    columns = max(1, min(2048 // padded**2, 64, triton.next_power_of_2(dim)))
    return {"D": dim, "C": classes, "CP": padded, "R": block, "K": columns}


def bound_programs(rows: int, classes: int) -> tuple[int, int]:
    """Return programs and blocks of each; one takes up to 256 rows, as most batches have."""
    block = bound_blocks(1, classes)["R"]
    steps = min(triton.cdiv(256, block), triton.cdiv(rows, block))
    return triton.cdiv(rows, block * max(steps, 1)), steps


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
        merge_kernel[(classes, triton.cdiv(shape[1], 32))](*segments, *moments, K=32, **options)
    return moments


def update_statistics(
    inputs: MomentsInputs, pending: ClassMoments, running: ClassMoments, momentum: float | None
) -> None:
    """Merge the moments of rows into float64 moments in place; into ``running`` with momentum."""
    with device_of(inputs.features):
        segments, options = _moments_of_segments(inputs)
        columns = update_columns(options["D"], options["SP"])
        fade = 0.0 if momentum is None else math.log1p(-momentum)
        update_kernel[(inputs.num_classes,)](
            *segments, *pending, *running, K=columns, FADE=fade, **options
        )


def _moments_of_segments(inputs: MomentsInputs) -> tuple[ClassMoments, dict[str, int]]:
    """Count, mean and m2 of segments of rows, and the options of the kernels that join them."""
    features, classes, soft = inputs.features.contiguous(), inputs.num_classes, _is_soft(inputs)
    rows, dim = features.shape
    target = inputs.target.to(torch.float32 if soft else torch.int64).contiguous()
    weight = None if inputs.weight is None else inputs.weight.to(torch.float32).contiguous()
    tile = moments_blocks(rows, dim, classes, soft)
    parts, segment, columns = tile["S"], tile["segment"], triton.cdiv(dim, tile["K"])
    segments = ClassMoments(
        features.new_empty((parts, classes), dtype=torch.float64),
        features.new_empty((parts, classes, dim), dtype=torch.float64),
        features.new_empty((parts, classes, dim), dtype=torch.float64),
    )
    found = None if soft else features.new_empty((parts, columns, segment), dtype=torch.int32)
    moments_kernel[(parts, columns)](
        features, target, weight, found, *segments, rows, segment,
        D=dim, C=classes, R=tile["R"], K=tile["K"], L=tile["L"], SOFT=soft,
        HAS_WEIGHT=weight is not None,
    )  # fmt: skip
    return segments, {"D": dim, "C": classes, "S": parts, "SP": triton.next_power_of_2(parts)}


def shift_features(inputs: ShiftInputs) -> Tensor:
    """Compute ``features + strength * noise``."""
    features, directions, soft = inputs.features.contiguous(), inputs.directions, _is_soft(inputs)
    rows, dim = features.shape
    target = inputs.target.to(torch.float32 if soft else torch.int64).contiguous()
    moved = features.new_empty(features.shape)
    if moved.numel() == 0:
        return moved
    tile = shift_blocks(dim)
    grid = (triton.cdiv(rows, tile["R"]), triton.cdiv(dim, tile["K"]))
    seed = inputs.seed.contiguous()
    row_ids = None if inputs.row_ids is None else inputs.row_ids.contiguous()
    options = {**_strength_options(inputs.strength), "SOFT": soft, "HAS_IDS": row_ids is not None}
    with device_of(features):
        if directions is not None:
            directions = directions.to(torch.float32).contiguous()
            classes, rank, _ = directions.shape
            combine_kernel[grid](
                features, target, directions, seed, row_ids, moved, rows, rank**-0.5,
                C=classes, RANK=rank, **tile, **options,
            )  # fmt: skip
        else:
            assert inputs.variance is not None
            spread = inputs.variance.to(torch.float32).contiguous()
            spread = spread if soft else spread.sqrt()  # once per class, not once per row
            shift_kernel[grid](
                features, target, spread, seed, row_ids, moved, rows,
                C=len(spread), **tile, **options,
            )  # fmt: skip
    return moved


def shifted_losses(inputs: ShiftedLossInputs) -> ShiftedLossResults:
    """Compute losses, and the gradient of each in its logits, in one sweep."""
    logits, strength = inputs.logits.contiguous(), _strength_options(inputs.strength)
    rows, classes = logits.shape
    results = ShiftedLossResults(
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(logits.shape if inputs.want_gradient else 0),
    )
    if rows == 0:
        return results
    tile = loss_blocks(classes)
    with device_of(logits):
        losses_kernel[(triton.cdiv(rows, tile["R"]),)](
            logits, inputs.target.contiguous(), inputs.table.contiguous(), *results, rows,
            GRADIENT=inputs.want_gradient, **tile, **strength,
        )  # fmt: skip
    return results


def shifted_cross_entropy(inputs: BoundInputs) -> BoundResults:
    """Compute the reduced loss, and the gradient of each row's loss in its logits."""
    logits, strength = inputs.logits.contiguous(), _strength_options(inputs.strength)
    rows, classes = logits.shape
    by_row, mean = inputs.reduction == "none", inputs.reduction == "mean"
    if rows == 0:
        return BoundResults(
            logits.new_zeros(0 if by_row else (), dtype=torch.float32),
            logits.new_empty(logits.shape if inputs.want_gradient else 0),
            logits.new_zeros((1, 2), dtype=torch.float32),
        )
    tile = bound_blocks(inputs.weight.shape[1], classes)
    parts, steps = bound_programs(rows, classes)
    results = BoundResults(
        logits.new_empty(rows if by_row else (), dtype=torch.float32),
        logits.new_empty(logits.shape if inputs.want_gradient else 0),
        logits.new_empty((parts, 2), dtype=torch.float32),
    )
    with device_of(logits):
        bound_kernel[(parts,)](
            logits, inputs.target.contiguous(), inputs.weight.contiguous(),
            inputs.variance.contiguous(), results.loss, results.sums, results.gradient, rows,
            steps=steps, ALONE=parts == 1, BY_ROW=by_row, MEAN=mean, GRADIENT=inputs.want_gradient,
            **tile, **strength,
        )  # fmt: skip
        if parts > 1 and not by_row:
            bound_sum_kernel[(1,)](results.sums, results.loss, parts, N=1024, MEAN=mean)
    return results


def shifted_cross_entropy_gradient(inputs: BoundGradientInputs) -> BoundGradients:
    """Compute the gradients of logits and weight from that of the reduced loss."""
    rows, classes = inputs.gradient.shape
    gradients = BoundGradients(
        inputs.gradient.new_empty(inputs.gradient.shape),
        inputs.weight.new_empty(inputs.weight.shape if inputs.want_weight else 0),
    )
    tile = bound_blocks(inputs.weight.shape[1], classes)
    columns = triton.cdiv(tile["D"], tile["K"]) if inputs.want_weight else 0
    programs = columns + triton.cdiv(rows, tile["R"])
    if programs == 0:
        return gradients
    with device_of(inputs.gradient):
        bound_gradient_kernel[(programs,)](
            inputs.gradient, inputs.target.contiguous(), inputs.weight.contiguous(),
            inputs.variance.contiguous(), inputs.outer.contiguous(), inputs.sums, *gradients, rows,
            T=columns, BY_ROW=inputs.reduction == "none", MEAN=inputs.reduction == "mean",
            **tile, **_strength_options(inputs.strength),
        )  # fmt: skip
    return gradients


def _is_soft(inputs: ShiftInputs | MomentsInputs) -> bool:
    """Return True for a target of posteriors, False for labels."""
    return inputs.target.dim() == 2


def _strength_options(strength: float | Tensor) -> dict[str, bool | int | float | Tensor]:
    """Return a kernel's arguments for a number, a tensor with one, or one per row."""
    if isinstance(strength, Tensor):
        return {"strength": strength.contiguous(), "IN_MEMORY": True, "STRIDE": strength.dim()}
    return {"strength": strength, "IN_MEMORY": False, "STRIDE": 0}
