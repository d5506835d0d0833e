"""Warnings about training that runs badly, derived from the figures in the log.

Each sentence names the figure, its likely cause, and the option to change.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from mics_fast.options import FinetuneConfig, PretrainConfig

# With negatives at a cosine of 0.95, the softmax can favour a positive over any one of them by at
# most exp(0.05 / 0.07) = 2: the loss cannot tell rows apart.
SIMILAR = 0.95
# A mean this close to a bound means that hardly any row is away from it; an untrained model: 0.95.
CERTAIN, UNCERTAIN = 0.01, 0.99
HARDLY, NEARLY_ALL = 0.01, 0.99  # share of unlabelled rows whose pseudo-label is accepted
# For a finished stage: changes over its last quarter, when the learning rate is already low.
STILL_FALLING = 0.02  # of the reconstruction, relative
STILL_RISING, FALLEN = 0.03, 0.05  # of the accuracy on val rows
PATCH_MEAN = 0.95  # predicting each patch's mean leaves a reconstruction loss of 1


def pretrain_warnings(config: PretrainConfig, record: Mapping[str, float]) -> list[str]:
    """Return warnings about a log record of stage 1; missing numbers are skipped.

    An untrained encoder maps all images to about one point, and so does the teacher for a while.
    Collapse is therefore reported only after the first epoch, and only if the student agrees.
    """
    warnings = []
    names = ("teacher_similarity", "positive_similarity")
    similarity = min(record.get(name, 0.0) for name in names)
    if record.get("epoch", 0.0) >= 1 and similarity > SIMILAR:
        warnings.append(
            f"features of different rows, like those of one row, have a mean cosine of "
            f"{similarity:.2f} or more: the encoder maps all images to about one point (collapse); "
            "look at pretrain.lr, pretrain.alpha and pretrain.teacher_momentum"
        )
    horizon = 1 / (1 - config.teacher_momentum) if config.teacher_momentum < 1 else float("inf")
    age = record.get("queue_age", 0.0)
    if age > horizon:
        warnings.append(
            f"the oldest negatives are {age:.0f} steps old, but the teacher that made them is "
            f"another one after {horizon:.0f} steps; lower pretrain.queue_size or raise "
            "pretrain.teacher_momentum"
        )
    return warnings


def finetune_warnings(config: FinetuneConfig, record: Mapping[str, float]) -> list[str]:
    """Return warnings about a log record of stage 2; missing numbers are skipped."""
    warnings = []
    uncertainty = record.get("student_uncertainty", 0.5)
    if uncertainty < CERTAIN:
        warnings.append(
            f"the mean uncertainty is {uncertainty:.3f}: the model is sure of every row, right or "
            "wrong; raise finetune.kl_weight or lower finetune.lr"
        )
    if uncertainty > UNCERTAIN:
        warnings.append(
            f"the mean uncertainty is {uncertainty:.3f}: the model states no evidence for any row; "
            "lower finetune.kl_weight or raise finetune.kl_anneal"
        )
    ramped = record.get("weight_pseudo", 0.0) >= config.unlabelled_weight > 0
    accepted = record.get("pseudo_accepted", 0.5)
    if ramped and accepted < HARDLY:
        warnings.append(
            f"{accepted:.1%} of the pseudo-labels are accepted: unlabelled rows teach nothing; "
            "raise finetune.max_uncertainty, lower finetune.min_probability or train longer"
        )
    if ramped and accepted > NEARLY_ALL:
        warnings.append(
            f"{accepted:.1%} of the pseudo-labels are accepted, the wrong ones too; lower "
            "finetune.max_uncertainty, raise finetune.min_probability or raise finetune.kl_weight"
        )
    return warnings


def closing_warnings(stage: str, records: Sequence[Mapping[str, float]]) -> list[str]:
    """Return warnings about a finished stage that learned too little or stopped too early.

    Args:
        stage: "pretrain" or "finetune".
        records: its log, sorted by step.
    """
    warnings = []
    if stage == "pretrain":
        before, end = last_quarter([r["loss_reconstruction"] for r in records
                                    if "loss_reconstruction" in r])  # fmt: skip
        if end > PATCH_MEAN:
            warnings.append(
                f"reconstruction ended at {end:.2f}, where 1 is the mean of each patch: the "
                "encoder has learned next to nothing; raise pretrain.steps or pretrain.lr"
            )
        elif end < before * (1 - STILL_FALLING):
            warnings.append(
                f"reconstruction was still falling, from {before:.3f} to {end:.3f} over the last "
                "quarter; raise pretrain.steps"
            )
        return warnings + [no_better for no_better in [neighbours_warning(records)] if no_better]
    scores = [record["val_accuracy"] for record in records if "val_accuracy" in record]
    before, end = last_quarter(scores)
    if end > before + STILL_RISING:
        warnings.append(
            f"accuracy on val rows was still rising, from {before:.1%} to {end:.1%} over the last "
            "quarter; raise finetune.steps"
        )
    if scores and scores[-1] < max(scores) - FALLEN:
        warnings.append(
            f"accuracy on val rows fell from {max(scores):.1%} to {scores[-1]:.1%}: the last "
            "steps did harm; lower finetune.steps or finetune.unlabelled_weight, or "
            "raise finetune.kl_weight"
        )
    return warnings


def neighbours_warning(records: Sequence[Mapping[str, float]]) -> str:
    """Return a warning if pre-training did not improve the nearest neighbours, or ""."""
    names = ("knn_accuracy", "knn_accuracy_untrained", "knn_chance")
    scored = [record for record in records if set(names) <= record.keys()]
    if not scored:
        return ""
    accuracy, untrained, chance = (scored[-1][name] for name in names)
    if accuracy > max(untrained, chance):
        return ""
    return (
        f"nearest neighbours are right in {accuracy:.1%} of val rows, those of the untrained "
        f"network in {untrained:.1%}, the most frequent class in {chance:.1%}: raise "
        "pretrain.steps, or compare fine-tuning with and without pre-training"
    )


def last_quarter(values: Sequence[float]) -> tuple[float, float]:
    """Average a few values before the last quarter and at the end; NaN for fewer than eight."""
    if len(values) < 8:
        return math.nan, math.nan
    few = len(values) // 8
    start = len(values) - len(values) // 4
    return statistics.fmean(values[start - few : start]), statistics.fmean(values[-few:])
