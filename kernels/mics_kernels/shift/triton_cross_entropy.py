"""Shifted cross-entropy in Triton; formulas: README.md beside this file.

``losses_kernel`` reads a table of classes and logits that torch has computed. For few classes,
``bound_kernel`` makes its own and reduces the losses: one kernel each way.
The order of sums depends on shapes alone, without atomics: every run gives the same bits.
"""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mics_kernels.shift.records import (
    BoundGradientInputs,
    BoundGradients,
    BoundInputs,
    BoundResults,
    ShiftedLossInputs,
    ShiftedLossResults,
)
from mics_kernels.shift.triton_shift import row_strength, strength_options
from mics_kernels.triton_common import (
    cdiv,
    device_of,
    launch,
    next_power_of_2,
)

# --- With a given table ---------------------------------------------------------------------------


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
    scale = row_strength(strength, row, inside, IN_MEMORY, STRIDE)
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


# --- With its own table, one kernel each way ------------------------------------------------------


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
        scale = row_strength(strength, row, inside, IN_MEMORY, STRIDE)
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
            size = row_strength(strength, row, inside, IN_MEMORY, STRIDE)
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


def loss_blocks(classes: int) -> dict[str, int]:
    """Return the tile of the shifted cross-entropy: 1,024 logits, in whole rows if they fit."""
    block = min(next_power_of_2(classes), 1024)
    return {"C": classes, "R": 1024 // block, "K": block}


def bound_blocks(dim: int, classes: int) -> dict[str, int]:
    """Return the tile of the shifted cross-entropy with its table.

    A block of rows meets the table as (R, CP, CP), a block of columns as (CP, CP, K).
    """
    padded = next_power_of_2(classes)
    block = max(1, min(2048 // padded**2, 128))
    columns = max(1, min(2048 // padded**2, 64, next_power_of_2(dim)))
    return {"D": dim, "C": classes, "CP": padded, "R": block, "K": columns}


def bound_programs(rows: int, classes: int) -> tuple[int, int]:
    """Return programs and blocks of each; one takes up to 256 rows, as most batches have."""
    block = bound_blocks(1, classes)["R"]
    steps = min(cdiv(256, block), cdiv(rows, block))
    return cdiv(rows, block * max(steps, 1)), steps


def shifted_losses(inputs: ShiftedLossInputs) -> ShiftedLossResults:
    """Compute losses, and the gradient of each in its logits, in one sweep."""
    logits, (strength, options) = inputs.logits.contiguous(), strength_options(inputs.strength)
    rows, classes = logits.shape
    results = ShiftedLossResults(
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(logits.shape if inputs.want_gradient else 0),
    )
    if rows == 0:
        return results
    tile = loss_blocks(classes)
    with device_of(logits):
        launch(
            losses_kernel, (cdiv(rows, tile["R"]),),
            (logits, inputs.target.contiguous(), inputs.table.contiguous(), *results, rows,
             strength),
            GRADIENT=inputs.want_gradient, **tile, **options,
        )  # fmt: skip
    return results


def shifted_cross_entropy(inputs: BoundInputs) -> BoundResults:
    """Compute the reduced loss, and the gradient of each row's loss in its logits."""
    logits, (strength, options) = inputs.logits.contiguous(), strength_options(inputs.strength)
    rows, classes = logits.shape
    by_row, mean = inputs.reduction == "none", inputs.reduction == "mean"
    if rows == 0:
        return BoundResults(
            logits.new_zeros(0 if by_row else (), dtype=torch.float32),
            logits.new_empty(logits.shape if inputs.want_gradient else 0),
            logits.new_zeros((0 if by_row else 1, 2), dtype=torch.float32),
        )
    tile = bound_blocks(inputs.weight.shape[1], classes)
    parts, steps = bound_programs(rows, classes)
    results = BoundResults(
        logits.new_empty(rows if by_row else (), dtype=torch.float32),
        logits.new_empty(logits.shape if inputs.want_gradient else 0),
        logits.new_empty((0 if by_row else parts, 2), dtype=torch.float32),
    )
    with device_of(logits):
        launch(
            bound_kernel, (parts,),
            (logits, inputs.target.contiguous(), inputs.weight.contiguous(),
             inputs.variance.contiguous(), results.loss, results.sums, results.gradient, rows,
             strength, steps),
            ALONE=parts == 1, BY_ROW=by_row, MEAN=mean, GRADIENT=inputs.want_gradient,
            **tile, **options,
        )  # fmt: skip
        if parts > 1 and not by_row:
            launch(bound_sum_kernel, (1,), (results.sums, results.loss, parts), N=1024, MEAN=mean)
    return results


def shifted_cross_entropy_gradient(inputs: BoundGradientInputs) -> BoundGradients:
    """Compute the gradients of logits and weight from that of the reduced loss."""
    rows, classes = inputs.gradient.shape
    gradients = BoundGradients(
        inputs.gradient.new_empty(inputs.gradient.shape),
        inputs.weight.new_empty(inputs.weight.shape if inputs.want_weight else 0),
    )
    tile = bound_blocks(inputs.weight.shape[1], classes)
    strength, options = strength_options(inputs.strength)
    columns = cdiv(tile["D"], tile["K"]) if inputs.want_weight else 0
    programs = columns + cdiv(rows, tile["R"])
    if programs == 0:
        return gradients
    with device_of(inputs.gradient):
        launch(
            bound_gradient_kernel, (programs,),
            (inputs.gradient, inputs.target.contiguous(), inputs.weight.contiguous(),
             inputs.variance.contiguous(), inputs.outer.contiguous(), inputs.sums, *gradients, rows,
             strength),
            T=columns, BY_ROW=inputs.reduction == "none", MEAN=inputs.reduction == "mean",
            **tile, **options,
        )  # fmt: skip
    return gradients
