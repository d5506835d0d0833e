"""Launches of the operators on a GPU, through Triton's own launcher, without a GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from bench import host, stub
from bench.machine import ROOT
from bench.rows import Options
from bench.stub import Launch

pytestmark = pytest.mark.skipif(bool(stub.obstacle()), reason=stub.obstacle())
H100_SHARED = 232448


@pytest.fixture(scope="module")
def launched() -> dict[str, list[Launch]]:
    """The launches of every call of launching.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.launching"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        call: [Launch(name, tuple(grid), threads, shared) for name, grid, threads, shared in own]
        for call, own in found.items()
    }


def programs(launch: Launch) -> int:
    return math.prod(launch.grid)


def test_every_launch_fits_on_the_chip(launched: dict[str, list[Launch]]) -> None:
    for launch in (launch for own in launched.values() for launch in own):
        assert 0 < launch.grid[0] < 2**31 and 0 < launch.grid[1] < 65536
        assert 0 < launch.grid[2] < 65536
        assert 32 <= launch.threads <= 1024 and launch.shared <= H100_SHARED, launch


@pytest.mark.parametrize(
    ("call", "pairs"),
    [("two views", 2), ("three views", 6), ("ids", 2), ("float32", 2), ("one row", 2),
     ("no queue", 2), ("one direction", 1), ("misaligned", 1)],
)  # fmt: skip
def test_one_sweep_serves_all_ordered_pairs_and_their_gradients(
    call: str, pairs: int, launched: dict[str, list[Launch]]
) -> None:
    sweeps = [launch for launch in launched[call] if launch.kernel == "sweep_kernel"]
    assert len(sweeps) == 1 and sweeps[0].grid[2] == pairs
    # The sweep and the join of its splits; with ids, their numbers first.
    assert len(launched[call]) <= 2 + (call == "ids")


def test_a_small_batch_is_swept_by_enough_programs_to_fill_the_chip(
    launched: dict[str, list[Launch]],
) -> None:
    """There are few keys here, so that each tile of them is at most one program."""
    sweep = launched["one row"][0]
    assert sweep.grid[0] == 1 and 5 <= sweep.grid[1] <= 20


@pytest.mark.parametrize("call", ["no row", "fusion loss, no row", "shift, no row"])
def test_nothing_is_launched_for_no_rows(call: str, launched: dict[str, list[Launch]]) -> None:
    assert launched[call] == []


@pytest.mark.parametrize(
    "call",
    ["fusion loss", "fusion loss, 300 classes", "fusion loss, probabilities",
     "fusion loss, by row"],
)  # fmt: skip
def test_the_fusion_loss_reads_its_rows_once(call: str, launched: dict[str, list[Launch]]) -> None:
    rows = [launch for launch in launched[call] if "rows" in launch.kernel]
    assert len(rows) == 1 and 1 <= programs(rows[0]) <= 37
    assert len(launched[call]) <= 2


@pytest.mark.parametrize(
    ("call", "kernel"),
    [("shift", "shift_kernel"), ("shift, posteriors", "shift_kernel"),
     ("shift, misaligned", "shift_kernel"), ("shift, directions", "combine_kernel")],
)  # fmt: skip
def test_the_shift_is_one_launch(call: str, kernel: str, launched: dict[str, list[Launch]]) -> None:
    (launch,) = launched[call]
    assert launch.kernel == kernel and 1 <= programs(launch) <= 37 * 96


@pytest.mark.parametrize("call", ["moments", "moments, posteriors", "fuse"])
def test_moments_and_fusion_are_at_most_two_launches(
    call: str, launched: dict[str, list[Launch]]
) -> None:
    assert 1 <= len(launched[call]) <= 2


@pytest.mark.parametrize("call", ["update", "update, posteriors"])
def test_an_update_of_the_statistics_is_two_launches(
    call: str, launched: dict[str, list[Launch]]
) -> None:
    assert [launch.kernel for launch in launched[call]] == ["moments_kernel", "update_kernel"]


def test_the_bound_is_one_launch_each_way(launched: dict[str, list[Launch]]) -> None:
    assert [launch.kernel for launch in launched["bound"]] == [
        "bound_kernel", "bound_gradient_kernel"
    ]  # fmt: skip
    assert [launch.kernel for launch in launched["bound, many rows"]] == [
        "bound_kernel", "bound_sum_kernel", "bound_gradient_kernel"
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["bound, many classes", "bound, directions"])
def test_the_bound_with_a_table_of_its_own_is_at_most_three_launches(
    call: str, launched: dict[str, list[Launch]]
) -> None:
    assert 1 <= len(launched[call]) <= 3


def test_host_time_and_launches_of_every_operator_are_measured() -> None:
    """One round of the benchmark, whose times say nothing here."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.host", "1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len({(r["operator"], r["shape"], r["implementation"]) for r in rows})
    passes = {(row["operator"], row["implementation"]) for row in rows}
    for operator in ("multimodal_consistency_loss", "evidential_fusion_loss", "evidential_loss",
                     "fuse_evidence", "shifted_cross_entropy"):  # fmt: skip
        assert {(operator, "forward"), (operator, "forward + backward")} <= passes
    assert {"shift_features", "class_moments", "ClassStatistics.update"} <= {
        operator for operator, _ in passes
    }
    assert all(row["host_us"] > 0 and row["launches"] >= 1 for row in rows)


def test_only_what_launches_is_counted_among_the_operators_of_torch() -> None:
    x = torch.ones(4, 4)
    with torch.autograd.profiler.profile() as profiled:
        y = x.T.reshape(2, 8).unsqueeze(0)[:, :1]  # views and one copy
        y.sum().add(torch.zeros(())).expand(3)  # a sum, a fill, an addition
        torch.empty(3).to(torch.float64)  # a conversion
    roots = [event for event in profiled.function_events if event.cpu_parent is None]
    assert sum(map(host.kernels_of, roots)) == 5


def test_beside_a_gpu_nothing_is_put_in_the_place_of_its_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = Options(torch.device("cuda"), full=False, threads=1, budget=1.0, end=math.inf)
    (row,) = host.rows(options)
    assert "a GPU that is there" in row["absent"] and "failed" not in row
    with pytest.raises(RuntimeError, match="no stand-in for the CUDA driver"):
        stub.install()
