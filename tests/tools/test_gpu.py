"""The run on a GPU: what hangs, fails or is missing does not take the rest with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools import gpu

FORBIDDEN = ("nvidia", "jsonargparse", "safetensors", "matplotlib", "scipy", "torchmetrics")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU that answers to its name; $OUT."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


ROW = {
    "operator": "shift_features", "shape": "8 x 4", "implementation": "triton", "ours": True,
    "median_ms": 0.01, "share_of_floor": 0.7,
}  # fmt: skip
FAILED = {"implementation": "eager", "absent": "is wrong: off by 3", "failed": True}


def test_the_table_comes_last_when_a_step_fails(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(scratch: Path, out: Path) -> Iterator[tuple[str, str]]:
        (out / "shift.json").write_text(json.dumps({"rows": [ROW, {**ROW, **FAILED}]}))
        (out / "evidential.json").write_text("{")
        yield "shift", "exit status 1, 3 s"
        assert json.loads((out / "gpu.json").read_text())["steps"] == {
            "shift": "exit status 1, 3 s"
        }
        raise ValueError("of this program")

    monkeypatch.setattr(gpu, "steps", steps)
    assert gpu.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("NVIDIA H100")
    assert "this program       ValueError: of this program" in lines
    assert lines[-2].endswith("70 % of the floor")  # with no other one beside it
    assert lines[-1] == "FAILED: shift_features 8 x 4 eager: is wrong: off by 3"


def test_a_step_that_hangs_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    assert gpu.outcome_of([sys.executable, "-c", parent], 1.5, {}) == "stopped after 2 s"
    assert time.monotonic() - start < 2.5
    time.sleep(3)
    assert not mark.exists()


def test_what_a_step_says_of_itself() -> None:
    assert gpu.outcome_of([sys.executable, "-c", "raise SystemExit(3)"], 60, {}).startswith(
        "exit status 3"
    )
    assert gpu.outcome_of(["no-such-program"], 60, {}).endswith("'no-such-program'")
    assert gpu.outcome_of([sys.executable], 0.5, {}) == "left out: no time was left"


def test_benchmarks_start_without_what_may_be_missing_there() -> None:
    """No DALI, no command line library, no plots: only what is named is imported."""
    code = (
        "import sys\n"
        f"for name in {FORBIDDEN}: sys.modules[name] = None\n"
        "import bench.__main__, tools.gpu, bench.evidential, bench.consistency, bench.shift\n"
        "import bench.training, bench.pipeline\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert done.returncode == 0, done.stderr
