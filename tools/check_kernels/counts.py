"""Counts of the loads, stores and operations of a compiled Triton kernel.

TTIR is the compiler's first representation: it has every load, store and product once, with its
shape. The body of a loop counts once, so counts are per iteration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i8": 1, "i1": 1}
LOOP = re.compile(r"scf\.for ")
MOVE = re.compile(r"tt\.(load|store) .*: (?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>")
DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")
FLOAT = re.compile(r"(?:arith\.(?:add|sub|mul|div)f|math\.\w+) .*: tensor<([\dx]+)xf32>")


class Operation(NamedTuple):
    """A load, store, product or elementwise operation."""

    kind: str  # load, store, dot or float
    shape: tuple[int, ...]  # of the tensor moved or computed
    amount: int  # bytes moved, or FLOPs
    depth: int  # number of enclosing loops


def operations(ttir: str) -> Iterator[Operation]:
    """Yield the operations in program order."""
    ends: list[int] = []  # indentation of the open loops
    for line in ttir.splitlines():
        indent = len(line) - len(line.lstrip())
        while ends and indent <= ends[-1] and line.strip():
            ends.pop()
        if LOOP.search(line):
            ends.append(indent)
        elif move := MOVE.search(line):
            shape = sides(move[2])
            yield Operation(move[1], shape, math.prod(shape) * BYTES[move[3]], len(ends))
        elif dot := DOT.search(line):
            m, k, n = (int(side) for side in dot.groups())
            yield Operation("dot", (m, n), 2 * m * n * k, len(ends))
        elif number := FLOAT.search(line):
            shape = sides(number[1])
            yield Operation("float", shape, math.prod(shape), len(ends))


def sides(shape: str | None) -> tuple[int, ...]:
    """Parse "16x256" to numbers; a scalar has none."""
    return tuple(int(side) for side in shape.split("x")) if shape else ()


def total(found: list[Operation], kind: str, *, rank: int = 0, depth: int | None = None) -> int:
    """Sum the amounts of operations of a kind.

    Args:
        rank: minimum number of dimensions.
        depth: number of enclosing loops; None: any.
    """
    return sum(
        one.amount
        for one in found
        if one.kind == kind and len(one.shape) >= rank and depth in (None, one.depth)
    )


def wide(ptx: str, kind: str) -> int:
    """Count 16-byte loads ("ld") or stores ("st") in global memory.

    Asynchronous copies count as loads.
    """
    found = len(re.findall(rf"{kind}\.global[.\w:]*\.v4\.b32", ptx))
    if kind == "ld":
        found += len(
            re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], (?:0x10|16)", ptx)
        )
    return found
