"""``make gpu``: build, test and time on a machine with an NVIDIA GPU and no network.

    python -m tools.gpu [tests] [operators] [training]

Each part ends within ten minutes, is independent of the others, and can be run alone (``make gpu
PART=tests``):

- tests: of the operators, their stability over a thousand runs, and a captured step
- operators: times of our own operators at every size first, then beside their rivals
- training: the training ladder

It uses the installed tools (nvcc, a C++ compiler, CMake, Ninja, pybind11, PyTorch) and writes only
to build/gpu. Steps that lack a package are named and skipped. Every step has a time limit, after
which it is killed with all its child processes. Results are written as they come, to $OUT or else
to build/gpu/results; a short table comes last, even after failures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bench.rows import Row

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
SECONDS = 570
"""Per part; a step gets the time left by earlier steps."""
PARTS = ("tests", "operators", "training")
OPERATORS = ("consistency", "evidential", "shift")
TRAINER = ("PIL", "rich", "tensorboard")
"""Packages that the ladder imports; without DALI its frames are random."""
GRACE = 25
"""Seconds before its limit at which a benchmark starts nothing new."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a step."""

    step: str
    status: Literal["ok", "left out", "failed"]
    detail: str = ""


class Runner:
    """Runs the commands of one part within its time limit.

    Args:
        seconds: for all commands.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        path = os.pathsep.join([str(BUILD / "kernels"), str(ROOT)])
        self.environment = {**os.environ, "PYTHONPATH": path}

    def left(self) -> float:
        """Return the seconds until the part must end."""
        return self.end - time.monotonic()

    def run(self, step: str, command: list[str], limit: float = SECONDS) -> Outcome:
        """Run a command within ``limit`` seconds and within the remaining time."""
        limit = min(limit, self.left())
        if limit < 1:
            return Outcome(step, "left out", "no time was left")
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step, "failed", str(error))
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # including compilers and tests that it started
            process.wait()
            return Outcome(step, "failed", f"stopped after {limit:.0f} s")
        took = f"{time.monotonic() - start:.0f} s"
        if status == 0:
            return Outcome(step, "ok", took)
        return Outcome(step, "failed", f"exit status {status}, {took}")


def main(arguments: list[str] | None = None) -> int:
    """Run the requested parts; exit status 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all"
    )
    parts = parser.parse_args(arguments).parts or PARTS
    for part in parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}, only {', '.join(PARTS)}")
    if not installed("torch"):
        print("make gpu needs PyTorch, which is not installed", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that PyTorch can use; there is none", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or BUILD / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    outcomes: list[Outcome] = []
    for part in parts:
        try:
            for outcome in steps(part, Runner(SECONDS), out):
                outcomes.append(outcome)
                found = {"on": head, "steps": [asdict(one) for one in outcomes]}
                (out / "gpu.json").write_text(json.dumps(found, indent=1))
        except Exception as error:  # the other parts still run
            traceback.print_exc()
            outcomes.append(Outcome(part, "failed", f"{type(error).__name__}: {error}"))
    report(head, outcomes, out)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def steps(part: str, runner: Runner, out: Path) -> Iterator[Outcome]:
    """Yield the outcomes of one part. Triton kernels also run without a native module."""
    yield from build(runner)
    yield from {"tests": tests, "operators": operators, "training": training}[part](runner, out)


def build(runner: Runner) -> Iterator[Outcome]:
    """Copy the package and build its native module there, reusing an earlier build."""
    kernels = BUILD / "kernels"
    for file in kernels.rglob("*.py"):
        file.unlink()
    shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("*.so"),
                    dirs_exist_ok=True)  # fmt: skip
    missing = [tool for tool in ("cmake", "ninja", "nvcc") if not shutil.which(tool)]
    missing += [] if installed("pybind11") else ["pybind11"]
    if missing:
        yield Outcome("native module", "left out", f"no {', '.join(missing)}")
        return
    yield runner.run("configure", configure(), 60)
    yield runner.run("build", ["cmake", "--build", str(BUILD / "native")], 150)


def configure() -> list[str]:
    """Return the CMake command for this GPU, with the module beside the copied package."""
    import pybind11

    return [
        "cmake", "-S", str(ROOT), "-B", str(BUILD / "native"), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DMICS_MODULE_DIR={BUILD / 'kernels' / 'mics_kernels'}",
    ]  # fmt: skip


