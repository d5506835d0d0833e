"""Kill a run again and again, also while it writes a checkpoint: it ends as if it never stopped.

CI kills three times; ``make drill`` twenty times (MICS_DRILL_KILLS).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mics_fast import prepare, train
from mics_fast.engine.checkpoint import Checkpoints

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
KILLS = int(os.environ.get("MICS_DRILL_KILLS", "3"))
RUN = [
    "--config", CONFIG, "--log_every", "1", "--checkpoint_every", "1",
    "--pretrain.steps", "null", "--finetune.steps", "null",
    "--pretrain.adversarial_weight", "0.1", "--pretrain.consistency_weight", "1",  # off in the demo
    "--pretrain.batch_size", "8", "--pretrain.epochs", str(2 + KILLS),
    "--finetune.labelled_batch", "6", "--finetune.unlabelled_batch", "8",
    "--finetune.epochs", str(2 + KILLS),
]  # fmt: skip


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def writes_a_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("*/.partial-step-*"))


def kill_when(arguments: list[str], reached: Callable[[], bool]) -> bool:
    """Start the run and kill it at a moment; False where it ended before."""
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(
            [sys.executable, "-m", "mics_fast.train", *arguments], stdout=nowhere
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and not reached() and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        return process.wait() == -signal.SIGKILL


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for stage in ("pretrain", "finetune"):
        path = Checkpoints(run / "checkpoints" / stage).latest()
        assert path is not None
        state = torch.load(path / "state.pt", weights_only=True)
        weights |= {f"{stage}.{name}": value for name, value in state["stage"].items()}
    return weights


def moment(run: Path, number: int, chance: random.Random) -> Callable[[], bool]:
    """Some steps from here: by turns while a checkpoint is being written, or at any time."""
    steps, pause = steps_logged(run) + chance.randint(1, 3), chance.random() * 0.2

    def reached() -> bool:
        if steps_logged(run) < steps:
            return False
        if number % 2 == 0:
            return writes_a_checkpoint(run)
        time.sleep(pause)
        return True

    return reached


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("phantom")
    split = ["--split", "0.5", "0.25", "0.25"]
    prepare.main(["phantom", "--out", str(folder), "--pairs", "48", *split])
    return str(folder / "manifest.csv")


def test_a_run_that_is_killed_again_and_again_ends_the_same(manifest: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main([*RUN, "--data.manifest", manifest, "--out", str(whole)])
    arguments = [*RUN, "--data.manifest", manifest, "--out", str(killed), "--resume"]
    moments, kills = random.Random(0), 0
    for number in range(KILLS):
        kills += kill_when(arguments, moment(killed, number, moments))
    assert kills == KILLS, "the run was over before it was killed as often as it should be"
    train.main(arguments)
    wanted, got = final_weights(whole), final_weights(killed)
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert torch.equal(wanted[name], got[name]), name
