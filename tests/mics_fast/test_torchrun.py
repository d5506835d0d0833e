"""``torchrun``: two processes make the run of one, and resume after one of them is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mics_fast import evaluate, train
from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import Checkpoints


def torchrun(*options: str) -> list[str]:
    """The command line of a training in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*launcher, *options, "-m", "mics_fast.train"]


@pytest.fixture(scope="module")
def arguments(few_steps, phantom_manifest):
    return [*few_steps, "--checkpoint_every", "1", "--data.manifest", str(phantom_manifest)]


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    """A run of two processes."""
    run = tmp_path_factory.mktemp("two") / "run"
    subprocess.run([*torchrun(), *arguments, "--out", str(run)], check=True)
    return run


def records(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The last record of each step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {(line["stage"], line["step"]): line for line in lines}


def logged(run: Path) -> bool:
    """True from the first step on."""
    file = run / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    path = Checkpoints(run / "checkpoints" / stage).latest()
    return torch.load(path / "state.pt", weights_only=True)["stage"]


def assert_same_run(run: Path, wanted: Path) -> None:
    """Losses and weights agree to rounding; a run of three steps is off by 1e-7 to 1e-6."""
    got = records(run)
    for step, record in records(wanted).items():
        for name in record:
            if name.startswith(("loss", "gradient_norm", "val_")):
                assert got[step][name] == pytest.approx(record[name], rel=1e-4, abs=1e-6), name
    for stage in ("pretrain", "finetune"):
        ours, theirs = weights(run, stage), weights(wanted, stage)
        assert ours.keys() == theirs.keys()
        # Over all weights: Adam makes steps of the rounding of gradients that should be 0.
        flat = [torch.cat([w[name].double().flatten() for name in ours]) for w in (ours, theirs)]
        assert (flat[0] - flat[1]).norm() < 1e-4 * flat[1].norm()


def test_two_processes_make_the_run_of_one(two, trained_run):
    assert_same_run(two, trained_run)


def test_one_process_goes_on_with_the_checkpoint_of_two(two, trained_run, arguments, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "finetune" / "step-00000003")
    (run / "checkpoints" / "finetune" / "best.json").unlink(missing_ok=True)
    train.main([*arguments, "--out", str(run), "--resume"])
    assert_same_run(run, trained_run)


def test_two_processes_with_a_part_each_make_the_run_of_one(
    arguments, trained_run, tmp_path, phantom_manifest
):
    run = tmp_path / "run"
    sharded = [*arguments, "--shard_parameters", "true", "--out", str(run)]
    done = subprocess.run([*torchrun(), *sharded], check=True, stdout=subprocess.PIPE, text=True)
    assert_same_run(run, trained_run)
    (result,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert json.loads(result.removeprefix("RESULT "))["finished"]
    # Each process walks the val rows, but one tells.
    assert done.stdout.count("k-NN accuracy") == 3
    whole = weights(run, "finetune")
    shutil.rmtree(run / "checkpoints" / "finetune" / "step-00000003")
    (run / "checkpoints" / "finetune" / "best.json").unlink(missing_ok=True)
    subprocess.run([*torchrun(), *sharded, "--resume"], check=True)
    resumed = weights(run, "finetune")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    evaluate.main([str(run), "--resamples", "5"])


def test_a_killed_process_is_started_again_and_changes_nothing(two, arguments, tmp_path):
    run = tmp_path / "run"
    command = [*torchrun("--max-restarts", "1"), *arguments, "--out", str(run), "--resume"]
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/pretrain/step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert process.wait() == 0
    told = (tmp_path / "stderr").read_text()
    assert "exitcode: -9" in told, "the run was over before one of its processes was killed"
    assert "Traceback" not in told
    for stage in ("pretrain", "finetune"):
        whole, restarted = weights(two, stage), weights(run, stage)
        assert whole.keys() == restarted.keys()
        for name in whole:
            assert torch.equal(whole[name], restarted[name]), name
    assert records(run)["finetune", 3]["loss"] == records(two)["finetune", 3]["loss"]


def processes_of(run: Path) -> list[int]:
    """The processes that were started with this run folder, and have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in status.read_bytes().split(b"\0"):
                found.append(int(status.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_sigterm_to_torchrun_saves_once_and_ends_all_processes(
    few_steps, phantom_manifest, tmp_path
):
    run = tmp_path / "run"
    endless = ["--data.manifest", str(phantom_manifest), "--pretrain.steps", "1000000",
               "--checkpoint_every", "0", "--checkpoint_minutes", "0"]  # fmt: skip
    command = [*torchrun(), *few_steps, *endless, "--stage", "pretrain", "--out", str(run)]
    with open(tmp_path / "stdout", "w") as stdout:
        process = subprocess.Popen(command, stdout=stdout)
        deadline = time.monotonic() + 120
        while not logged(run) and time.monotonic() < deadline:  # before, nothing would be saved
            time.sleep(0.05)
        assert len(processes_of(run)) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1  # of torchrun, which raises an exception of its own
    assert (
        f"stopped and saved: resume with --resume --out {run}" in (tmp_path / "stdout").read_text()
    )
    assert processes_of(run) == []
    (saved,) = (run / "checkpoints" / "pretrain").iterdir()
    _, last = max(records(run))
    assert saved.name == f"step-{last:08d}"


TWO_MACHINES = """
import os, signal, sys, torch
from pathlib import Path
from mics_fast.engine.distributed import joined, rank, sum_over_ranks
with joined(torch.device("cpu")):
    sum_over_ranks(torch.ones(1))
    fault = Path(sys.argv[1])
    if rank() == 1 and not fault.exists():
        fault.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    together = int(sum_over_ranks(torch.ones(1)))
    print("together", together, "start", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
"""


def test_after_a_fault_on_one_machine_both_start_again_and_find_each_other(tmp_path):
    """Two launchers on the loopback, whose counts of starts may differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "work.py").write_text(TWO_MACHINES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
               "--max-restarts", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x",
               "--monitor-interval", "0.2", str(tmp_path / "work.py"),
               str(tmp_path / "fault")]  # fmt: skip
    machines = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    # The launcher without the fault counts a start only if it saw its own process fail in between.
    counted, maybe_counted = sorted(told, reverse=True)
    assert counted == "together 2 start 1\n"
    assert maybe_counted in ("together 2 start 0\n", "together 2 start 1\n")


@pytest.mark.parametrize(
    ("processes", "options", "sentence"),
    [
        (1, [], "shard_parameters is on, wanted several processes"),
        (2, ["--precision", "fp16"], "precision is fp16, wanted another with shard_parameters"),
        (2, ["--compile", "on", "--compile_scope", "step"], "compile_scope is step, wanted blocks"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    arguments, tmp_path, monkeypatch, processes, options, sentence
):
    monkeypatch.setattr("mics_fast.training.trainer.world_size", lambda: processes)
    options = [*options, "--shard_parameters", "true", "--out", str(tmp_path / "run")]
    with pytest.raises(InputError, match=sentence):
        train.main([*arguments, *options])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--pretrain.batch_size", "9"], "pretrain.batch_size is 9, wanted a multiple of 2, "),
        (["--finetune.labelled_batch", "5"], "finetune.labelled_batch is 5, wanted a multiple of"),
        (
            ["--finetune.unlabelled_batch", "9", "--finetune.accumulate", "3"],
            "finetune.unlabelled_batch is 9, wanted a multiple of 6, .* finetune.accumulate, 3",
        ),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(
    arguments, tmp_path, monkeypatch, options, sentence
):
    monkeypatch.setattr("mics_fast.training.trainer.world_size", lambda: 2)
    with pytest.raises(InputError, match=sentence):
        train.main([*arguments, *options, "--out", str(tmp_path / "run")])
