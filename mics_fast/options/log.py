"""Options of where a run is logged beside its folder."""

from __future__ import annotations

from dataclasses import dataclass

from mics_fast.options.fields import option


@dataclass
class LogConfig:
    """Experiment trackers, each from its own package; the run folder is written in any case."""

    wandb: bool = option(False, "also log to Weights & Biases (pip install wandb)")
    mlflow: bool = option(False, "also log to MLflow (pip install mlflow)")
