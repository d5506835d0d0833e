"""Options of an experiment: a grid of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics_fast.common.errors import InputError
from mics_fast.options.fields import check_ranges, option

Variant = Literal[
    "supervised", "supervised-long", "reconstruction", "pretraining", "pseudo-labels",
    "without-pretraining", "full", "without-consistency", "without-adversary", "without-shift",
    "without-modality-consistency", "fixmatch", "freematch", "probe", "probe+full", "lora",
]  # fmt: skip


@dataclass
class ExperimentConfig:
    """The grid of ``mics-fast experiment``: every variant on every draw of labels."""

    seeds: list[int] = option(
        help="one run each; determine label draw, weights, order, masks and shifts",
        factory=lambda: [0, 1, 2, 3, 4], least=0, most=2**63 - 1,
    )  # fmt: skip
    label_fractions: list[float] = option(
        help="of the train rows of each class", factory=list, above=0, most=1
    )
    label_counts: list[int] = option(
        help="labelled train rows of each class, besides the fractions",
        factory=list,
        least=1,
    )
    variants: list[Variant] = option(
        help="see study/variants.py; the others are compared with the first",
        factory=lambda: ["supervised-long", "pretraining", "without-pretraining", "full"],
    )
    out_of_distribution: str = option(
        "", 'a manifest of images that the models should be unsure of; "" = none'
    )
    folds: str = option(
        "",
        "folder of prepare --folds: cross-validation in place of the grid. One run per fold, with "
        "the options of the run; the opinions on all test rows are pooled into one table and one "
        'report; "" = none',
    )
    processes: int = option(
        1,
        "runs at a time, each with its share of the CPU threads. Small networks do not use two "
        "threads well: as many processes as cores, where memory allows",
        above=0, most=1024,
    )  # fmt: skip


def check_experiment(config: ExperimentConfig) -> None:
    """Refuse a grid that cannot be run, naming the option.

    Raises:
        InputError: a list is empty or has a duplicate, or a number is out of range.
    """
    check_ranges(config, "experiment.")
    if config.folds:
        return
    for name in ("seeds", "label_fractions", "label_counts", "variants"):
        values = getattr(config, name)
        may_be_empty = name.startswith("label_")
        if len(set(values)) < len(values) or not (values or may_be_empty):
            raise InputError(f"option experiment.{name} is {values}, wanted each value once")
    if not config.label_fractions and not config.label_counts:
        raise InputError(
            "experiment.label_fractions and experiment.label_counts are empty, wanted either"
        )
