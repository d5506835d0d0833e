"""Command lines of ``train`` and ``experiment``, and the options stored in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mics_fast.common.errors import InputError
from mics_fast.options.checks import check_config
from mics_fast.options.experiment import ExperimentConfig, check_experiment
from mics_fast.options.parsing import ConfigParser, Setting
from mics_fast.options.train import TrainConfig

CONFIG = "config.yaml"  # in a run folder


class TrainCommand(NamedTuple):
    """A command line of ``train``.

    Args:
        config: Options of the run.
        resume: Resume from the last checkpoint.
        verbose: Print every loss and rate.
    """

    config: TrainConfig
    resume: bool
    verbose: bool


def parse_train(
    arguments: Sequence[str] | None = None, description: str | None = None
) -> TrainCommand:
    """Read the command line of ``train``.

    ``--resume`` without ``--config`` starts from the options of the run in ``--out``.

    Raises:
        InputError: an unknown or ill-typed option, or a value out of range.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    parser = ConfigParser(
        {"": TrainConfig},
        prog="python -m mics_fast.train",
        description=description,
        usage="%(prog)s --config FILE --data.manifest FILE --out RUN\n"
        "       [--resume] [--verbose] [--OPTION VALUE]...",
    )
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    parser.add_argument("--verbose", action="store_true",
                        help="print every loss, throughput and FLOPs, too")  # fmt: skip
    found, settings = parser.read(arguments)
    base = None
    from_file = any(name == "config" for name, _ in found.given)
    out = next((own.value for own in reversed(settings) if own.name == "out"), "")
    if found.resume and out and not from_file and (Path(out) / CONFIG).is_file():
        base = read_config(Path(out) / CONFIG)
    (config,) = parser.configs([*settings, *without_steps(settings)], base)
    check_config(config)
    if found.print_config:
        parser.print_config([config])
        raise SystemExit(0)
    return TrainCommand(config, found.resume, found.verbose)


def parse_experiment(
    arguments: Sequence[str] | None = None, description: str | None = None
) -> tuple[TrainConfig, ExperimentConfig]:
    """Read the options shared by all runs of a grid, and those of the grid.

    Raises:
        InputError: an unknown, ill-typed or missing option, or a value out of range.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    parser = ConfigParser(
        {"": TrainConfig, "experiment": ExperimentConfig},
        prog="python -m mics_fast.experiment",
        description=description,
        usage="%(prog)s --config FILE\n"
        "       (--data.manifest FILE | --experiment.folds DIR) --out DIR [--OPTION VALUE]...",
    )
    found, settings = parser.read(arguments)
    train, grid = parser.configs([*settings, *without_steps(settings)])
    check_config(train)
    check_experiment(grid)
    if found.print_config:
        parser.print_config([train, grid])
        raise SystemExit(0)
    require(train, manifest=not grid.folds)
    return train, grid


def without_steps(settings: Sequence[Setting]) -> list[Setting]:
    """Return settings that unset the steps of a file where the command line gives epochs."""
    given = {own.name for own in settings if not own.where}
    return [
        Setting(f"{stage}.steps", "null")
        for stage in ("pretrain", "finetune")
        if f"{stage}.epochs" in given and f"{stage}.steps" not in given
    ]


def require(config: TrainConfig, *, manifest: bool = True) -> None:
    """Refuse to start without a manifest, if one is needed, or a run folder.

    Raises:
        InputError: names the missing option.
    """
    for name, value in (("--data.manifest", config.data.manifest), ("--out", config.out)):
        if not value and (manifest or name == "--out"):
            raise InputError(f"option {name} is missing")


def read_config(file: Path) -> TrainConfig:
    """Read the options in a YAML file on top of the defaults.

    Raises:
        InputError: as ``parse_train``.
    """
    parser = ConfigParser({"": TrainConfig}, description=None)
    (config,) = parser.configs(parser.read(["--config", str(file)])[1])
    check_config(config)
    return config
