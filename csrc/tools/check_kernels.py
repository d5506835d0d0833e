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
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mics_kernels.consistency import triton_kernels as consistency_kernels
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
    return usage_of(compiled.asm["cubin"])


def usage_of(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def sweep_tiles(capability: int) -> list[tuple[int, str, bool, consistency_kernels.Tile]]:
    """Every width, precision, use of ids and tile that the consistency losses run with: of half
    precision, and of float32 up to 256 features, as TensorFloat-32 and exact."""
    cases = []
    for width in (32, 64, 128, 256, 512, 1024):
        for precision in ("half", "tf32", "ieee") if width <= 256 else ("half",):
            size, exact = (2 if precision == "half" else 4), precision == "ieee"
            for has_ids in (False, True):
                for batch in (8, 16, 32, 64):
                    tile = consistency_kernels.tile_for(
                        capability, batch, width, size, has_ids, exact
                    )
                    cases.append((width, precision, has_ids, tile))
    return list(dict.fromkeys(cases))


def sweep_usage(
    capability: int, width: int, precision: str, has_ids: bool, tile: consistency_kernels.Tile
) -> tuple[int, int]:
    """As ``triton_usage``, of the sweep over keys and queues of two views; also refuses a program
    that does not fit on the chip, or makes no use of tensor cores or asynchronous copies."""
    kernel = consistency_kernels.sweep_kernel
    features = "*bf16" if precision == "half" else "*fp32"
    signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("students", "teachers", "keys", "queues"), (features,) * 2)
    signature |= {"lengths": ("*i64", "*i64"), "sums": "*fp32", "pulls": "*fp32"}
    signature |= dict.fromkeys(("ids_step", "rows", "key_rows", "queue_rows", "splits"), "i32")
    signature |= {"temperature": "fp32", "queue_ids": ()}
    constants = {
        "A": (0, 1), "B": (1, 0), "D": width, "DP": width, "M": tile.rows, "N": tile.keys,
        "HAS_QUEUE": True, "HAS_LENGTHS": True, "LENGTHS_IN_MEMORY": True, "HAS_IDS": has_ids,
        "HAS_QUEUE_IDS": has_ids, "TEMPERATURE_IN_MEMORY": False, "GRADIENT": True,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }  # fmt: skip
    if has_ids:
        signature |= {"key_ids": "*i64", "queue_ids": ("*i64", "*i64")}
    else:
        constants |= {"key_ids": None, "queue_ids": ()}
    # As torch's allocator gives them: addresses are multiples of 16.
    places: list[tuple[int, ...]] = [(kernel.arg_names.index(n),) for n in ("sums", "pulls")]
    for name in ("students", "teachers", "keys", "queues", "lengths", "queue_ids"):
        index = kernel.arg_names.index(name)
        places += [(index, view) for view in range(len(signature[name]))]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=constants,
            attrs={place: [["tt.divisibility", 16]] for place in places},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        },
    )
    code, shared = compiled.asm["ptx"], compiled.metadata.shared
    assert shared <= consistency_kernels.shared_memory(capability), (capability, width, tile)
    if precision != "ieee":
        assert re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", code), (
            capability,
            width,
            tile,
        )
    if precision != "tf32":
        assert "cp.async" in code, (capability, width, tile)
    return usage_of(compiled.asm["cubin"])


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
        for width, precision, has_ids, tile in sweep_tiles(capability):
            name = (
                f"sweep, D={width} {precision}{', ids' * has_ids}, {tuple(tile)}, sm_{capability}"
            )
            rows.append((name, sweep_usage(capability, width, precision, has_ids, tile)))
        for name, (registers, stack) in rows:
            print(f"{name:52} {registers:4} registers, {stack} bytes spilled", flush=True)
            spilled += stack
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
