"""Mistakes on a command line are refused in one sentence before anything is computed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mics_fast import evaluate, export, prepare, train
from mics_fast.__main__ import COMMANDS
from mics_fast.common.errors import InputError
from mics_fast.evaluation import tables
from mics_fast.evaluation.results import ClassMetrics, OpinionMetrics
from mics_fast.options import TrainConfig
from mics_fast.options.commands import parse_train
from mics_fast.training.run import refuse_changes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pretrain.epochs", "three"], "option pretrain.epochs is three, wanted int"),
        (["--device", "gpu"], "option device is gpu, wanted one of auto, cpu, cuda"),
        (
            ["--data.modalities", "wli"],
            "option data.modalities is wli, wanted a list such as [a, b] or null",
        ),
        (["--data.cache.side", "x"], "option data.cache.side is x, wanted int or null"),
        (
            ["--pretrain.augment.crop_scale", "3"],
            "option pretrain.augment.crop_scale is 3, wanted a list such as [a, b]",
        ),
        (
            ["--epochs", "3"],
            "option --epochs is unknown; did you mean --pretrain.epochs or --finetune.epochs?",
        ),
    ],
)
def test_an_option_that_does_not_fit_is_one_sentence(arguments, sentence):
    with pytest.raises(InputError) as error:
        parse_train(arguments)
    assert str(error.value) == sentence


def test_a_configuration_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"no\.yaml cannot be read: No such file"):
        parse_train(["--config", "no.yaml"])


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (prepare.main, ["phantom", "--out", "out", "--pair", "3"]),
        (evaluate.main, ["run", "--js", "file"]),
        (train.main, ["--pretrain.epoch", "3"]),
    ],
)
def test_a_shortened_option_is_not_guessed(command, arguments):
    with pytest.raises(InputError, match=f"option {arguments[-2]} is unknown; did you"):
        command(arguments)


def test_a_run_under_several_other_options_names_the_first_and_counts_the_rest(tmp_path):
    now = TrainConfig()
    now.seed, now.model.size, now.finetune.lr = 1, "vit_micro", 0.5
    with pytest.raises(InputError, match=r"option seed is 1, .* with 0 \(and 2 more differ\)"):
        refuse_changes(TrainConfig(), now, tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("labelled", "0", "has no train row with labelled = 1"),
        ("label", "polyp", "has one class, polyp, wanted at least two"),
    ],
)
def test_a_manifest_that_cannot_be_fine_tuned_on_is_refused_before_pre_training(
    few_steps, phantom_manifest, tmp_path, column, value, sentence
):
    with open(phantom_manifest, newline="") as file:
        rows = [{**row, column: value} for row in csv.DictReader(file)]
    for row in rows:
        row |= {name: str(phantom_manifest.parent / row[name]) for name in ("wli", "nbi")}
    manifest = tmp_path / "manifest.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=sentence):
        train.main([*few_steps, "--data.manifest", str(manifest), "--out", str(run)])
    assert not run.exists()


def test_a_class_name_is_never_cut_short():
    name = "dyed-resection-margins-after-treatment"
    values = {"sensitivity": 1.0, "specificity": 0.5}
    metrics = ClassMetrics(1, values, {"sensitivity": [0.0, 1.0], "specificity": [0.0, 1.0]})
    fused = OpinionMetrics(1, {}, {}, {name: metrics}, [[1]])
    console = Console(file=io.StringIO(), width=70)
    console.print(tables.class_table(SimpleNamespace(fused=fused)))
    shown = console.file.getvalue()
    assert "…" not in shown and "sensitivity" in shown


def test_the_package_names_every_command_that_can_be_run():
    package = Path(train.__file__).parent
    runnable = {
        file.stem for file in package.glob("*.py") if "run_command(main)" in file.read_text()
    }
    assert runnable == {*COMMANDS, "__main__"}


def test_help_is_plain_text_with_the_lines_it_was_written_in(capsys):
    with pytest.raises(SystemExit):
        export.main(["--help"])
    shown = capsys.readouterr().out
    assert "\nmodel.onnx      the same for ONNX Runtime" in shown and "``" not in shown
