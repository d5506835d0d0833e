"""The evidential operators in Triton; the formulas are those of README.md beside this file.

A program works on a block of rows, all their views, and one tile of classes at a time, as
(R, V, K) tensors. V is padded to a power of two; padded views have no evidence, which is neutral.
It sweeps over the classes twice: first sums and fusion, then the gradient, which reads the logits
again (from cache) instead of keeping all classes in registers.
"""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mics_kernels import coefficients
from mics_kernels.evidential.records import (
    EvidentialInputs,
    EvidentialResults,
    FusionGradientInputs,
    FusionInputs,
)
from mics_kernels.triton_common import (
    cdiv,
    constant,
    dense,
    device_of,
    launch,
    next_power_of_2,
    polynomial,
)

_H_REST = constant(coefficients.H_REST)
_DIGAMMA = constant(coefficients.DIGAMMA)
_TRIGAMMA = constant(coefficients.TRIGAMMA)
_H_SLOPE = constant(coefficients.H_SLOPE)
_LOG1P = constant(coefficients.LOG1P)
_LOG = constant(coefficients.LOG)

_ACTIVATIONS = {None: 0, "softplus": 1, "exp": 2, "relu": 3}


@triton.jit
def _reciprocal(a):
    """1 / a; a Newton step corrects the approximate hardware division."""
    t = 1.0 / a
    return t + t * (1.0 - a * t)