def tests(runner: Runner, out: Path) -> Iterator[Outcome]:
    """Run the operators' tests and those of a captured step.

    Test files that import a package that is not installed are skipped.
    """
    if not installed("pytest"):
        yield Outcome("tests", "left out", "no pytest")
        return
    missing = [name for name in ("hypothesis", "mpmath") if not installed(name)]
    stress = ROOT / "tests" / "kernels" / "test_consistency_stress.py"
    files = set((ROOT / "tests" / "kernels").glob("test_*.py")) - {stress}
    files.add(ROOT / "tests" / "mics_fast" / "engine" / "test_capture.py")
    chosen = [str(file) for file in sorted(files) if not needs(file, missing)]
    pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail", "20"]
    yield runner.run("stress test", [*pytest, str(stress)], 120)
    parallel = ["-n", "8"] if installed("xdist") else []  # most of the time is compilation
    outcome = runner.run("tests", [*pytest, *chosen, *parallel])
    without = f", without tests that need {', '.join(missing)}" if missing else ""
    yield Outcome(outcome.step, outcome.status, outcome.detail + without)


def operators(runner: Runner, out: Path) -> Iterator[Outcome]:
    """Benchmark our operators, which torch need not compile, then each subject with rivals."""
    yield benchmark(runner, out, "ours", ["--ours", "--only", *OPERATORS], 150)
    for place, subject in enumerate(OPERATORS):
        share = runner.left() / (len(OPERATORS) - place)
        yield benchmark(runner, out, subject, ["--only", subject], share)


def training(runner: Runner, out: Path) -> Iterator[Outcome]:
    """Run the training ladder."""
    missing = [name for name in TRAINER if not installed(name)]
    if missing:
        yield Outcome("training", "left out", f"no {', '.join(missing)}")
        return
    # A rung takes longer to build than an operator's case.
    yield benchmark(runner, out, "training", ["--only", "training"], SECONDS, grace=3 * GRACE)


def benchmark(
    runner: Runner, out: Path, name: str, options: list[str], limit: float, grace: float = GRACE
) -> Outcome:
    """Run a quick benchmark, which stores its rows as they come."""
    limit = min(limit, runner.left())
    command = [sys.executable, "-m", "bench", "--quick", *options]
    command += ["--json", str(out / f"{name}.json"), "--limit", str(max(1, int(limit - grace)))]
    return runner.run(name, command, limit)


def installed(name: str) -> bool:
    """Return True if a package can be imported."""
    return importlib.util.find_spec(name) is not None


def needs(file: Path, packages: list[str]) -> bool:
    """Return True if a test file imports one of the packages."""
    text = file.read_text()
    return any(f"import {name}" in text or f"from {name}" in text for name in packages)


def report(head: str, outcomes: list[Outcome], out: Path) -> None:
    """Print the outcome of each step, and the available results."""
    print(f"\n{head}")
    for outcome in outcomes:
        print(f"{outcome.step:18} {outcome.status}{f', {outcome.detail}' * bool(outcome.detail)}")
    for name in (*OPERATORS, "training"):
        try:
            complete = print_result(out / f"{name}.json")
            if not complete and name in OPERATORS:
                print_result(out / "ours.json", subject=name)
        except Exception:  # the other tables are still printed
            traceback.print_exc(limit=1)


def print_result(path: Path, subject: str = "") -> bool:
    """Print our own rows of a result, each with its best rival; return True if there are any."""
    if not path.exists():
        return False
    found: list[Row] = json.loads(path.read_text())["rows"]
    found = [row for row in found if subject in ("", row["subject"])]
    rows = [row for row in found if "absent" not in row]
    for row in rows:
        if "pairs_per_second" in row:
            speed = f"{row['pairs_per_second']:.1f} pairs/s, MFU {100 * row['mfu']:.0f} %"
            print(f"{row['shape']}, rung {row['implementation']}: {speed}")
        elif row["ours"]:
            print(line_of(row, rows))
    for row in found:
        if row.get("failed"):
            what = [row.get("operator", ""), row.get("shape", ""), row.get("implementation", "")]
            print(f"FAILED: {' '.join(what)}: {row['absent'][:160]}")
    return bool(rows)


def line_of(row: Row, rows: list[Row]) -> str:
    """Format one of our rows: replayed and ordinary call, share of the floor, fastest rival."""
    same = [r for r in rows if (r["operator"], r["shape"]) == (row["operator"], row["shape"])]
    others = [r for r in same if not r["ours"] and r["implementation"] != "copy"]
    best = min(others, key=lambda other: other["median_ms"], default=None)
    line = (
        f"{row['operator']:28} {row['shape']:22} {row['implementation']:7} "
        f"{1e3 * row['median_ms']:9.1f} us replayed {1e3 * row['called_ms']:9.1f} us as called "
        f"{100 * (row['share_of_floor'] or 0):4.0f} % of the floor"
    )
    if best is None:
        return line
    return f"{line}; {best['implementation']} takes {best['median_ms'] / row['median_ms']:.1f}x"


if __name__ == "__main__":
    sys.exit(main())
