"""Shift of features in Triton; formulas: README.md beside this file.

A program works on R rows and K columns, and draws their random numbers from row id and column.
"""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mics_kernels import coefficients
from mics_kernels.shift.records import ShiftInputs
from mics_kernels.triton_common import (
    cdiv,
    constant,
    dense,
    device_of,
    launch,
    next_power_of_2,
    polynomial,
)

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
def row_strength(strength, row, inside, IN_MEMORY: tl.constexpr, STRIDE: tl.constexpr):
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
    scale = row_strength(strength, row, inside, IN_MEMORY, STRIDE)
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
    own = row_strength(strength, row, inside, IN_MEMORY, STRIDE) * scale
    out = x.to(tl.float32) + own[:, None] * total
    tl.store(
        moved + place, tl.where(is_class[:, None], out.to(moved.dtype.element_ty), x), mask=mask
    )


# --- Launches ---------------------------------------------------------------------------------


def shift_blocks(dim: int) -> dict[str, int]:
    """Return the shift's tile: 4,096 elements, 32 per thread, share work per row and column.

    The number of columns is a power of two, one that divides D where possible.
    """
    block = dim & -dim
    if block < 32:
        block = next_power_of_2(dim)
    block = max(4, min(block, 256))
    return {"D": dim, "R": 4096 // block, "K": block}


def shift_features(inputs: ShiftInputs) -> Tensor:
    """Compute ``features + strength * noise``."""
    features, directions = inputs.features.contiguous(), inputs.directions
    soft = inputs.target.dim() == 2
    rows, dim = features.shape
    target = dense(inputs.target, torch.float32 if soft else torch.int64)
    moved = features.new_empty(features.shape)
    if moved.numel() == 0:
        return moved
    tile = shift_blocks(dim)
    grid = (cdiv(rows, tile["R"]), cdiv(dim, tile["K"]))
    seed = inputs.seed.contiguous()
    row_ids = None if inputs.row_ids is None else inputs.row_ids.contiguous()
    strength, options = strength_options(inputs.strength)
    options = {**options, **tile, "SOFT": soft, "HAS_IDS": row_ids is not None}
    with device_of(features):
        if directions is not None:
            directions = dense(directions, torch.float32)
            classes, rank, _ = directions.shape
            launch(
                combine_kernel, grid,
                (features, target, directions, seed, row_ids, moved, rows, rank**-0.5, strength),
                C=classes, RANK=rank, **options,
            )  # fmt: skip
        else:
            assert inputs.variance is not None
            spread = dense(inputs.variance, torch.float32)
            spread = spread if soft else spread.sqrt()  # once per class, not once per row
            launch(
                shift_kernel, grid,
                (features, target, spread, seed, row_ids, moved, rows, strength),
                C=len(spread), **options,
            )  # fmt: skip
    return moved


def strength_options(strength: float | Tensor) -> tuple[float | Tensor, dict[str, Any]]:
    """Return a kernel's argument for a number, a tensor with one, or one per row; its constants."""
    if isinstance(strength, Tensor):
        return strength.contiguous(), {"IN_MEMORY": True, "STRIDE": strength.dim()}
    return strength, {"IN_MEMORY": False, "STRIDE": 0}
