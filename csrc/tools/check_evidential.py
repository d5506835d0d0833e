"""What the evidential GPU kernels take of a chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from compiled import Check, Usage, simple_usage

from mics_kernels.evidential import triton_kernels

CSRC = Path(__file__).resolve().parents[1]
SHAPES = ((1, 2), (3, 8), (8, 8), (3, 64))  # views, classes; spills are refused up to C = 64


def checks(capability: int) -> list[Check]:
    """Every kernel for a chip."""
    rows = [Check("evidential, CUDA, most of all", cuda_usage, (capability,))]
    for views, classes in SHAPES:
        name = f"evidential, V={views} C={classes}"
        rows.append(Check(name, triton_usage, (capability, views, classes)))
    return rows


def triton_usage(capability: int, views: int, classes: int) -> Usage:
    """Of the loss kernel in Triton."""
    kernel = triton_kernels.evidential_rows_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("values", "gradient", "targets", "weight"), "*fp32")
    signature |= dict.fromkeys(("count", "losses", "fused"), "*fp32")
    signature |= {"labels": "*i64", "present": "*u8", "kl_weight": "fp32"}
    signature |= {"ignore_index": "i64", "rows": "i32"}
    flags = ("FUSE", "GRADIENT", "HAS_PRESENT", "HAS_WEIGHT", "HAS_COUNT")
    constants = triton_kernels.blocks(views, classes) | dict.fromkeys(flags, True)
    constants |= {"ACT": 1, "SOFT": False, "KL_IN_MEMORY": False}
    return simple_usage(capability, kernel, signature, constants)


def cuda_usage(capability: int) -> Usage:
    """Most registers, bytes spilled, and most shared memory of all CUDA kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{capability}", "-Xptxas=-v", "-c"]
        command += [str(CSRC / "evidential_cuda.cu"), "-o", f"{folder}/kernels.o"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    shared = [0, *(int(n) for n in re.findall(r"(\d+) bytes smem", text))]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    return Usage(max(registers), spilled, max(shared))
