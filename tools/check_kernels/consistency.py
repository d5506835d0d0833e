"""Checks of the consistency losses' Triton kernels."""

from __future__ import annotations

import re
from typing import Any

from bench import roofline
from mics_kernels.consistency import triton_kernels
from tools.check_kernels.compiled import Check, Usage, compile_for, usage_of
from tools.check_kernels.counts import operations, total, wide
from tools.check_kernels.sass import disassembled, overwritten


def checks(capability: int) -> list[Check]:
    """List every width, precision and tile for a chip; for D = 256 also the forward pass only."""
    rows = []
    for width, precision, has_ids, tile in sweep_tiles(capability):
        for gradient in (True, False) if width == 256 and precision == "half" else (True,):
            name = f"D={width} {precision}{', ids' * has_ids}{', loss only' * (not gradient)}"
            given = (capability, width, precision, has_ids, tile, gradient)
            rows.append(Check("sweep", f"{name}, {tuple(tile)}", sweep_usage, given))
    return [*rows, Check("join", "D=256", join_usage, (capability,))]


def sweep_tiles(capability: int) -> list[tuple[int, str, bool, triton_kernels.Tile]]:
    """List every width, precision, use of ids and tile that the consistency losses use.

    That is half precision, and up to 256 features float32, as TensorFloat-32 and exact.
    """
    cases = []
    for width in (32, 64, 128, 256, 512, 1024):
        for precision in ("half", "tf32", "ieee") if width <= 256 else ("half",):
            size, exact = (2 if precision == "half" else 4), precision == "ieee"
            for has_ids in (False, True):
                for batch in (8, 16, 32, 64):
                    tile = triton_kernels.tile_for(capability, batch, width, size, has_ids, exact)
                    cases.append((width, precision, has_ids, tile))
    return list(dict.fromkeys(cases))


def sweep_usage(
    capability: int,
    width: int,
    precision: str,
    has_ids: bool,
    tile: triton_kernels.Tile,
    gradient: bool,
) -> Usage:
    """Measure the sweep over keys and queues of two modalities.

    Raises:
        AssertionError: it does not fit on the chip, does not use tensor cores or asynchronous
            copies, overwrites registers that a product still reads, does not read keys in 16-byte
            loads, or moves or computes other amounts than the roofline model.
    """
    compiled = compiled_sweep(capability, width, precision, has_ids, tile, gradient)
    code, shared = compiled.asm["ptx"], compiled.metadata.shared
    where = (capability, width, tile)
    assert shared <= triton_kernels.shared_memory(capability), where
    if precision != "ieee":
        assert re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", code), where
    if precision != "tf32":
        assert "cp.async" in code, where
    assert wide(code, "ld"), where
    if capability == 90:
        assert not (bad := overwritten(disassembled(compiled))), (*where, bad)
    check_counts(compiled.asm["ttir"], width, 2 if precision == "half" else 4, tile, gradient)
    return usage_of(compiled)


def compiled_sweep(
    capability: int,
    width: int,
    precision: str,
    has_ids: bool,
    tile: triton_kernels.Tile,
    gradient: bool,
) -> Any:
    """Compile the sweep for a chip, as called by a training step."""
    kernel = triton_kernels.sweep_kernel
    features = "*bf16" if precision == "half" else "*fp32"
    signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("students", "teachers", "keys", "queues"), (features,) * 2)
    signature |= {"lengths": ("*i64", "*i64"), "sums": "*fp32", "pulls": "*fp32"}
    signature |= dict.fromkeys(("ids_step", "rows", "key_rows", "queue_rows", "splits"), "i32")
    signature |= {"temperature": "fp32", "queue_ids": ()}
    constants = {
        "A": (0, 1), "B": (1, 0), "D": width, "DP": width, "M": tile.rows, "N": tile.keys,
        "HAS_QUEUE": True, "HAS_LENGTHS": True, "LENGTHS_IN_MEMORY": True, "HAS_IDS": has_ids,
        "HAS_QUEUE_IDS": has_ids, "TEMPERATURE_IN_MEMORY": False, "GRADIENT": gradient,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }  # fmt: skip
    if has_ids:
        signature |= {"key_ids": "*i64", "queue_ids": ("*i64", "*i64")}
    else:
        constants |= {"key_ids": None, "queue_ids": ()}
    # Addresses from torch's allocator are multiples of 16.
    places: list[tuple[int, ...]] = [(kernel.arg_names.index(n),) for n in ("sums", "pulls")]
    for name in ("students", "teachers", "keys", "queues", "lengths", "queue_ids"):
        index = kernel.arg_names.index(name)
        places += [(index, view) for view in range(len(signature[name]))]
    return compile_for(
        capability, kernel, signature, constants, places,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def check_counts(
    ttir: str, width: int, size: int, tile: triton_kernels.Tile, gradient: bool
) -> None:
    """Check a step of either loop, over keys or queue, against the roofline model.

    It must read its keys once and multiply them with its queries as often as the model counts, for
    the loss alone half as often.
    """
    found = list(operations(ttir))
    queries = tile.rows // 2
    less, more = (roofline.consistency(queries, width, n, size) for n in (0, tile.keys))
    # The model has two queues and two ordered pairs, and the kernel two loops.
    assert total(found, "load", rank=2, depth=1) == more.bytes - less.bytes, (width, tile)
    wanted = (more.flops - less.flops) // (1 if gradient else 2)
    assert total(found, "dot", depth=1) == wanted, (width, tile, gradient)


def join_usage(capability: int) -> Usage:
    """Measure the join of 8 splits, D = 256."""
    kernel = triton_kernels.join_kernel
    signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(("sums", "pulls", "losses", "gradient", "slopes"), "*fp32")
    signature |= {"keys": ("*bf16",) * 2, "key_ids": "*i64", "counted": "*i1"}
    signature |= {"temperature": "*fp32", "alpha": "*fp32"}
    signature |= dict.fromkeys(("ids_step", "rows", "splits"), "i32")
    constants = {
        "A": (0, 1), "B": (1, 0), "D": 256, "C": 128, "S": 8, "T": 16, "HAS_IDS": True,
        "TEMPERATURE_IN_MEMORY": True, "ALPHA_IN_MEMORY": True, "GRADIENT": True,
    }  # fmt: skip
    names = ("sums", "pulls", "losses", "gradient", "slopes", "key_ids")
    places = [(kernel.arg_names.index(name),) for name in names]
    return usage_of(
        compile_for(capability, kernel, signature, constants, places, num_warps=4, num_stages=2)
    )
