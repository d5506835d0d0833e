"""Machine code of a compiled kernel: inputs of asynchronous products must not be overwritten.

On sm_90 a product (HGMMA) may take one factor from registers, and reads them while the program
continues. Until the program has waited for it (WARPGROUP.DEPBAR), nothing may write to these
registers. Compilers have got this wrong; on a GPU it shows as rare wrong results, and here it can
be checked without one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton

LABEL = re.compile(r"^(\.L_x_\w+):")
LINE = re.compile(r"^/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
PRODUCT = re.compile(r"^R\d+, R(\d+), gdesc")
WAIT = re.compile(r"^gsb0, 0x([0-9a-f]+)")
PREDICATE = re.compile(r"^!?(PT|UPT|U?P\d+)$")
REGISTER = re.compile(r"^R(\d+)\b")
FACTOR = 4
"""Number of registers per thread for the left factor of a product."""
NO_RESULT = (
    "ATOMG", "BAR", "BRA", "BSSY", "BSYNC", "CCTL", "DEPBAR", "DSETP", "ERRBAR", "EXIT", "FCHK",
    "FENCE", "FSETP", "HGMMA", "HSETP2", "ISETP", "LDGDEPBAR", "LDGSTS", "MEMBAR", "NOP", "PLOP3",
    "R2P", "R2UR", "RED", "RET", "ST", "STG", "STL", "STS", "STSM", "SYNCS", "UBLKCP", "UTMALDG",
    "UTMASTG", "WARPGROUP", "WARPSYNC",
)  # fmt: skip
"""Instructions whose first operand is not a register written immediately."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, without its predicate."""

    opcode: str
    operands: str

    def written(self) -> range:
        """Return the registers that it writes."""
        name = self.opcode.split(".")[0]
        if name in NO_RESULT:
            return range(0)
        operands = [operand.strip() for operand in self.operands.split(",")]
        while operands and PREDICATE.match(operands[0]):
            operands.pop(0)
        found = REGISTER.match(operands[0]) if operands else None
        if found is None:
            return range(0)
        first = int(found[1])
        return range(first, first + self._width(name))

    def _width(self, name: str) -> int:
        if ".128" in self.opcode or name in ("HMMA", "IMMA"):
            return 4
        if name == "LDSM":
            return int(self.opcode.rsplit(".", 1)[-1]) if self.opcode[-1] in "24" else 1
        doubles = ("DADD", "DMUL", "DFMA", "CS2R")
        return 2 if ".64" in self.opcode or ".WIDE" in self.opcode or name in doubles else 1


def disassembled(compiled: Any) -> str:
    """Return the machine code of a kernel compiled by Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parsed(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """Parse the instructions, and the position of each label among them."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        line = line.strip()
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := LINE.match(line):
            instructions.append(Instruction(found[1], found[2].strip()))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> Iterator[range]:
    """Yield the body of each loop: from a label to the branch back to it."""
    for place, instruction in enumerate(instructions):
        if instruction.opcode.split(".")[0] == "BRA":
            target = re.search(r"\.L_x_\w+", instruction.operands)
            if target and labels.get(target[0], place + 1) <= place:
                yield range(labels[target[0]], place + 1)


def innermost(code: str) -> list[int]:
    """Return the number of instructions in each loop without a loop inside, in program order."""
    instructions, labels = parsed(code)
    bodies = [body for body in loops(instructions, labels) if len(body) > 1]  # 1: the end
    return [
        len(body)
        for body in sorted(bodies, key=lambda body: body.start)
        if not any(other != body and set(other) <= set(body) for other in bodies)
    ]


def products_from_registers(code: str) -> int:
    """Count the products that take a factor from registers."""
    instructions, _ = parsed(code)
    return sum(
        one.opcode.startswith("HGMMA") and PRODUCT.match(one.operands) is not None
        for one in instructions
    )


def overwritten(code: str) -> list[str]:
    """List instructions that write to a register still read by an asynchronous product.

    The code is followed from beginning to end, with every loop twice, so that a product at the end
    of an iteration is still open at the beginning of the next one.
    """
    instructions, labels = parsed(code)
    paths = [list(range(len(instructions)))]
    paths += [[*body, *body] for body in loops(instructions, labels)]
    places = {place for path in paths for place in clobbers(instructions, path)}
    return [
        f"{instructions[place].opcode} {instructions[place].operands}" for place in sorted(places)
    ]


def clobbers(instructions: list[Instruction], path: list[int]) -> Iterator[int]:
    """Yield positions on a path that write to a register of an unfinished product."""
    groups: list[set[int]] = [set()]  # of products; an instruction with gsb0 closes a group
    for place in path:
        one = instructions[place]
        if one.opcode.startswith("HGMMA"):
            if product := PRODUCT.match(one.operands):
                first = int(product[1])
                groups[-1] |= set(range(first, first + FACTOR))
            if "gsb0" in one.operands:
                groups.append(set())
        elif one.opcode.startswith("WARPGROUP.DEPBAR"):
            wait = WAIT.match(one.operands)
            left = int(wait[1], 16) if wait else 0
            groups = groups[len(groups) - 1 - left :] if left < len(groups) else groups
        elif any(register in group for group in groups for register in one.written()):
            yield place
