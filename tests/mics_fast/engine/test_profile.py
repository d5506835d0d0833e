"""The profiler leaves a trace and a table of the phases of a step."""

from __future__ import annotations

import json

import torch

from mics_fast.engine.profile import PHASES, WARM_UP, phase, profiled


def run_steps(steps, asked, folder):
    weight = torch.ones(64, 64, requires_grad=True)
    with profiled(asked, folder, "pretrain") as after_step:
        for _ in range(steps):
            for name in PHASES:
                with phase(name):
                    (weight @ weight).sum().backward()
            after_step()


def test_a_trace_and_a_table_of_the_phases_are_written(tmp_path):
    run_steps(WARM_UP + 4, 2, tmp_path / "profile")
    events = json.loads((tmp_path / "profile" / "pretrain.json").read_text())["traceEvents"]
    for name in PHASES:
        spans = [event for event in events if event.get("name") == name]
        assert len(spans) == 2, f"two steps were asked for, {name}"
    lines = (tmp_path / "profile" / "pretrain.txt").read_text().splitlines()
    assert lines[0].startswith("2 steps")
    shares = {line.split()[0]: float(line.split()[2].rstrip("%")) for line in lines[2:7]}
    assert set(shares) == set(PHASES) and 99 < sum(shares.values()) < 101
    assert all(share > 0 for share in shares.values())


def test_a_run_that_is_too_short_says_so(tmp_path, capsys):
    run_steps(2, 2, tmp_path / "profile")
    assert "nothing was profiled" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_nothing_is_profiled_unless_asked(tmp_path):
    run_steps(WARM_UP + 4, 0, tmp_path / "profile")
    assert not (tmp_path / "profile").exists()
