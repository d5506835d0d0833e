"""The configurations of the project: each is a complete set of options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mics_fast import train
from mics_fast.options import FinetuneConfig, wants_unlabelled
from mics_fast.options.commands import parse_experiment, parse_train
from mics_fast.study.variants import RECIPES

CONFIGS = Path(__file__).parents[3] / "configs"
SUPERVISED = ["--config", str(CONFIGS / "supervised.yaml")]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_is_understood(file):
    arguments = ["--config", str(file), "--data.manifest", "manifest.csv", "--out", "out"]
    if "experiment:" in file.read_text():
        parse_experiment(arguments)
    else:
        parse_train(arguments)


def test_the_baseline_is_the_supervised_variant_of_an_experiment():
    config = parse_train(SUPERVISED).config
    assert config.stage == "finetune" and config.finetune.init == "none"
    wanted = replace(FinetuneConfig(), init="none", **RECIPES["supervised"].finetune)
    assert config.finetune == wanted
    assert not wants_unlabelled(config.finetune)


def test_the_baseline_changes_nothing_of_the_network_before_it():
    demo = ["--config", str(CONFIGS / "demo.yaml")]
    alone, both = parse_train(demo)[0], parse_train([*demo, *SUPERVISED])[0]
    assert both.model == alone.model and both.data == alone.data
    assert both.finetune.steps == alone.finetune.steps


def test_the_baseline_trains_on_labelled_rows_alone(few_steps, phantom_manifest, tmp_path):
    run = tmp_path / "run"
    arguments = [*few_steps, *SUPERVISED, "--finetune.sampling", "balanced"]
    train.main([*arguments, "--data.manifest", str(phantom_manifest), "--out", str(run)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"finetune"}
    terms = {name for line in lines for name in line if name.startswith("loss_")}
    assert terms == {"loss_supervised"}
