"""Compile the GPU kernels for sm_80, 90, 100 and 120, and refuse register spills.

Needs no GPU: Triton makes cubins for any target, nvcc likewise. Shared memory beyond a chip's limit
and a sweep without tensor cores are refused where they are met (check_consistency.py).

    python csrc/tools/check_kernels.py
"""

from __future__ import annotations

import sys
from multiprocessing import Pool

import check_consistency
import check_evidential
import check_shift
from compiled import Check, Usage

CAPABILITIES = (80, 90, 100, 120)


def measured(check: Check) -> Usage:
    """Compile; in a process of its own."""
    return check.measure(*check.arguments)


def main() -> int:
    """Print a table; exit status 1 where a kernel spills."""
    rows = [
        check._replace(name=f"sm_{capability}  {check.name}")
        for capability in CAPABILITIES
        for module in (check_evidential, check_shift, check_consistency)
        for check in module.checks(capability)
    ]
    spilled = 0
    with Pool() as pool:
        for check, usage in zip(rows, pool.imap(measured, rows), strict=True):
            print(
                f"{check.name:58} {usage.registers:4} registers {usage.shared / 1024:6.1f} KB "
                f"shared {usage.stack:4} bytes spilled",
                flush=True,
            )
            spilled += usage.stack
    print(f"{len(rows)} kernels compiled, {spilled} bytes spilled")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
