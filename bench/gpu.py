"""``make gpu``: build, test and time the kernels on a machine with an NVIDIA GPU and no network.

Uses the tools that are installed (nvcc, a C++ compiler, CMake, Ninja, pybind11, PyTorch) and a
scratch folder; the checkout is left alone. Prints a short table last; writes gpu.json and each
benchmark's results to $OUT when it is set. Each step has a limit; together they end within 9
minutes. ``python bench/gpu.py training`` times the training step alone, within ten.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("evidential", "consistency", "shift")


def main() -> int:
    """Run the steps; exit status 0 when all of them succeeded."""
    if not torch.cuda.is_available():
        print(
            "make gpu needs an NVIDIA GPU that PyTorch can use, and there is none", file=sys.stderr
        )
        return 2
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shutil.copytree(
            ROOT / "kernels", scratch / "kernels", ignore=shutil.ignore_patterns("*.so")
        )
        results = dict(training() if sys.argv[1:] == ["training"] else steps(scratch))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_name()
        text = json.dumps({"gpu": gpu, "torch": torch.__version__, "steps": results}, indent=1)
        (out / "gpu.json").write_text(text)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for step, result in results.items():
        print(f"{step:12} {result}")
    return 0 if all(result == "ok" for result in results.values()) else 1


def steps(scratch: Path) -> list[tuple[str, str]]:
    """Each step and "ok", or what became of it. Later steps run without the native module too."""
    environment = {**os.environ, "PYTHONPATH": str(scratch / "kernels")}
    out = os.environ.get("OUT") or str(scratch)
    Path(out).mkdir(parents=True, exist_ok=True)
    tests = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    results = [
        ("configure", run(configure(scratch), 30, environment)),
        ("build", run(["cmake", "--build", str(scratch / "build")], 120, environment)),
        ("tests", run([sys.executable, "-m", "pytest", "-q", *tests], 200, environment)),
    ]
    for name in BENCHMARKS:
        command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--quick"]
        results.append((name, run([*command, "--json", f"{out}/{name}.json"], 60, environment)))
    return results


def training() -> list[tuple[str, str]]:
    """The ladder of vit_base; wants what the trainer needs."""
    out = os.environ.get("OUT")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "bench" / "training.py"), "--quick"]
    command += ["--json", f"{out}/training.json"] if out else []
    path = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    return [("training", run(command, 560, {**os.environ, "PYTHONPATH": path}))]


def configure(scratch: Path) -> list[str]:
    """CMake for the GPU that is there, with the module beside the copied package."""
    import pybind11

    return [
        "cmake", "-S", str(ROOT), "-B", str(scratch / "build"), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DMICS_MODULE_DIR={scratch / 'kernels' / 'mics_kernels'}",
    ]  # fmt: skip


def run(command: list[str], limit: int, environment: dict[str, str]) -> str:
    """Run with a limit in seconds: "ok", or one line that says what went wrong."""
    try:
        status = subprocess.run(command, timeout=limit, env=environment, cwd=ROOT).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit} s"
    except OSError as error:
        return str(error)
    return "ok" if status == 0 else f"exit status {status}"


if __name__ == "__main__":
    sys.exit(main())
