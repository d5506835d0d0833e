"""Checks of the shift's Triton kernels."""

from __future__ import annotations

from typing import Any

from bench import roofline
from mics_kernels.shift import triton_cross_entropy, triton_moments, triton_shift
from tools.check_kernels.compiled import Check, Usage, most_of, simply_compiled, usage_of
from tools.check_kernels.counts import operations, total, wide
from tools.check_kernels.sass import disassembled, innermost

THREADS = 128  # of a program with four warps
MOMENTS_INSTRUCTIONS = 25
"""Maximum instructions per element of the class moments on sm_90."""


def checks(capability: int) -> list[Check]:
    """List every kernel for a chip."""
    rows = [
        Check("merge of moments", f"{segments} segments", joining_usage, (capability, segments))
        for segments in (1, 64)
    ]
    for dtype in ("bf16", "fp32"):
        for soft in (False, True):
            name, given = (
                f"{dtype}, {'posteriors' if soft else 'labels'}",
                (capability, dtype, soft),
            )
            rows += [
                Check("shift", name, shift_usage, given),
                Check("directions", name, combine_usage, given),
                Check("moments", name, moments_usage, given),
            ]
        for classes in (8, 32):
            sizes = (capability, dtype, classes)
            rows.append(Check("bound", f"{dtype}, C={classes}", bound_usage, sizes))
        for classes in (8, 1000):
            sizes = (capability, dtype, classes)
            rows.append(Check("shifted loss", f"{dtype}, C={classes}", shifted_loss_usage, sizes))
    return rows


def shift_usage(capability: int, dtype: str, soft: bool) -> Usage:
    """Measure the shift, D = 768.

    Raises:
        AssertionError: it does not move features in 16-byte accesses, or moves or computes other
            amounts than the roofline model.
    """
    kernel = triton_shift.shift_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "moved": f"*{dtype}", "spread": "*fp32"}
    signature |= {"target": "*fp32" if soft else "*i64", "seed": "*i64", "row_ids": "*i64"}
    signature |= {"rows": "i32", "strength": "*fp32"}
    constants = triton_shift.shift_blocks(768) | {"C": 8, "SOFT": soft, "HAS_IDS": True}
    constants |= {"IN_MEMORY": True, "STRIDE": 1}
    compiled = simply_compiled(capability, kernel, signature, constants)
    code = compiled.asm["ptx"]
    assert wide(code, "ld") and wide(code, "st"), (capability, dtype, soft)
    if not soft:
        check_shift_counts(compiled.asm["ttir"], constants["R"] * constants["K"], dtype)
    return usage_of(compiled)


def check_shift_counts(ttir: str, elements: int, dtype: str) -> None:
    """Check a program that handles ``elements`` features against the roofline model.

    It must read and write each feature once, and read its deviation from a table that stays in the
    cache. Its FLOPs must be at least the model's, and less than twice as many.
    """
    size = 2 if dtype == "bf16" else 4
    more, less = (roofline.shift(batch, 768, 8, size) for batch in (2, 1))
    found = list(operations(ttir))
    moved = total(found, "load", rank=2) + total(found, "store", rank=2) - 4 * elements
    assert moved * 768 == elements * (more.bytes - less.bytes - 8), (moved, elements)
    ratio = total(found, "float") * 768 / (elements * (more.flops - less.flops))
    assert 1 <= ratio < 2, ratio


def combine_usage(capability: int, dtype: str, soft: bool) -> Usage:
    """Measure the shift along 64 directions."""
    kernel = triton_shift.combine_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "moved": f"*{dtype}", "directions": "*fp32"}
    signature |= {"target": "*fp32" if soft else "*i64", "seed": "*i64", "row_ids": "*i64"}
    signature |= {"rows": "i32", "scale": "fp32", "strength": "*fp32"}
    constants = triton_shift.shift_blocks(768) | {"C": 8, "RANK": 64, "SOFT": soft}
    constants |= {"HAS_IDS": True, "IN_MEMORY": True, "STRIDE": 1}
    return usage_of(simply_compiled(capability, kernel, signature, constants))


