"""Compile the GPU kernels for sm_80, 90, 100 and 120, and refuse register spills.

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
from mics_kernels.shift import triton_kernels as shift_kernels

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
    return usage_of(kernel, signature, constants, capability)


def shift_usage(capability: int, dtype: str, soft: bool) -> tuple[int, int]:
    """The same of the shift, D = 768."""
    kernel = shift_kernels.shift_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "moved": f"*{dtype}", "spread": "*fp32"}
    signature |= {"target": "*fp32" if soft else "*i64", "seed": "*i64", "row_ids": "*i64"}
    signature |= {"rows": "i32", "strength": "*fp32"}
    constants = shift_kernels.shift_blocks(768) | {"C": 8, "SOFT": soft, "HAS_IDS": True}
    constants |= {"IN_MEMORY": True, "STRIDE": 1}
    return usage_of(kernel, signature, constants, capability)


def combine_usage(capability: int, dtype: str, soft: bool) -> tuple[int, int]:
    """The same of the shift along 64 directions."""
    kernel = shift_kernels.combine_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "moved": f"*{dtype}", "directions": "*fp32"}
    signature |= {"target": "*fp32" if soft else "*i64", "seed": "*i64", "row_ids": "*i64"}
    signature |= {"rows": "i32", "scale": "fp32", "strength": "*fp32"}
    constants = shift_kernels.shift_blocks(768) | {"C": 8, "RANK": 64, "SOFT": soft}
    constants |= {"HAS_IDS": True, "IN_MEMORY": True, "STRIDE": 1}
    return usage_of(kernel, signature, constants, capability)


def moments_usage(capability: int, dtype: str, soft: bool) -> tuple[int, int]:
    """The same of the moments of 8 classes."""
    kernel = shift_kernels.moments_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"features": f"*{dtype}", "target": "*fp32" if soft else "*i64"}
    signature |= dict.fromkeys(("counts", "means", "m2s"), "*fp64") | {"weight": "*fp32"}
    signature |= {"rows": "i32", "segment": "i32"}
    block = shift_kernels.moments_blocks(65536, 768, 8)
    constants = {"D": 768, "C": 8, "R": block["R"], "K": block["K"]}
    constants |= {"SOFT": soft, "HAS_WEIGHT": True}
    return usage_of(kernel, signature, constants, capability)


def merge_usage(capability: int) -> tuple[int, int]:
    """The same of the merge of 64 segments."""
    kernel = shift_kernels.merge_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("counts", "means", "m2s", "count"), "*fp64")
    signature |= {"mean": "*fp32", "m2": "*fp32"}
    constants = {"D": 768, "C": 8, "S": 64, "SP": 64, "T": 12, "K": 32}
    return usage_of(kernel, signature, constants, capability)


def shifted_loss_usage(capability: int, dtype: str, classes: int) -> tuple[int, int]:
    """The same of the shifted cross-entropy."""
    kernel = shift_kernels.losses_kernel
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"logits": f"*{dtype}", "gradient": f"*{dtype}", "target": "*i64"}
    signature |= dict.fromkeys(("table", "losses", "strength"), "*fp32") | {"rows": "i32"}
    constants = {**shift_kernels.loss_blocks(classes), "GRADIENT": True}
    constants |= {"IN_MEMORY": True, "STRIDE": 1}
    return usage_of(kernel, signature, constants, capability)


def shift_rows(capability: int) -> list[tuple[str, tuple[int, int]]]:
    """Name, and registers and stack, of every kernel of the shift."""
    rows = [(f"merge, sm_{capability}", merge_usage(capability))]
    for dtype in ("bf16", "fp32"):
        for soft in (False, True):
            name = f"{dtype}, {'posteriors' if soft else 'labels'}, sm_{capability}"
            rows += [
                (f"shift, {name}", shift_usage(capability, dtype, soft)),
                (f"directions, {name}", combine_usage(capability, dtype, soft)),
                (f"moments, {name}", moments_usage(capability, dtype, soft)),
            ]
        for classes in (8, 1000):
            name = f"shifted loss, {dtype}, C={classes}, sm_{capability}"
            rows.append((name, shifted_loss_usage(capability, dtype, classes)))
    return rows


def usage_of(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
) -> tuple[int, int]:
    """Registers and stack bytes of a Triton kernel, its arrays aligned to 16 bytes."""
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
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
        rows += shift_rows(capability)
        for name, (registers, stack) in rows:
            print(f"{name:36} {registers:4} registers, {stack} bytes spilled", flush=True)
            spilled += stack
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
