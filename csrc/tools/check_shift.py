"""What the Triton kernels of the shift take of a chip."""

from __future__ import annotations

from compiled import Check, Usage, simple_usage

from mics_kernels.shift import triton_kernels as shift_kernels


def checks(capability: int) -> list[Check]:
    """Every kernel for a chip."""
    rows = [Check("merge of moments", merge_usage, (capability,))]
    for dtype in ("bf16", "fp32"):
        for soft in (False, True):
            name, given = (
                f"{dtype}, {'posteriors' if soft else 'labels'}",
                (capability, dtype, soft),
            )
            rows += [
                Check(f"shift, {name}", shift_usage, given),
                Check(f"directions, {name}", combine_usage, given),
                Check(f"moments, {name}", moments_usage, given),
            ]
        for classes in (8, 1000):
            name = f"shifted loss, {dtype}, C={classes}"
            rows.append(Check(name, shifted_loss_usage, (capability, dtype, classes)))
    return rows


def shift_usage(capability: int, dtype: str, soft: bool) -> Usage:
    """Of the shift, D = 768."""
    kernel = shift_kernels.shift_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "moved": f"*{dtype}", "spread": "*fp32"}
    signature |= {"target": "*fp32" if soft else "*i64", "seed": "*i64", "row_ids": "*i64"}
    signature |= {"rows": "i32", "strength": "*fp32"}
    constants = shift_kernels.shift_blocks(768) | {"C": 8, "SOFT": soft, "HAS_IDS": True}
    constants |= {"IN_MEMORY": True, "STRIDE": 1}
    return simple_usage(capability, kernel, signature, constants)


def combine_usage(capability: int, dtype: str, soft: bool) -> Usage:
    """Of the shift along 64 directions."""
    kernel = shift_kernels.combine_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "moved": f"*{dtype}", "directions": "*fp32"}
    signature |= {"target": "*fp32" if soft else "*i64", "seed": "*i64", "row_ids": "*i64"}
    signature |= {"rows": "i32", "scale": "fp32", "strength": "*fp32"}
    constants = shift_kernels.shift_blocks(768) | {"C": 8, "RANK": 64, "SOFT": soft}
    constants |= {"HAS_IDS": True, "IN_MEMORY": True, "STRIDE": 1}
    return simple_usage(capability, kernel, signature, constants)


def moments_usage(capability: int, dtype: str, soft: bool) -> Usage:
    """Of the moments of 8 classes."""
    kernel = shift_kernels.moments_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "target": "*fp32" if soft else "*i64"}
    signature |= dict.fromkeys(("counts", "means", "m2s"), "*fp64") | {"weight": "*fp32"}
    signature |= {"rows": "i32", "segment": "i32"}
    block = shift_kernels.moments_blocks(65536, 768, 8)
    constants = {"D": 768, "C": 8, "R": block["R"], "K": block["K"]}
    constants |= {"SOFT": soft, "HAS_WEIGHT": True}
    return simple_usage(capability, kernel, signature, constants)


def merge_usage(capability: int) -> Usage:
    """Of the merge of 64 segments."""
    kernel = shift_kernels.merge_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("counts", "means", "m2s", "count"), "*fp64")
    signature |= {"mean": "*fp32", "m2": "*fp32"}
    constants = {"D": 768, "C": 8, "S": 64, "SP": 64, "T": 12, "K": 32}
    return simple_usage(capability, kernel, signature, constants)


def shifted_loss_usage(capability: int, dtype: str, classes: int) -> Usage:
    """Of the shifted cross-entropy."""
    kernel = shift_kernels.losses_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"logits": f"*{dtype}", "gradient": f"*{dtype}", "target": "*i64"}
    signature |= dict.fromkeys(("table", "losses", "strength"), "*fp32") | {"rows": "i32"}
    constants = {**shift_kernels.loss_blocks(classes), "GRADIENT": True}
    constants |= {"IN_MEMORY": True, "STRIDE": 1}
    return simple_usage(capability, kernel, signature, constants)