@triton.jit
def _log(x):
    """ln(x) for positive, normal x; tl.log errs by 2e-7, too much for the sums of a row."""
    pattern = x.to(tl.int32, bitcast=True)
    exponent = (pattern - 0x3F3504F3) >> 23
    f = (pattern - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    k = exponent.to(tl.float32)
    rest = f * f * (f * polynomial(f, _LOG) - 0.5)
    return k * 0.693359375 + (f + (rest - k * 2.12194440e-4))


@triton.jit
def _exp(x):
    """exp(x), constant below -87. tl.exp rounds x log2(e), an error of up to |x| 6e-8."""
    x = tl.where(x < -87.0, -87.0, x)  # not a maximum: NaN stays NaN
    n = tl.floor(x * 1.44269504 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4  # ln(2) in two parts
    return tl.exp2(n) * tl.exp(rest)


@triton.jit
def _rounded_off(e, t):
    """Error of ln(1 + e) from rounding 1 + e."""
    return tl.where(e < 1.0, (e - ((1.0 + e) - 1.0)) * t, 0.0)


@triton.jit
def _h_rest(one_minus_t, t):
    return one_minus_t * polynomial(t, _H_REST)


@triton.jit
def _h_slope(one_minus_t, t):
    return t * (1.0 - one_minus_t * polynomial(t, _H_SLOPE))


@triton.jit
def _digamma(a):
    t = _reciprocal(a)
    return _log(a) + t * polynomial(t, _DIGAMMA)


@triton.jit
def _trigamma(a):
    t = _reciprocal(a)
    return t * polynomial(t, _TRIGAMMA)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """Evidence, and its derivative."""
    if ACTIVATION == 1:
        q = _exp(-tl.abs(z))
        positive = 1.0 / (1.0 + q)
        # z + |z|, not a maximum: NaN stays NaN
        e = 0.5 * (z + tl.abs(z)) + q * polynomial(q, _LOG1P)
        slope = tl.where(z < 0.0, q * positive, positive)
    elif ACTIVATION == 2:
        inside = tl.where(z < -10.0, -10.0, tl.where(z > 10.0, 10.0, z))
        e = _exp(inside)
        slope = tl.where(inside == z, e, 0.0)
    elif ACTIVATION == 3:
        e = tl.where(z < 0.0, 0.0, z)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    else:
        e = z
        slope = z * 0.0 + 1.0
    return e, slope


@triton.jit
def _evidence(values, row, view, k, there, V: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr):
    """Evidence (R, V, K) and its derivative; 0 where a view is missing or there is no class."""
    mask = there[:, :, None] & (k < C)[None, None, :]
    place = (row[:, None, None] * V + view[None, :, None]) * C + k[None, None, :]
    z = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
    e, slope = _activate(z, ACT)
    return tl.where(mask, e, 0.0), slope


@triton.jit
def _target(labels, targets, row, inside, label, k, C: tl.constexpr, SOFT: tl.constexpr):
    """y (R, K): probabilities, or 1 at the label."""
    if SOFT:
        mask = inside[:, None] & (k < C)[None, :]
        y = tl.load(targets + row[:, None] * C + k[None, :], mask=mask, other=0.0)
    else:
        y = (label[:, None] == k[None, :]).to(tl.float32)
    return y


@triton.jit
def _both(a, b):
    """Dempster's rule on evidence / C; every term >= 0: nothing cancels."""
    return a + b + a * b


@triton.jit
def _class_terms(e, y, SOFT: tl.constexpr):
    """Summands of an opinion's loss over classes: (1 - y) e, h - 1, and the target's part."""
    wrong = (1.0 - y) * e
    t = _reciprocal(1.0 + wrong)
    h = 0.5 * (tl.log(1.0 + wrong) + _rounded_off(wrong, t)) + _h_rest(wrong * t, t)
    expected = y * _digamma(1.0 + e) if SOFT else y * e
    return wrong, h, expected


@triton.jit
def _judge(evidence, misleading, h, expected, mass, kl_weight, C: tl.constexpr, SOFT: tl.constexpr):
    """Loss of opinions from their sums, and the gradient terms that classes share."""
    flat = misleading * 0.0 + C
    flat_t = flat * 0.0 + 1.0 / C
    right = _trigamma(1.0 + expected)
    if not SOFT:
        expected = mass * _digamma(1.0 + expected)
    excess = misleading * (1.0 / C)
    strength = C + misleading
    t = _reciprocal(strength)
    rest = _h_rest(1.0 - t, t) - _h_rest(1.0 - flat_t, flat_t)
    rest += (C - 1) * (t * polynomial(t, _DIGAMMA) - flat_t * polynomial(flat_t, _DIGAMMA))
    log = _log(1.0 + excess) + _rounded_off(excess, _reciprocal(1.0 + excess))
    kl = (C - 0.5) * log + (rest - h)
    everything = C + evidence
    loss = mass * _digamma(everything) - expected + kl_weight * tl.where(kl < 0.0, 0.0, kl)
    # Two forms of one number, each where its terms do not cancel.
    psi1 = _trigamma(strength)
    far = (C - 1) * psi1 + _h_slope(1.0 - t, t)
    common = tl.where(excess < 1.0, 1.0 - misleading * psi1, far)
    return loss, mass * _trigamma(everything), right, common


@triton.jit
def _slope_of(strength, right, common, e, y, kl_weight, SOFT: tl.constexpr):
    """d loss / d evidence."""
    if SOFT:
        right = _trigamma(1.0 + e)
    wrong = (1.0 - y) * e
    t = _reciprocal(1.0 + wrong)
    return strength - y * right + kl_weight * (1.0 - y) * (common - _h_slope(wrong * t, t))


@triton.jit(do_not_specialize=["kl_weight", "ignore_index", "rows"])
def evidential_rows_kernel(
    values, labels, targets, present, weight, count, losses, fused, gradient,
    kl_weight, ignore_index, rows,
    V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    ACT: tl.constexpr, SOFT: tl.constexpr, FUSE: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_PRESENT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_COUNT: tl.constexpr,
    KL_IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """values (B, V, C), labels (B,) or targets (B, C), present (B, V), weight (B,), count (1,) ->
    losses (B,) or (B, V), fused (B, C), gradient (B, V, C)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    view = tl.arange(0, VP)
    inside = row < rows
    real = inside[:, None] & (view < V)[None, :]
    there = real
    if HAS_PRESENT:
        flags = tl.load(present + row[:, None] * V + view[None, :], mask=real, other=0)
        there = there & (flags != 0)
    any_view = tl.max(there.to(tl.int32), 1) > 0
    label = tl.zeros((R,), tl.int64)
    counted = inside
    mass = tl.zeros((R,), tl.float32)
    if not SOFT:
        label = tl.load(labels + row, mask=inside, other=0)
        counted = inside & (label != ignore_index)
        mass = ((label >= 0) & (label < C)).to(tl.float32)
    scale = tl.full((R,), 1.0, tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(weight + row, mask=inside, other=0.0)
    if HAS_COUNT:
        scale = scale / tl.load(count)
    if KL_IN_MEMORY:
        kl_weight = tl.load(kl_weight).to(tl.float32)

    evidence = tl.zeros((R, VP), tl.float32)
    misleading = tl.zeros((R, VP), tl.float32)
    h = tl.zeros((R, VP), tl.float32)
    expected = tl.zeros((R, VP), tl.float32)
    fused_evidence = tl.zeros((R,), tl.float32)
    fused_misleading = tl.zeros((R,), tl.float32)
    fused_h = tl.zeros((R,), tl.float32)
    fused_expected = tl.zeros((R,), tl.float32)
    # Summed up after the loop: Triton 3.6 cannot compile a sum of loaded values in it that is used
    # more than once behind it (assertion loopResult.hasOneUse()).
    shares = tl.zeros((R, K), tl.float32)
    for start in range(0, C, K):
        k = start + tl.arange(0, K)
        e, _ = _evidence(values, row, view, k, there, V, C, ACT)
        y = _target(labels, targets, row, inside, label, k, C, SOFT)
        wrong, h_part, right_part = _class_terms(e, y[:, None, :], SOFT)
        evidence += tl.sum(e, 2)
        misleading += tl.sum(wrong, 2)
        h += tl.sum(h_part, 2)
        expected += tl.sum(right_part, 2)
        if SOFT:
            shares += y
        if FUSE:
            f = C * tl.reduce(e * (1.0 / C), 1, _both)
            wrong, h_part, right_part = _class_terms(f, y, SOFT)
            fused_evidence += tl.sum(f, 1)
            fused_misleading += tl.sum(wrong, 1)
            fused_h += tl.sum(h_part, 1)
            fused_expected += tl.sum(right_part, 1)
            mask = inside[:, None] & (k < C)[None, :]
            tl.store(fused + row[:, None] * C + k[None, :], f, mask=mask)
    if SOFT:
        mass = tl.sum(shares, 1)

    loss, strength, right, common = _judge(
        evidence, misleading, h, expected, mass[:, None], kl_weight, C, SOFT
    )
    loss = tl.where(there & counted[:, None], loss * scale[:, None], 0.0)
    fused_strength, fused_right, fused_common = mass, mass, mass
    if FUSE:
        fused_loss, fused_strength, fused_right, fused_common = _judge(
            fused_evidence, fused_misleading, fused_h, fused_expected, mass, kl_weight, C, SOFT
        )
        total = tl.sum(loss, 1) + tl.where(any_view & counted, fused_loss * scale, 0.0)
        tl.store(losses + row, total, mask=inside)
    else:
        tl.store(losses + row[:, None] * V + view[None, :], loss, mask=real)

    if GRADIENT:
        for start in range(0, C, K):
            k = start + tl.arange(0, K)
            e, slope = _evidence(values, row, view, k, there, V, C, ACT)
            y = _target(labels, targets, row, inside, label, k, C, SOFT)
            g = _slope_of(
                strength[:, :, None], right[:, :, None], common[:, :, None],
                e, y[:, None, :], kl_weight, SOFT,
            )  # fmt: skip
            if FUSE:
                f = tl.reduce(e * (1.0 / C), 1, _both)
                fused_g = _slope_of(
                    fused_strength[:, None], fused_right[:, None], fused_common[:, None],
                    f * C, y, kl_weight, SOFT,
                )  # fmt: skip
                g += fused_g[:, None, :] * ((1.0 + f[:, None, :]) / (1.0 + e * (1.0 / C)))
            keep = (there & counted[:, None])[:, :, None]
            g = tl.where(keep, g * slope * scale[:, None, None], 0.0)
            place = (row[:, None, None] * V + view[None, :, None]) * C + k[None, None, :]
            mask = real[:, :, None] & (k < C)[None, None, :]
            tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def count_kernel(labels, count, ignore_index, rows, BLOCK: tl.constexpr):
    """Number of labels (B,) that are not ignored, at least 1: one float32, from one program."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        label = tl.load(labels + row, mask=row < rows, other=ignore_index)
        total += (label != ignore_index).to(tl.int32)
    tl.store(count, tl.maximum(tl.sum(total, 0), 1).to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def fuse_kernel(
    evidence, present, fused, outer, gradient, rows,
    V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    HAS_PRESENT: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """evidence (B, V, C), present (B, V) -> fused (B, C), or with outer (B, C) -> gradient."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    view = tl.arange(0, VP)
    k = tl.program_id(1) * K + tl.arange(0, K)
    inside = row < rows
    real = inside[:, None] & (view < V)[None, :]
    there = real
    if HAS_PRESENT:
        flags = tl.load(present + row[:, None] * V + view[None, :], mask=real, other=0)
        there = there & (flags != 0)
    e, _ = _evidence(evidence, row, view, k, there, V, C, 0)
    f = tl.reduce(e * (1.0 / C), 1, _both)
    place = row[:, None] * C + k[None, :]
    mask = inside[:, None] & (k < C)[None, :]
    if GRADIENT:
        arriving = tl.load(outer + place, mask=mask, other=0.0)
        g = arriving[:, None, :] * ((1.0 + f[:, None, :]) / (1.0 + e * (1.0 / C)))
        g = tl.where(there[:, :, None], g, 0.0).to(gradient.dtype.element_ty)
        wide = (row[:, None, None] * V + view[None, :, None]) * C + k[None, None, :]
        tl.store(gradient + wide, g, mask=real[:, :, None] & (k < C)[None, None, :])
    else:
        tl.store(fused + place, f * C, mask=mask)


def blocks(views: int, classes: int) -> dict[str, int]:
    """Return a program's tile: 512 elements of (rows, padded views, classes) fit its registers.

    Rows of many classes take several steps; a tile has at most 128 rows.
    """
    padded = next_power_of_2(views)
    tile = min(next_power_of_2(classes), 256)
    return {
        "V": views,
        "VP": padded,
        "C": classes,
        "R": max(1, min(128, 512 // (padded * tile))),
        "K": tile,
    }


def loss_and_gradient(inputs: EvidentialInputs) -> EvidentialResults:
    """Compute losses, fused evidence and the gradient of the losses' sum."""
    values, kl_weight = inputs.values.contiguous(), inputs.kl_weight
    rows, classes = values.shape[0], values.shape[-1]
    views = values.shape[1] if values.dim() == 3 else 1
    fuse, soft = inputs.activation is not None, inputs.target.dim() == 2
    target = dense(inputs.target, torch.float32 if soft else torch.int64)
    present = None if inputs.present is None else inputs.present.contiguous()
    weight = None if inputs.weight is None else dense(inputs.weight, torch.float32)
    results = EvidentialResults(
        values.new_empty((rows,) if fuse else values.shape[:-1], dtype=torch.float32),
        values.new_empty((rows, classes) if fuse else 0, dtype=torch.float32),
        values.new_empty(values.shape if inputs.want_gradient else 0),
    )
    if rows == 0:
        return results
    tile = blocks(views, classes)
    with device_of(values):
        count = _count(target, inputs.ignore_index) if inputs.reduction == "mean" else None
        launch(
            evidential_rows_kernel, (cdiv(rows, tile["R"]),),
            (values, target, target, present, weight, count, *results,
             kl_weight, inputs.ignore_index, rows), **tile,
            ACT=_ACTIVATIONS[inputs.activation], SOFT=soft, FUSE=fuse,
            GRADIENT=inputs.want_gradient,
            HAS_PRESENT=present is not None, HAS_WEIGHT=weight is not None,
            HAS_COUNT=count is not None, KL_IN_MEMORY=isinstance(kl_weight, Tensor),
            enable_fp_fusion=True,
        )  # fmt: skip
    return results


def fuse_evidence(inputs: FusionInputs) -> Tensor:
    """Fuse evidence by Dempster's rule: (B, C) float32."""
    rows, _, classes = inputs.evidence.shape
    fused = inputs.evidence.new_empty((rows, classes), dtype=torch.float32)
    _launch_fuse(inputs, fused, None, None)
    return fused


def fuse_evidence_gradient(inputs: FusionGradientInputs) -> Tensor:
    """Compute the gradient of the evidence from that of the fused evidence."""
    gradient = inputs.evidence.new_empty(inputs.evidence.shape)
    _launch_fuse(inputs, None, inputs.outer.contiguous(), gradient)
    return gradient


def _launch_fuse(
    inputs: FusionInputs | FusionGradientInputs,
    fused: Tensor | None,
    outer: Tensor | None,
    gradient: Tensor | None,
) -> None:
    rows, views, classes = inputs.evidence.shape
    if rows == 0:
        return
    evidence = inputs.evidence.contiguous()
    present = None if inputs.present is None else inputs.present.contiguous()
    tile = blocks(views, classes)
    grid = (cdiv(rows, tile["R"]), cdiv(classes, tile["K"]))
    with device_of(evidence):
        launch(
            fuse_kernel, grid, (evidence, present, fused, outer, gradient, rows), **tile,
            HAS_PRESENT=present is not None, GRADIENT=gradient is not None,
        )  # fmt: skip


def _count(target: Tensor, ignore_index: int) -> Tensor:
    count = target.new_empty(1, dtype=torch.float32)
    if target.dim() == 2:
        return count.fill_(len(target))
    launch(count_kernel, (1,), (target, count, ignore_index, len(target)), BLOCK=1024)
    return count
