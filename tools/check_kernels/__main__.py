"""Compile the GPU kernels for sm_80, 90, 100 and 120, and refuse register spills.

Needs no GPU: Triton makes cubins for any target, nvcc likewise. What else must hold of the code
(shared memory, tensor cores, loads of 16 bytes, bytes and FLOPs of bench/roofline.py) is asserted
where it is met. A short table comes last; --json keeps it for docs/performance.md.

    python -m tools.check_kernels [--json bench/results/kernels.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from multiprocessing import Pool
from pathlib import Path

import triton

from tools.check_kernels import consistency, evidential, shift
from tools.check_kernels.compiled import Check, Usage

CAPABILITIES = (80, 90, 100, 120)


def measured(check: Check) -> Usage:
    """Compile; in a process of its own."""
    return check.measure(*check.arguments)


def main() -> int:
    """Print a table; exit status 1 where a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="keep the short table here")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    options = parser.parse_args()
    rows = [
        (capability, check)
        for capability in CAPABILITIES
        for module in (evidential, shift, consistency)
        for check in module.checks(capability)
        if options.only in check.name
    ]
    kinds: dict[str, dict[int, list[Usage]]] = defaultdict(lambda: defaultdict(list))
    with Pool() as pool:
        checks = [check for _, check in rows]
        for (capability, check), usage in zip(rows, pool.imap(measured, checks), strict=True):
            print(f"sm_{capability}  {check.name:50} {in_words(usage)}", flush=True)
            kinds[check.name.split(",")[0]][capability].append(usage)
    table = {
        kind: {n: most_of(found) for n, found in chips.items()} for kind, chips in kinds.items()
    }
    spilled = sum(usage.stack for chips in kinds.values() for n in chips for usage in chips[n])
    print(f"\nMost of each kind, with Triton {triton.__version__}:")
    for kind, chips in table.items():
        for capability, usage in chips.items():
            print(f"sm_{capability:<4} {kind:24} {in_words(usage)}")
    print(f"{len(rows)} kernels compiled, {spilled} bytes spilled")
    if options.json:
        kept = {"triton": triton.__version__, "count": len(rows), "kinds": table}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if spilled else 0


def most_of(found: list[Usage]) -> Usage:
    """The most of each that any kernel takes."""
    return Usage(*(max(column) for column in zip(*found, strict=True)))


def in_words(usage: Usage) -> str:
    """A usage with its units."""
    return (
        f"{usage.registers:4} registers {usage.shared / 1024:6.1f} KB shared "
        f"{usage.stack:4} bytes spilled"
    )


if __name__ == "__main__":
    sys.exit(main())
