"""Sharing of CPU threads: the rule, its overrides, its effect."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.data.decoding import new_pipeline
from mics_fast.engine import threads
from mics_fast.engine.threads import available_threads, cpu_quota, share_threads, use_threads
from mics_fast.options import DataConfig, TrainConfig, check_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.usefixtures("set_threads")  # tests elsewhere keep the number they had


@pytest.fixture(autouse=True)
def groups(tmp_path, monkeypatch):
    """groups(line, {file: text}): the control groups of this process; none until it is called."""

    def make(lines, files):
        (tmp_path / "cgroup").write_text(lines)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    monkeypatch.setattr(threads, "GROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "CONTROL_GROUPS", tmp_path)
    return make


@pytest.mark.parametrize(
    ("total", "on_cpu", "on_gpu"),
    [(1, (1, 1), (1, 1)), (2, (2, 1), (1, 1)), (8, (8, 2), (2, 6)), (32, (32, 8), (4, 28))],
)
def test_torch_gets_all_on_a_cpu_and_few_on_a_gpu(total, on_cpu, on_gpu):
    assert share_threads(total, CPU) == on_cpu
    assert share_threads(total, GPU) == on_gpu


def test_all_threads_are_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_threads() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_threads() == len(before)


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for processes, each in (("1", 8), ("2", 4), ("3", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert available_threads() == each


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),  # as in a container
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "250000 100000"}, 1),
        (
            "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
        (
            "1:cpu:/of/the/host\n",
            {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "what\n"}, None),
        ("", {}, None),
    ],
)
def test_the_quota_of_a_container_limits_the_threads(monkeypatch, groups, lines, files, quota):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    groups(lines, files)
    assert cpu_quota() == (float("inf") if quota is None else quota)
    assert available_threads() == {None: 8, 2.5: 3, 1.5: 2, 0.5: 1}.get(quota, quota)


def test_a_system_without_control_groups_has_no_quota(monkeypatch):
    monkeypatch.setattr(threads, "GROUPS_OF_PROCESS", Path("/nowhere/cgroup"))
    assert cpu_quota() == float("inf")


def test_a_system_without_affinities_counts_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_threads() == os.cpu_count()


def test_the_option_is_the_number_of_torch_and_of_the_operators():
    torch.set_num_threads(1)
    data = use_threads(TrainConfig(threads=3), CPU)
    assert torch.get_num_threads() == 3  # what every operator in C++ asks for at each call
    assert data.threads == 1 and data == DataConfig(threads=1)
    assert use_threads(TrainConfig(threads=12), CPU).threads == 3
    assert torch.get_num_threads() == 12


def test_without_the_option_torch_gets_no_more_than_the_environment_says(monkeypatch):
    monkeypatch.setattr(threads, "available_threads", lambda: 8)
    torch.set_num_threads(1)  # as with OMP_NUM_THREADS=1
    assert use_threads(TrainConfig(), CPU).threads == 2
    assert torch.get_num_threads() == 1
    torch.set_num_threads(6)
    assert use_threads(TrainConfig(), GPU).threads == 6
    assert torch.get_num_threads() == 2


def test_the_pipeline_s_own_option_counts():
    config = TrainConfig(threads=8, data=DataConfig(threads=5))
    assert use_threads(config, CPU).threads == 5


def test_a_pipeline_without_a_number_takes_its_share(monkeypatch):
    monkeypatch.setattr("mics_fast.data.decoding.available_threads", lambda: 12)
    assert new_pipeline(CPU, None, batch_size=1, prefetch=1).num_threads == 3
    assert new_pipeline(CPU, 2, batch_size=1, prefetch=1).num_threads == 2


@pytest.mark.parametrize("option", ["threads", "data.threads"])
def test_no_threads_at_all_are_refused(option):
    config = TrainConfig()
    owner = config.data if option.startswith("data") else config
    owner.threads = 0
    with pytest.raises(InputError, match=rf"option {option} is 0, wanted a number above 0"):
        check_config(config)
