"""Compile the evidential GPU kernels for sm_80, 90, 100 and 120, and refuse register spills.

Needs no GPU: Triton makes cubins for any target, nvcc likewise.

    python csrc/tools/check_kernels.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mics_kernels.evidential import triton_kernels

CSRC = Path(__file__).resolve().parents[1]
CAPABILITIES = (80, 90, 100, 120)
SHAPES = ((1, 2), (3, 8), (8, 8), (3, 64))  # views, classes; spills are refused up to C = 64


def triton_usage(capability: int, views: int, classes: int) -> tuple[int, int]:
    """Registers and stack bytes of the loss kernel; stack above 0 is spilling."""
    kernel = triton_kernels.evidential_rows_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("values", "gradient", "targets", "weight"), "*fp32")
    signature |= dict.fromkeys(("count", "losses", "fused"), "*fp32")
    signature |= {"labels": "*i64", "present": "*u8", "kl_weight": "fp32"}
    signature |= {"ignore_index": "i64", "rows": "i32"}
    flags = ("FUSE", "GRADIENT", "HAS_PRESENT", "HAS_WEIGHT", "HAS_COUNT")
    constants = triton_kernels.blocks(views, classes) | dict.fromkeys(flags, True)
    constants |= {"ACT": 1, "SOFT": False, "KL_IN_MEMORY": False}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def cuda_usage(capability: int) -> tuple[int, int]:
    """Most registers, and bytes spilled, of all CUDA kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{capability}", "-Xptxas=-v", "-c"]
        command += [str(CSRC / "evidential_cuda.cu"), "-o", f"{folder}/kernels.o"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    return max(registers), sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))


def main() -> int:
    """Print a table; exit status 1 where a kernel spills."""
    spilled = 0
    for capability in CAPABILITIES:
        rows = [(f"cuda, all kernels, sm_{capability}", cuda_usage(capability))]
        for views, classes in SHAPES:
            name = f"triton, V={views} C={classes}, sm_{capability}"
            rows.append((name, triton_usage(capability, views, classes)))
        for name, (registers, stack) in rows:
            print(f"{name:34} {registers:4} registers, {stack} bytes spilled", flush=True)
            spilled += stack
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
