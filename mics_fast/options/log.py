"""Options of what a run logs, and where."""

from __future__ import annotations

from dataclasses import dataclass

from mics_fast.options.fields import option


@dataclass
class LogConfig:
    """Images in TensorBoard, and experiment trackers, each from its own package.

    The run folder is written in any case.
    """

    images: bool = option(True, "show val images in TensorBoard; false for images of patients")
    wandb: bool = option(False, "also log to Weights & Biases (pip install wandb)")
    mlflow: bool = option(False, "also log to MLflow (pip install mlflow)")
