"""Agreement before time, the command line, and the gate against lost ground."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import consistency, evidential, shift, timing
from bench.case import Case, Rival, Rivals, checked
from bench.memory import extra_megabytes
from bench.publish.compare import lost_ground
from bench.roofline import Work

CPU = torch.device("cpu")


def rivals_of(**steps: Any) -> Rivals:
    """Implementations whose results are all right."""
    return Rivals(
        lambda: None,
        {
            name: Rival(step, lambda result: None, lambda leaf, step=step: step())
            for name, step in steps.items()
        },
    )


def with_step(case: Case, name: str, wrong: Any) -> Case:
    """Replace one implementation of the case, on tiny inputs.

    Inputs of "eager" are not tiny, because its noise is checked by its variance.
    """

    def make(device: torch.device, tiny: bool) -> Any:
        rivals = case.make(device, name != "eager")
        rival = rivals.found[name]
        spoilt = dataclasses.replace(rival, step=wrong(rival.step))
        return dataclasses.replace(rivals, found={name: spoilt})

    return dataclasses.replace(case, make=make)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (consistency.cases(CPU)[0], "chunked, recomputed"),
        (consistency.cases(CPU)[0], "attention (SDPA)"),
        (consistency.cases(CPU)[-1], "cross_entropy eager"),
        (evidential.cases(CPU)[0], "textbook float32"),
        (shift.cases(CPU)[0], "reference"),
        (shift.cases(CPU)[0], "eager"),
        (shift.cases(CPU)[-1], "one-hot, E[x^2]"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.operator,
)
def test_a_result_that_is_wrong_by_five_percent_is_never_timed(case: Case, name: str) -> None:
    right = checked(with_step(case, name, lambda step: step), CPU)
    assert list(right.found) == [name] and right.failed == {}

    def wrong(step: Any) -> Any:
        def call() -> Any:
            result = step()
            if isinstance(result, torch.Tensor):
                return 1.05 * result
            return [1.05 * one for one in result]

        return call

    left = checked(with_step(case, name, wrong), CPU)
    assert left.found == {} and "is wrong" in left.failed[name]


def test_an_implementation_that_raises_an_error_leaves_the_others() -> None:
    def make(device: torch.device, tiny: bool) -> Rivals:
        return rivals_of(cpu=lambda: 1, eager=lambda: 1 // 0)

    left = checked(Case("shift_features", "", Work(1, 1), make, batch=1), CPU)
    assert list(left.found) == ["cpu"]
    assert left.failed == {"eager": "ZeroDivisionError: integer division or modulo by zero"}


def row(ratio: float | None, implementation: str = "eager", **others: Any) -> dict[str, Any]:
    label = {"subject": "shift", "operator": "shift_features", "shape": "8 x 4", "threads": 2}
    return {**label, "implementation": implementation, "ours": False, "ratio": ratio, **others}


def test_an_operator_that_keeps_four_fifths_of_its_lead_passes() -> None:
    assert lost_ground([row(4.1), row(9.0, "compiled")], [row(5.0), row(3.0, "compiled")]) == []


def test_an_operator_that_lost_more_than_a_fifth_is_named_with_both_ratios() -> None:
    (sentence,) = lost_ground([row(3.9), row(9.0, "compiled")], [row(5.0), row(9.0, "compiled")])
    assert "shift_features" in sentence and "3.90" in sentence and "5.00" in sentence


def test_a_faster_variant_of_our_own_is_no_lost_ground() -> None:
    now, before = row(0.2, "DALI, host cache", ours=True), row(0.4, "DALI, host cache", ours=True)
    assert lost_ground([now, row(5.0)], [before, row(5.0)]) == []


def test_results_that_have_nothing_in_common_do_not_pass() -> None:
    (sentence,) = lost_ground([row(5.0)], [row(5.0, threads=1), row(None, "absent")])
    assert "nothing" in sentence


@pytest.fixture
def tiny_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject "shift" on tiny inputs, without a compiler."""
    cases = [
        dataclasses.replace(case, make=lambda device, tiny, make=case.make: make(device, True))
        for case in shift.cases(CPU)
    ]
    monkeypatch.setattr(shift, "cases", lambda device: cases)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_one_command_measures_a_subject_stores_it_and_compares(
    tmp_path: Path,
    tiny_shift: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"

    def bench(*arguments: object) -> int:
        given = ["--quick", "--only", "shift", "--budget", 0, "--device", "cpu", *arguments]
        monkeypatch.setattr("sys.argv", ["bench", *map(str, given)])
        return command.main()

    assert bench("--json", first) == 0
    stored = json.loads(first.read_text())
    known = {"torch", "triton", "cuda", "cpu", "threads", "commit", "command", "gpu", "cpu_clock"}
    assert known <= set(stored["machine"])
    own = next(row for row in stored["rows"] if row["ours"])
    assert own["min_ms"] <= own["p20_ms"] <= own["median_ms"] <= own["p80_ms"]
    assert own["bytes"] > 0 and own["share_of_floor"] > 0 and own["bandwidth"] > 0
    assert stored["peaks"]["1"]["matrix_flops"] > 0
    assert "shift_features" in capsys.readouterr().out
    for base in stored["rows"]:
        base["ratio"] *= 1000
    first.write_text(json.dumps(stored))
    assert bench("--json", second, "--compare", first) == 1
    assert "times as long as ours, and took" in capsys.readouterr().out


def test_a_run_that_is_stopped_leaves_what_it_has_measured(
    tmp_path: Path, tiny_shift: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    cases = shift.cases(CPU)

    def stop(device: torch.device, tiny: bool) -> Any:
        raise KeyboardInterrupt

    second = dataclasses.replace(cases[1], make=stop)
    monkeypatch.setattr(shift, "cases", lambda device: [cases[0], second])
    arguments = ["--quick", "--only", "shift", "--budget", "0", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        command.main()
    measured = {row["implementation"] for row in json.loads(path.read_text())["rows"]}
    assert {"cpu", "eager", "copy"} <= measured


def test_a_case_that_fails_is_reported_and_the_others_are_measured(
    tmp_path: Path,
    tiny_shift: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "result.json"
    cases = shift.cases(CPU)

    def fail(device: torch.device, tiny: bool) -> Any:
        raise RuntimeError("out of memory")

    first = dataclasses.replace(cases[0], make=fail)
    monkeypatch.setattr(shift, "cases", lambda device: [first, cases[-1]])
    arguments = ["--quick", "--only", "shift", "--budget", "0", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--json", str(path)])
    assert command.main() == 1
    failed, *others = json.loads(path.read_text())["rows"]
    assert failed["failed"] and failed["absent"] == "RuntimeError: out of memory"
    assert any(row["ours"] for row in others)
    assert "FAILED (RuntimeError: out of memory)" in capsys.readouterr().out


def test_what_no_time_is_left_for_is_not_begun(
    tmp_path: Path, tiny_shift: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    arguments = ["--quick", "--only", "shift", "--limit", "0", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--json", str(path)])
    assert command.main() == 0
    reasons = {row["absent"] for row in json.loads(path.read_text())["rows"]}
    assert reasons == {"no time was left"}


def test_work_is_counted_for_every_case() -> None:
    for module in (evidential, consistency, shift):
        for case in module.cases(CPU):
            assert isinstance(case.work, Work) and case.work.bytes > 0 and case.work.flops > 0


def test_memory_is_what_a_call_takes_beyond_its_inputs() -> None:
    case = next(case for case in shift.cases(CPU) if case.operator == "class_moments")
    step = case.make(CPU, False).found["one-hot"].step
    measured = extra_megabytes("shift", case, "one-hot", step, CPU)
    assert measured is not None
    squares = 2 * 4 * 8192 * shift.DIM / 2**20  # x - mean[y], and its square
    assert 0.9 * squares < measured < 1.3 * squares


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU with the L2 cache of an H100; captured steps are called directly."""

    def captured(steps: list[Any]) -> Any:
        return lambda: [step() for step in steps]

    monkeypatch.setattr(timing, "captured", captured)
    cache = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)


@pytest.mark.parametrize(("took", "copies"), [(50e-6, 7), (400e-6, 1)])
def test_short_calls_on_a_gpu_go_round_inputs_larger_than_its_cache(
    took: float, copies: int, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def make(device: torch.device, tiny: bool) -> Rivals:
        number = len(made)
        made.append(number)
        rivals = rivals_of(triton=lambda: number, eager=lambda: number)
        rivals.found["eager"] = dataclasses.replace(rivals.found["eager"], compiled=True)
        return rivals

    monkeypatch.setattr(timing, "seconds", lambda *arguments: (took, 0.0))
    case = Case("shift_features", "", Work(25 * 2**20, 1), make, batch=1)
    timed = timing.on_gpu(case, make(CPU, False), CPU)
    assert timed["triton"].run() == list(range(copies)) and timed["triton"].calls == copies
    assert timed["eager"].run() == 0 and timed["eager"].calls == 1


@pytest.mark.parametrize("module", [evidential, consistency, shift])
def test_the_inputs_of_every_short_case_alone_exceed_the_cache(module: Any, gpu: None) -> None:
    """At least two fifths of what a case moves are inputs, which is all that must be read anew."""
    for case in module.cases(torch.device("cuda")):
        assert timing.copies_for(case, CPU) < timing.MOST_COPIES
        assert 0.4 * case.work.bytes * timing.copies_for(case, CPU) > 50 * 2**20


def test_what_no_graph_captures_is_called(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(steps: list[Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "captured", refuse)
    rivals = rivals_of(triton=lambda: 7)
    case = Case("shift_features", "", Work(1, 1), lambda device, tiny: rivals, batch=1)
    timed = timing.on_gpu(case, rivals, CPU)["triton"]
    assert (timed.run(), timed.calls, timed.replayed) == (7, 1, False)
    assert "triton: not captured as a CUDA graph" in capsys.readouterr().out


def test_a_call_is_timed_as_a_user_makes_it_without_the_making_of_its_inputs() -> None:
    clock = [0.0]

    def fresh() -> list[float]:
        clock[0] += 5.0
        return []

    def call(leaf: list[float]) -> None:
        assert leaf == []  # new inputs for each call
        leaf.append(1.0)
        clock[0] += 2.0

    rivals = Rivals(fresh, {"cpu": Rival(lambda: None, lambda result: None, call, ours=True)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: clock[0])
        taken = timing.seconds_as_called(rivals.found["cpu"], rivals, CPU, 3)
    assert taken == 2.0


@pytest.mark.parametrize("module", [evidential, consistency, shift])
def test_a_call_gives_what_a_step_gives(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of new inputs, or the features that are checked."""
    monkeypatch.setattr(consistency, "QUEUE", 64)
    rivals = module.cases(CPU)[0].make(CPU, True)
    for name in {"cpu", "reference", "ALBEF eager"} & set(rivals.found):
        leaf = rivals.fresh()
        result = rivals.found[name].call(leaf)
        if result is not None:
            rivals.found[name].check(result)
            continue
        wanted = rivals.found[name].step()
        leaves = leaf if isinstance(leaf, list) else [leaf]
        for one, gradient in zip(leaves, wanted[1:], strict=True):
            torch.testing.assert_close(one.grad, gradient)


def test_our_operators_can_be_measured_alone(
    tmp_path: Path, tiny_shift: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    arguments = ["--quick", "--ours", "--only", "shift", "--budget", "0", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--json", str(path)])
    assert command.main() == 0
    assert {row["implementation"] for row in json.loads(path.read_text())["rows"]} == {"cpu"}
