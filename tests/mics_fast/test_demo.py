"""The demo: its conclusions follow from its figures."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from mics_fast.options.commands import read_config
from tests.test_examples import load


def scores(demo: ModuleType, alone: float, full: float, rest: float) -> str:
    make = demo.Score
    return demo.verdict(
        make(wli=40.0, nbi=30.0, fused=alone, rest=60.0, seconds=1.0),
        make(wli=60.0, nbi=70.0, fused=full, rest=rest, seconds=1.0),
        pairs=800,
    )


def test_the_demo_says_what_its_figures_say() -> None:
    demo = load("demo")
    better = scores(demo, alone=60.0, full=80.0, rest=88.0)
    assert "made the classifier better: 80.0 against 60.0 %" in better and "+20.0" in better
    assert "gained 10.0 points over NBI alone" in better and "raised accuracy" in better
    assert "88.0 %" in better
    worse = scores(demo, alone=80.0, full=60.0, rest=55.0)
    assert "made the classifier worse" in worse and "lost 10.0 points over NBI" in worse
    assert "lowered accuracy" in worse


def test_the_demo_draws_no_conclusion_from_noise() -> None:
    text = scores(load("demo"), alone=78.0, full=80.0, rest=88.0)
    # Two binomial standard errors of the difference on 800 pairs: 2 * sqrt(0.2145 + 0.2) = 4.1.
    assert "no difference that these test pairs can tell" in text
    assert "two standard errors are 4.1" in text


def test_the_demo_refers_the_least_certain_fifth() -> None:
    rows = [(0.1 * k, k < 7) for k in range(10)]  # the three least certain are wrong
    assert load("demo").accuracy_of_rest(rows) == 100 * 7 / 8


def test_the_demo_trains_labels_alone_as_long_as_the_full_method(phantom_manifest: Path) -> None:
    demo = load("demo")
    config = read_config(demo.CONFIG)
    steps = demo.steps_as_long_as_full(demo.CONFIG, phantom_manifest)
    assert config.finetune.steps is not None and steps > config.finetune.steps
