"""Each option carries its range, default and source; every list of options follows from it."""

from __future__ import annotations

from dataclasses import asdict
from operator import attrgetter

import pytest

from mics_fast.common.errors import InputError
from mics_fast.options import ExperimentConfig, TrainConfig, check_config, describe
from mics_fast.options.commands import parse_experiment, parse_train
from mics_fast.options.experiment import check_experiment
from mics_fast.options.fields import walk

SOURCES = {"ours", "paper", "code", "ALBEF", "MAE", "TMC", "EDL", "ISDA", "FixMatch", "LoRA",
           "BEiT", "ReMixMatch"}  # fmt: skip


def test_every_option_says_what_it_means_and_where_its_default_comes_from():
    for own in describe():
        assert own.text and own.type and own.source in SOURCES, own


def test_every_number_has_a_range_that_holds_its_default():
    numbers = [own for own in describe() if own.type.split(" ")[0] in ("int", "float")]
    assert len(numbers) > 50
    for own in numbers:
        assert own.range.startswith("a number"), own
    check_config(TrainConfig())
    check_experiment(ExperimentConfig(label_counts=[1]))


def test_the_description_names_options_as_the_command_line_does():
    names = [own.name for own in describe()]
    assert len(names) == len(set(names))
    described = {own.name: own for own in describe()}
    assert described["pretrain.lr"].default == "0.0001"
    assert described["threads"].range == "a number above 0 and up to 1024 or null"
    assert described["finetune.augment.crop_scale"].range == "0 < low <= high <= 1"
    assert described["experiment.seeds"].default == "[0, 1, 2, 3, 4]"
    needed = ["--out", "o", "--data.manifest", "m", "--experiment.label_counts", "[1]"]
    for own in describe():
        argument = f"--{own.name}={own.default.replace(chr(34), '')}"
        if own.name.startswith("experiment."):
            parse_experiment([argument, *needed])
        else:
            config = parse_train([argument]).config
            assert config == TrainConfig()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("pretrain.lr", 0.0, "a number above 0"),
        ("pretrain.lr", float("nan"), "a number above 0"),
        ("finetune.kl_weight", float("inf"), "a number of at least 0"),
        ("pretrain.mask_ratio", 1.0, "a number between 0 and 1"),
        ("finetune.warmup", 1.5, "a number from 0 to 1"),
        ("pretrain.epochs", 10**400, "a number above 0"),
        ("pretrain.augment.crop_scale", (0.9, 0.5), "0 < low <= high <= 1"),
        ("pretrain.augment.crop_scale", (0.0, 0.5), "0 < low <= high <= 1"),
        ("pretrain.augment.weak.hue", -1.0, "a number of at least 0"),
        ("model.fusion_depth", 1_000_000, "a number above 0 and up to 64"),
        ("threads", 1_000_000, "a number above 0 and up to 1024 or null"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value, wanted):
    config = TrainConfig()
    owner, _, last = name.rpartition(".")
    setattr(attrgetter(owner)(config) if owner else config, last, value)
    with pytest.raises(InputError) as error:
        check_config(config)
    assert str(error.value).startswith(f"option {name} is")
    assert str(error.value).endswith(f"wanted {wanted}")


def test_a_deviation_of_zero_is_refused_inside_its_mapping():
    with pytest.raises(InputError, match=r"option data\.std is .*, wanted a number above 0"):
        parse_train(["--data.std", "{wli: [0, 1, 1]}"])


def test_printed_options_give_the_same_options(tmp_path, capsys):
    given = ["--seed", "7", "--finetune.augment.crop_scale", "[0.5, 1]", "--threads", "3",
             "--data.mean", "{wli: [0.1, 0.2, 0.3]}", "--pretrain.lr", "3e-5"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        parse_train([*given, "--print_config"])
    assert ended.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse_train(["--config", str(file)]) == parse_train(given)


def test_later_files_and_options_override_earlier_ones(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nmodel: {size: vit_tiny}\n")
    second.write_text("seed: 2\n")
    files = ["--config", str(first), "--config", str(second)]
    assert parse_train(files)[0].seed == 2
    assert parse_train([*files, "--seed", "3"])[0].seed == 3
    assert parse_train(["--seed", "3", *files])[0].seed == 2
    assert parse_train(files)[0].model.size == "vit_tiny"


def test_epochs_of_the_command_line_replace_the_steps_of_a_file(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("pretrain: {steps: 600}\nfinetune: {steps: 600, epochs: 3}\n")
    command = ["--config", str(file), "--pretrain.epochs", "2"]
    config = parse_train(command).config
    assert (config.pretrain.steps, config.pretrain.epochs) == (None, 2)
    assert (config.finetune.steps, config.finetune.epochs) == (600, 3), "of one file: steps win"
    assert parse_train([*command, "--pretrain.steps", "5"]).config.pretrain.steps == 5
    grid, _ = parse_experiment([*command, "--data.manifest", "m.csv", "--out", "study",
                                "--experiment.label_counts", "[2]"])  # fmt: skip
    assert grid.pretrain.steps is None


def test_yaml_values_are_read_by_the_type_of_their_option(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("out: 010\ncompile: on\npretrain: {lr: 1e-4, steps: null}\ncuda_graph: True\n")
    config = parse_train(["--config", str(file)]).config
    assert (config.out, config.compile, config.pretrain.lr) == ("010", "on", 1e-4)
    assert config.pretrain.steps is None and config.cuda_graph is True


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_experiment(["--help"])
    shown = capsys.readouterr().out
    for own in describe():
        assert f"--{own.name} " in shown


def test_walking_the_options_meets_every_leaf():
    def leaves(tree):
        return sum(leaves(v) if isinstance(v, dict) and v else 1 for v in tree.values())

    config = TrainConfig()
    assert len(list(walk(config))) == leaves(asdict(config))


def test_sharding_within_a_machine_is_refused_without_sharding():
    with pytest.raises(InputError, match="shard_across is machine, wanted shard_parameters true"):
        check_config(TrainConfig(shard_across="machine"))
    check_config(TrainConfig(shard_parameters=True, shard_across="machine"))
