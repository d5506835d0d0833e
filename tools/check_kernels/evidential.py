"""Checks of the evidential Triton kernel and of every CUDA kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from bench import roofline
from mics_kernels.evidential import triton_kernels
from tools.check_kernels.compiled import Check, Usage, simply_compiled, usage_of
from tools.check_kernels.counts import operations, total

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SHAPES = ((1, 2), (3, 8), (8, 8), (3, 64))  # views, classes; no spills allowed up to C = 64


def checks(capability: int) -> list[Check]:
    """List every kernel for a chip."""
    rows = [
        Check(source.name, "most of all", cuda_usage, (capability, source.name))
        for source in sorted(CSRC.glob("*.cu"))
    ]
    for views, classes in SHAPES:
        detail = f"V={views} C={classes}"
        rows.append(Check("evidential", detail, triton_usage, (capability, views, classes, False)))
    # Probabilities, in a loop over classes, which Triton 3.6 once failed to compile.
    rows.append(Check("evidential", "V=3 C=300 soft", triton_usage, (capability, 3, 300, True)))
    return rows


def triton_usage(capability: int, views: int, classes: int, soft: bool) -> Usage:
    """Measure the loss kernel in Triton.

    Raises:
        AssertionError: for labels, it moves or computes other amounts than the roofline model;
            logits may be read once more, from the cache, for the gradient.
    """
    kernel = triton_kernels.evidential_rows_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("values", "gradient", "targets", "weight"), "*fp32")
    signature |= dict.fromkeys(("count", "losses", "fused"), "*fp32")
    signature |= {"labels": "*i64", "present": "*u8", "kl_weight": "fp32"}
    signature |= {"ignore_index": "i64", "rows": "i32"}
    flags = ("FUSE", "GRADIENT", "HAS_PRESENT", "HAS_WEIGHT", "HAS_COUNT")
    constants = triton_kernels.blocks(views, classes) | dict.fromkeys(flags, True)
    constants |= {"ACT": 1, "SOFT": soft, "KL_IN_MEMORY": False}
    compiled = simply_compiled(capability, kernel, signature, constants)
    if soft:
        return usage_of(compiled)
    found = list(operations(compiled.asm["ttir"]))
    rows, padded = constants["R"], constants["VP"]
    work = roofline.evidential(rows, padded, classes, fuse=True, judge=True)
    fused = 4 * rows * classes
    moved = total(found, "load", rank=3) / 2 + total(found, "store", rank=3) + fused
    assert moved == work.bytes - 8 * rows, (views, classes, moved, work)
    assert fused <= total(found, "store", rank=2) - total(found, "store", rank=3)
    if classes >= 8:  # below, costs per row outweigh costs per class
        ratio = total(found, "float") / work.flops
        assert 1 <= ratio < 4, (views, classes, ratio)
    return usage_of(compiled)


def cuda_usage(capability: int, source: str) -> Usage:
    """Return maximum registers, spilled bytes and maximum shared memory of a file's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{capability}", "-Xptxas=-v", "-c"]
        command += [str(CSRC / source), "-o", f"{folder}/kernels.o"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    shared = [0, *(int(n) for n in re.findall(r"(\d+) bytes smem", text))]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    return Usage(max(registers), spilled, max(shared))
