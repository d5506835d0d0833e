"""Compile the GPU kernels for sm_80, 90, 100 and 120, and refuse register spills.

No GPU is needed: Triton and nvcc compile for any target. Further properties of the code (shared
memory, tensor cores, registers of asynchronous products, 16-byte loads, bytes and FLOPs of
bench/roofline.py) are asserted kernel by kernel. A short table comes last; --json stores it for
docs/performance.md.

    python -m tools.check_kernels [--only "sm_90 sweep"] [--triton 3.6.0 installed] [--json FILE]

--triton lists versions; each is installed into build/triton-VERSION and compiles all kernels.
"installed" is the version in this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from multiprocessing import Pool
from pathlib import Path

import triton

from tools.check_kernels import consistency, evidential, shift
from tools.check_kernels.compiled import Check, Usage, most_of

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 90, 100, 120)
INSTALLED = "installed"
Table = dict[str, dict[int, Usage]]
"""Kind of kernel -> chip -> maximum usage of any kernel of the kind."""


def main() -> int:
    """Check with each version of Triton; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="store the short table here")
    parser.add_argument("--only", default="", help="chip and kernel: sm_90 sweep")
    parser.add_argument("--triton", nargs="+", default=[INSTALLED], metavar="VERSION")
    options = parser.parse_args()
    failed = 0
    for version in options.triton:
        if version == INSTALLED:
            failed |= check(options.only, options.json)
        else:
            failed |= check_with(version, options.only)
    return failed


def check_with(version: str, only: str) -> int:
    """Check in a child process with another version of Triton; return its exit status."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        new = folder.with_suffix(".new")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        if subprocess.run([*command, "--target", str(new), f"triton=={version}"]).returncode:
            print(f"Triton {version} cannot be installed into {folder}", file=sys.stderr)
            return 2
        new.rename(folder)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    cache = str(ROOT / "build" / f"triton-cache-{version}")
    return subprocess.run(
        [sys.executable, "-m", "tools.check_kernels", "--only", only],
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": cache}, cwd=ROOT,
    ).returncode  # fmt: skip


def check(only: str, kept: Path | None) -> int:
    """Compile every kernel with this Triton and print its usage; return 1 if one fails."""
    rows = [
        (capability, row)
        for capability in CAPABILITIES
        for module in (evidential, shift, consistency)
        for row in module.checks(capability)
        if only in f"sm_{capability} {row.name}"
    ]
    kinds: dict[str, dict[int, list[Usage]]] = defaultdict(lambda: defaultdict(list))
    wrong = 0
    with Pool() as pool:
        found = pool.imap(measured, [row for _, row in rows])
        for (capability, row), (usage, error) in zip(rows, found, strict=True):
            words = f"FAILED: {error}" if usage is None else in_words(usage)
            print(f"sm_{capability}  {row.name:50} {words}", flush=True)
            if usage is not None:
                kinds[row.kind][capability].append(usage)
            wrong += usage is None
    table: Table = {
        kind: {chip: most_of(usages) for chip, usages in chips.items()}
        for kind, chips in kinds.items()
    }
    spilled = sum(usage.stack for chips in kinds.values() for n in chips for usage in chips[n])
    print_table(table)
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {wrong} wrong, "
          f"{spilled} bytes spilled")  # fmt: skip
    if kept:
        text = json.dumps(
            {"triton": triton.__version__, "count": len(rows), "kinds": table}, indent=1
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text + "\n")
    return int(bool(spilled or wrong))


def measured(check: Check) -> tuple[Usage | None, str]:
    """Compile in a child process; return the usage, or the problem with the kernel."""
    try:
        return check.measure(*check.arguments), ""
    except Exception as error:  # the other kernels are still compiled
        return None, f"{type(error).__name__}: {error}"


def print_table(table: Table) -> None:
    """Print the maximum usage of each kind of kernel on each chip."""
    print("\nMost of each kind:")
    for kind, chips in table.items():
        for capability, usage in chips.items():
            print(f"sm_{capability:<4} {kind:24} {in_words(usage)}")


def in_words(usage: Usage) -> str:
    """Format a usage with units."""
    return (
        f"{usage.registers:4} registers {usage.shared / 1024:6.1f} KB shared "
        f"{usage.stack:4} bytes spilled"
    )


if __name__ == "__main__":
    sys.exit(main())