def moments_usage(capability: int, dtype: str, soft: bool) -> Usage:
    """Measure the moments of 8 classes, D = 768.

    Raises:
        AssertionError: it reads its features more than once per class, or takes too many
            instructions.
    """
    kernel = triton_moments.moments_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "target": "*fp32" if soft else "*i64", "found": "*i32"}
    signature |= dict.fromkeys(("counts", "means", "m2s"), "*fp64")
    signature |= {"rows": "i32", "segment": "i32"}
    rows, dim, classes = 65536, 768, 8
    block = triton_moments.moments_blocks(rows, dim, classes, soft)
    constants: dict[str, Any] = {
        "D": dim,
        "C": classes,
        "R": block["R"],
        "K": block["K"],
        "L": block["L"],
    }
    constants |= {"SOFT": soft, "HAS_WEIGHT": soft}
    if soft:
        signature |= {"found": "constexpr", "weight": "*fp32"}
        constants |= {"found": None}
    else:
        constants |= {"weight": None}
    compiled = simply_compiled(capability, kernel, signature, constants)
    found = list(operations(compiled.asm["ttir"]))
    size = 2 if dtype == "bf16" else 4
    assert total(found, "load", rank=2, depth=2) == block["R"] * block["K"] * size
    assert total(found, "load", rank=2) == total(found, "load", rank=2, depth=2)
    if capability == 90 and not soft:
        listing, merging = innermost(disassembled(compiled))
        # Classes of one size, whose last step is half empty on average.
        steps = block["segment"] / classes / block["R"] + 0.5
        of_class = listing * block["segment"] / block["L"] + merging * steps
        each = classes * of_class / (block["segment"] * block["K"] / THREADS)
        assert each <= MOMENTS_INSTRUCTIONS, (dtype, listing, merging, each)
    return usage_of(compiled)


def joining_usage(capability: int, segments: int) -> Usage:
    """Measure the two kernels that join segments: into moments, and into statistics."""
    padded = 1 << (segments - 1).bit_length()
    segment = dict.fromkeys(("counts", "means", "m2s"), "*fp64")
    constants: dict[str, Any] = {"D": 768, "C": 8, "S": segments, "SP": padded}
    kernels = (
        (
            triton_moments.merge_kernel,
            {"count": "*fp64", "mean": "*fp32", "m2": "*fp32"},
            {"K": 32},
        ),
        (
            triton_moments.update_kernel,
            dict.fromkeys(triton_moments.update_kernel.arg_names[3:9], "*fp64"),
            {"K": triton_moments.update_columns(768, padded), "FADE": -0.01},
        ),
    )
    usages = []
    for kernel, results, own in kernels:
        signature = dict.fromkeys(kernel.arg_names, "constexpr") | segment | results
        usages.append(usage_of(simply_compiled(capability, kernel, signature, constants | own)))
    return most_of(usages)


def shifted_loss_usage(capability: int, dtype: str, classes: int) -> Usage:
    """Measure the shifted cross-entropy."""
    kernel = triton_cross_entropy.losses_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"logits": f"*{dtype}", "gradient": f"*{dtype}", "target": "*i64"}
    signature |= dict.fromkeys(("table", "losses", "strength"), "*fp32") | {"rows": "i32"}
    constants = {**triton_cross_entropy.loss_blocks(classes), "GRADIENT": True}
    constants |= {"IN_MEMORY": True, "STRIDE": 1}
    return usage_of(simply_compiled(capability, kernel, signature, constants))


def bound_usage(capability: int, dtype: str, classes: int) -> Usage:
    """Measure the shifted cross-entropy that makes its table, forward and backward."""
    tile = triton_cross_entropy.bound_blocks(768, classes)
    common = {"BY_ROW": False, "MEAN": True, "IN_MEMORY": True, "STRIDE": 1} | tile
    numbers = dict.fromkeys(("rows", "steps"), "i32")
    usages = []
    for kernel, own in (
        (triton_cross_entropy.bound_kernel, {"ALONE": True, "GRADIENT": True}),
        (triton_cross_entropy.bound_gradient_kernel, {"T": 24}),
    ):
        names = kernel.arg_names
        constants: dict[str, Any] = common | own
        signature = {name: "constexpr" if name in constants else "*fp32" for name in names}
        signature |= {"target": "*i64"} | {n: kind for n, kind in numbers.items() if n in names}
        halves = ("logits", "gradient", "of_logits")
        signature |= {name: f"*{dtype}" for name in halves if name in names}
        usages.append(usage_of(simply_compiled(capability, kernel, signature, constants)))
    return most_of(usages)
