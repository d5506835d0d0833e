"""Options of the trainer, each declared once with its range, unit, default and source.

``train.py`` holds the options of a run and names the files of its parts. Adding one is a single
field: ``name: type = option(default, "meaning and unit", source=..., least=..., most=...)``; the
command line, YAML files, range checks, ``--help`` and docs/options.md follow from it.
"""

from mics_fast.options.checks import check_config
from mics_fast.options.data import AugmentConfig, CacheConfig, ColourConfig, DataConfig
from mics_fast.options.experiment import ExperimentConfig, Variant, check_experiment
from mics_fast.options.fields import Option, describe
from mics_fast.options.finetune import FinetuneConfig, PseudoLabelRule, ShiftForm, wants_unlabelled
from mics_fast.options.model import ModelConfig, ModelSize, PooledFusionName
from mics_fast.options.pretrain import PretrainConfig, contrasted_pairs
from mics_fast.options.train import CompileScope, PrecisionName, StageChoice, TrainConfig

__all__ = [
    "AugmentConfig",
    "CacheConfig",
    "ColourConfig",
    "CompileScope",
    "DataConfig",
    "ExperimentConfig",
    "FinetuneConfig",
    "ModelConfig",
    "ModelSize",
    "Option",
    "PooledFusionName",
    "PrecisionName",
    "PretrainConfig",
    "PseudoLabelRule",
    "ShiftForm",
    "StageChoice",
    "TrainConfig",
    "Variant",
    "check_config",
    "check_experiment",
    "contrasted_pairs",
    "describe",
    "wants_unlabelled",
]
