"""``make gpu``: build, test and time on a machine with an NVIDIA GPU and no network.

Uses the tools that are installed (nvcc, a C++ compiler, CMake, Ninja, pybind11, PyTorch) and a
scratch folder; the checkout is left alone. What lacks a package is named, and the rest goes on.
Prints a short table last, whatever failed; writes gpu.json after every step, and the benchmarks'
results row by row, to $OUT when it is set. Each step has a limit, after which all that it has
started is killed, and all of them together end within 9 minutes. The training ladder comes last and
gets what is left; `python -m bench --quick --only training` runs it alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520
"""For everything; a step gets what its own limit and the steps before leave."""
SUBJECTS = ("evidential", "consistency", "shift", "training")
TRAINER = ("PIL", "rich", "tensorboard")
"""What the ladder imports; without DALI its frames are random."""
GRACE = 25
"""Seconds before its limit at which a benchmark begins nothing new."""


def main() -> int:
    """Run the steps; exit status 0 when none failed."""
    if importlib.util.find_spec("torch") is None:
        print("make gpu needs PyTorch, and it is not installed", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(
            "make gpu needs an NVIDIA GPU that PyTorch can use, and there is none", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as name:
        out = Path(os.environ.get("OUT") or name).resolve()
        out.mkdir(parents=True, exist_ok=True)
        kernels = Path(name) / "kernels"
        shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("*.so"))
        head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        outcomes: dict[str, str] = {}
        try:
            for step, outcome in steps(Path(name), out):
                outcomes[step] = outcome
                text = json.dumps({"on": head, "steps": outcomes}, indent=1)
                (out / "gpu.json").write_text(text)
        except Exception as error:  # what was measured is told all the same
            traceback.print_exc()
            outcomes["this program"] = f"{type(error).__name__}: {error}"
        report(head, outcomes, out)
    failed = [
        step for step, outcome in outcomes.items() if not outcome.startswith(("ok", "left out"))
    ]
    return 1 if failed else 0


def report(head: str, outcomes: dict[str, str], out: Path) -> None:
    """What became of each step, and the results that there are."""
    print(f"\n{head}")
    for step, outcome in outcomes.items():
        print(f"{step:18} {outcome}")
    for subject in SUBJECTS:
        try:
            print_result(out / f"{subject}.json")
        except Exception:  # the other tables are wanted, too
            traceback.print_exc(limit=1)


def steps(scratch: Path, out: Path) -> Iterator[tuple[str, str]]:
    """Each step and "ok", "left out" and why, or what became of it. Without the native module
    later steps still run: Triton needs none."""
    path = os.pathsep.join([str(scratch / "kernels"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    end = time.monotonic() + SECONDS

    def run(command: list[str], limit: int) -> str:
        return outcome_of(command, min(limit, end - time.monotonic()), environment)

    missing = [tool for tool in ("cmake", "ninja", "nvcc") if not shutil.which(tool)]
    missing += [] if installed("pybind11") else ["pybind11"]
    if missing:
        yield "native module", f"left out: no {', '.join(missing)}"
    else:
        yield "configure", run(configure(scratch), 40)
        yield "build", run(["cmake", "--build", str(scratch / "build")], 100)
    yield from tests(run)
    for subject in SUBJECTS:
        missing = [name for name in TRAINER if not installed(name)] if subject == "training" else []
        if missing:
            yield subject, f"left out: no {', '.join(missing)}"
            continue
        stored = str(out / f"{subject}.json")
        command = [sys.executable, "-m", "bench", "--quick", "--only", subject, "--json", stored]
        limit = int(min(SECONDS if subject == "training" else 85, end - time.monotonic()))
        # A rung of the ladder takes longer to build, and all are timed at its end.
        grace = 3 * GRACE if subject == "training" else GRACE
        yield subject, run([*command, "--limit", str(max(1, limit - grace))], limit)


def tests(run: Callable[[list[str], int], str]) -> Iterator[tuple[str, str]]:
    """The operators' tests, and those of a captured step; files that import a package which is not
    here are left out."""
    if not installed("pytest"):
        yield "tests", "left out: no pytest"
        return
    missing = [name for name in ("hypothesis", "mpmath") if not installed(name)]
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    files.append(ROOT / "tests" / "mics_fast" / "engine" / "test_capture.py")
    chosen = [str(file) for file in files if not needs(file, missing)]
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail", "20", *chosen]
    command += ["-n", "8"] if installed("xdist") else []  # most of the time is compilation
    left = f", without tests that need {', '.join(missing)}" if missing else ""
    yield "tests", run(command, 150) + left


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def needs(file: Path, packages: list[str]) -> bool:
    """Whether a file of tests imports one of the packages."""
    text = file.read_text()
    return any(f"import {name}" in text or f"from {name}" in text for name in packages)


def configure(scratch: Path) -> list[str]:
    """CMake for the GPU that is there, with the module beside the copied package."""
    import pybind11

    return [
        "cmake", "-S", str(ROOT), "-B", str(scratch / "build"), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DMICS_MODULE_DIR={scratch / 'kernels' / 'mics_kernels'}",
    ]  # fmt: skip


def outcome_of(command: list[str], limit: float, environment: dict[str, str]) -> str:
    """Run with a limit in seconds: "ok" and how long, or one line that says what went wrong."""
    if limit < 1:
        return "left out: no time was left"
    start = time.monotonic()
    try:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    except OSError as error:
        return str(error)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers and tests that it started
        return f"stopped after {limit:.0f} s"
    return f"{'ok' if status == 0 else f'exit status {status}'}, {time.monotonic() - start:.0f} s"


def print_result(path: Path) -> None:
    """Our own rows of a benchmark's result, with the best of the others beside each."""
    if not path.exists():
        return
    found = json.loads(path.read_text())["rows"]
    rows = [row for row in found if "absent" not in row]
    for row in rows:
        if "pairs_per_second" in row:
            speed = f"{row['pairs_per_second']:.1f} pairs/s, MFU {100 * row['mfu']:.0f} %"
            print(f"{row['shape']}, rung {row['implementation']}: {speed}")
        elif row["ours"]:
            print(line_of(row, rows))
    for row in found:
        if row.get("failed"):
            what = [row.get(key, "") for key in ("operator", "shape", "implementation")]
            print(f"FAILED: {' '.join(what)}: {row['absent'][:160]}")


def line_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One of our rows: time, share of the floor, and the fastest of the others."""
    same = [r for r in rows if (r["operator"], r["shape"]) == (row["operator"], row["shape"])]
    others = [r for r in same if not r["ours"] and r["implementation"] != "copy"]
    best = min(others, key=lambda other: other["median_ms"], default=None)
    line = (
        f"{row['operator']:28} {row['shape']:22} {row['implementation']:7} "
        f"{1e3 * row['median_ms']:9.1f} us {100 * row['share_of_floor']:4.0f} % of the floor"
    )
    if best is None:
        return line
    return f"{line}; {best['implementation']} takes {best['median_ms'] / row['median_ms']:.1f}x"


if __name__ == "__main__":
    sys.exit(main())
