"""``make gpu``: a step that hangs, fails or lacks a package does not affect the others."""

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
from tools.gpu import Outcome, Runner

FORBIDDEN = ("nvidia", "yaml", "safetensors", "matplotlib", "scipy", "torchmetrics")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU that answers to its name; $OUT."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    return tmp_path


ROW = {
    "subject": "shift", "operator": "shift_features", "shape": "8 x 4", "implementation": "triton",
    "ours": True, "median_ms": 0.01, "called_ms": 0.05, "share_of_floor": 0.7,
}  # fmt: skip
FAILED = {"implementation": "eager", "absent": "is wrong: off by 3", "failed": True}


def test_a_part_that_fails_leaves_the_others_and_the_table_comes_last(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(part: str, runner: Runner, out: Path) -> Iterator[Outcome]:
        if part == "tests":
            yield Outcome("tests", "failed", "exit status 1, 3 s")
            steps = json.loads((out / "gpu.json").read_text())["steps"]
            assert steps == [{"step": "tests", "status": "failed", "detail": "exit status 1, 3 s"}]
            raise ValueError("of this program")
        (out / "shift.json").write_text(json.dumps({"rows": [ROW, {**ROW, **FAILED}]}))
        (out / "evidential.json").write_text("{")
        yield Outcome(part, "ok")

    monkeypatch.setattr(gpu, "steps", steps)
    assert gpu.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("NVIDIA H100")
    assert "tests              failed, ValueError: of this program" in lines
    assert "training           ok" in lines
    assert lines[-2].endswith("10.0 us replayed      50.0 us as called   70 % of the floor")
    assert lines[-1] == "FAILED: shift_features 8 x 4 eager: is wrong: off by 3"
    assert gpu.main(["operators"]) == 0


def test_our_own_times_are_shown_where_their_rivals_took_too_long(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(part: str, runner: Runner, out: Path) -> Iterator[Outcome]:
        (out / "ours.json").write_text(json.dumps({"rows": [ROW]}))
        yield Outcome("shift", "failed", "stopped after 100 s")

    monkeypatch.setattr(gpu, "steps", steps)
    assert gpu.main(["operators"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("70 % of the floor")


def test_ours_come_before_their_rivals_and_every_subject_gets_its_share(
    pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str], float]] = []

    def run(self: Runner, step: str, command: list[str], limit: float = 0) -> Outcome:
        asked.append((step, command, limit))
        self.end -= 100  # it takes 100 s
        return Outcome(step, "ok")

    monkeypatch.setattr(Runner, "run", run)
    runner = Runner(570)
    assert all(outcome.status == "ok" for outcome in gpu.operators(runner, pretended))
    assert [step for step, _, _ in asked] == ["ours", *gpu.OPERATORS]
    assert "--ours" in asked[0][1] and all("--ours" not in command for _, command, _ in asked[1:])
    assert [round(limit) for _, _, limit in asked] == [150, 157, 185, 270]


def test_each_part_ends_within_ten_minutes() -> None:
    assert gpu.SECONDS < 600
    outcome = Runner(0.5).run("late", [sys.executable])
    assert outcome == Outcome("late", "left out", "no time was left")


def test_a_step_that_hangs_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    outcome = Runner(60).run("hangs", [sys.executable, "-c", parent], 1.5)
    assert outcome == Outcome("hangs", "failed", "stopped after 2 s")
    assert time.monotonic() - start < 2.5
    time.sleep(3)
    assert not mark.exists()


def test_how_a_step_ended_is_said_in_a_line() -> None:
    outcome = Runner(60).run("exits", [sys.executable, "-c", "raise SystemExit(3)"])
    assert outcome.status == "failed" and outcome.detail.startswith("exit status 3")
    outcome = Runner(60).run("missing", ["no-such-program"])
    assert outcome.status == "failed" and outcome.detail.endswith("'no-such-program'")
    assert Runner(60).run("works", [sys.executable, "-c", ""]).status == "ok"


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        gpu.main(["speed"])
    assert exit.value.code == 2 and "speed" in capsys.readouterr().err


def test_benchmarks_start_without_packages_that_may_be_missing_there() -> None:
    """No DALI, no command line library, no plots: nothing is imported but what is needed."""
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
