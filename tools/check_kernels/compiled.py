"""Compilation of a GPU kernel without a GPU, and its resource usage."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALIGNED = [["tt.divisibility", 16]]  # addresses from torch's allocator


class Usage(NamedTuple):
    """Resources that a kernel uses on a chip."""

    registers: int  # per thread
    stack: int  # bytes per thread; above 0 if registers spill
    shared: int  # bytes of shared memory per program


def most_of(found: list[Usage]) -> Usage:
    """Return the maximum of each number."""
    return Usage(*(max(column) for column in zip(*found, strict=True)))


class Check(NamedTuple):
    """One kernel in one configuration."""

    kind: str  # of kernel; the short table has the maximum of each kind
    detail: str  # the configuration
    measure: Callable[..., Usage]  # raises AssertionError if another check fails
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Kind and configuration."""
        return f"{self.kind}, {self.detail}" if self.detail else self.kind


def compile_for(
    capability: int,
    kernel: triton.JITFunction,
    signature: dict[str, Any],
    constants: dict[str, Any],
    aligned: Iterable[tuple[int, ...]],
    **options: int,
) -> Any:
    """Compile a Triton kernel for a chip (90 for compute capability 9.0).

    Args:
        signature: argument -> Triton's name of its type; "constexpr" if ``constants`` has it.
        constants: argument -> value.
        aligned: pointers divisible by 16, by index of the argument and of its element.
        options: num_warps, num_stages.
    """
    source = ASTSource(
        kernel, signature, constexprs=constants, attrs=dict.fromkeys(aligned, ALIGNED)
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def usage_of(compiled: Any) -> Usage:
    """Read the resources that a compiled kernel takes."""
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
    """Compile a kernel with four warps and aligned arrays."""
    arrays = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    places = [(i,) for i in arrays]
    return compile_for(capability, kernel, signature, constants, places, num_warps=4)
