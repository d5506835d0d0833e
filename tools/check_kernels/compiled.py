"""A GPU kernel compiled without a GPU: what it takes of a chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALIGNED = [["tt.divisibility", 16]]  # as torch's allocator gives addresses


class Usage(NamedTuple):
    """Registers a thread, bytes of its stack (above 0 where it spills), bytes of shared memory."""

    registers: int
    stack: int
    shared: int


class Check(NamedTuple):
    """One row of the table: a name, and what to call for its usage."""

    name: str
    measure: Callable[..., Usage]
    arguments: tuple[Any, ...]


def compile_for(
    capability: int,
    kernel: triton.JITFunction,
    signature: dict[str, Any],
    constants: dict[str, Any],
    aligned: Iterable[tuple[int, ...]],
    **options: int,
) -> Any:
    """A Triton kernel as a cubin for a chip (90 for compute capability 9.0).

    Args:
        signature: argument -> Triton's name of its type; "constexpr" where ``constants`` holds it.
        constants: argument -> value.
        aligned: places of pointers that are multiples of 16: argument, and element of a tuple.
        options: num_warps, num_stages.
    """
    source = ASTSource(
        kernel, signature, constexprs=constants, attrs=dict.fromkeys(aligned, ALIGNED)
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def usage_of(compiled: Any) -> Usage:
    """What a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared)


def simply_compiled(
    capability: int,
    kernel: triton.JITFunction,
    signature: dict[str, Any],
    constants: dict[str, Any],
) -> Any:
    """A kernel of four warps whose arrays are all aligned."""
    arrays = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    places = [(i,) for i in arrays]
    return compile_for(capability, kernel, signature, constants, places, num_warps=4)
