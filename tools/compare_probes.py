"""Compare frozen-feature classifiers with logistic regression on the same features, draw by draw.

For each amount of labels and each draw, half of a manifest's rows are for training and the others
are tested (whole groups, class by class), and some of the former keep their labels. The trainer's
classifier learns from these alone, with the options of ``configs/probe.yaml``; scikit-learn's
logistic regression, at its defaults, from the same standardised features.

    pip install scikit-learn
    python -m tools.compare_probes --manifest data/kvasir/manifest.csv --weights weights/ \
        --image 224 --features runs/features --json comparison.json

The manifest's own splits and labelled rows are not read. The JSON holds figures alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from mics_fast.common.files import write_json
from mics_fast.common.progress import progress
from mics_fast.data.features import FeatureLoader, FeaturePass, FeatureRows, Features
from mics_fast.data.loaders import EvalLoader
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.engine.precision import pick_precision
from mics_fast.engine.update import Update
from mics_fast.evaluation.opinions import collect_opinions
from mics_fast.models.pooled import PooledEncoder
from mics_fast.models.sizes import network_name, size_of
from mics_fast.options import TrainConfig
from mics_fast.options.commands import parse_train
from mics_fast.preparation.splits import label_rows, split_rows
from mics_fast.study.variants import LABELS_ONLY
from mics_fast.training.build import build_classifier, build_finetuning
from mics_fast.training.features import BATCH, FeatureMaker
from mics_fast.training.start import load_start, with_encoder

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[1] / "configs" / "probe.yaml"
TEST_BATCH = 1024
JOINED = "joined"
"""Features of all modalities side by side, for logistic regression."""
FUSED = "fused"

Scores = dict[str, float]


def main() -> None:
    """Print a table of means over draws, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--weights", required=True, help="as model.init")
    parser.add_argument("--image", type=int, help="as model.image")
    parser.add_argument("--features", type=Path, help="as finetune.feature_cache")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05, 0.25, 1.0])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    manifest = read_manifest(given.manifest)
    arguments = ["--config", str(CONFIG), "--model.init", given.weights]
    arguments += ["--model.image", str(given.image)] if given.image else []
    config = with_encoder(parse_train(arguments).config, manifest.modalities)
    for name, value in LABELS_ONLY.items():
        setattr(config.finetune, name, value)
    features = all_features(manifest, config, given.features)
    table = []
    for fraction in given.fractions:
        draws = progress(range(given.draws), f"labels {fraction:.0%}", given.draws)
        found = [compare(manifest, config, features, fraction, seed) for seed in draws]
        table.append(summary(fraction, found))
        print(json.dumps(table[-1]), flush=True)
        table[-1]["draws"] = found
    if given.json:
        facts = {
            "network": network_name(config.model),
            "rows": len(features.rows),
            "classes": list(manifest.classes),
            "draws": given.draws,
            "steps": config.finetune.steps,
            "metric": "balanced accuracy on the other half, mean and standard deviation over draws",
        }
        write_json(given.json, {**facts, "table": table})


def all_features(manifest: Manifest, config: TrainConfig, folder: Path | None) -> Features:
    """Compute the features of every labelled row of a manifest."""
    size = size_of(config.model)
    encoder = size.encoder().eval().requires_grad_(False)
    print(load_start(config.model, [encoder]))
    precision = pick_precision(config.precision, CPU)
    data = replace(config.data, threads=torch.get_num_threads())
    rows = [row for row in manifest.rows if row.label >= 0]
    loader = EvalLoader(
        rows, manifest.modalities, data=data, image_size=size.image, batch_size=BATCH, device=CPU
    )
    pool, names = config.model.pool, manifest.modalities
    return FeatureMaker(encoder, pool, precision, names, data, folder).plain(loader, rows)


def compare(
    manifest: Manifest, config: TrainConfig, features: Features, fraction: float, seed: int
) -> dict[str, Scores]:
    """Compute the balanced accuracies of one draw, "ours" and "logistic"."""
    rows = drawn(manifest, features.rows, fraction, seed)
    train = [number for number, row in enumerate(rows) if row.split == "train"]
    scaled = standardised(features, train)
    return {
        "ours": ours(manifest, replace(config, seed=seed), features, rows, train),
        "logistic": logistic(scaled, rows),
    }


def drawn(manifest: Manifest, rows: Sequence[Row], fraction: float, seed: int) -> list[Row]:
    """Return the rows with the splits and labels of a draw."""
    names = [manifest.classes[row.label] for row in rows]
    groups = [str(row.group) for row in rows]
    splits = split_rows(names, groups, (0.5, 0.0, 0.5), seed)
    train = [number for number, split in enumerate(splits) if split == "train"]
    kept = label_rows([names[n] for n in train], [groups[n] for n in train], fraction, seed)
    labelled = {number for number, keeps in zip(train, kept, strict=True) if keeps}
    return [
        replace(row, split=split, labelled=number in labelled)
        for number, (row, split) in enumerate(zip(rows, splits, strict=True))
    ]


def standardised(features: Features, train: Sequence[int]) -> dict[str, np.ndarray]:
    """Standardise each modality by its train rows, and all side by side: name -> features."""
    found = {}
    for column, (name, own) in enumerate(features.plain.items()):
        encoder = PooledEncoder(own.shape[1], "cls")
        encoder.standardise(own[train][features.present[train, column]])
        found[name] = encoder(own)[:, 0].numpy()
    return found | {JOINED: np.concatenate(list(found.values()), axis=1)}


def ours(
    manifest: Manifest,
    config: TrainConfig,
    features: Features,
    rows: Sequence[Row],
    train: Sequence[int],
) -> Scores:
    """Train the classifier on the labelled rows; score every opinion on the test rows."""
    model = build_classifier(config, manifest)
    for column, (name, own) in enumerate(features.plain.items()):
        encoder = model.encoders[name]
        assert isinstance(encoder, PooledEncoder)
        encoder.standardise(own[train][features.present[train, column]])
    precision = pick_precision(config.precision, CPU)
    stage, plan = build_finetuning(config, manifest, model, len(train), precision, CPU)
    labelled = FeatureRows(features, [row for row in rows if row.labelled], CPU)
    loader = FeatureLoader(labelled, config.finetune.labelled_batch, seed=config.seed)
    update = Update(stage, plan)
    for step in range(plan.steps):
        update((next(loader),), step)
    tested = FeatureRows(features, [row for row in rows if row.split == "test"], CPU)
    opinions = collect_opinions(stage.average, FeaturePass(tested, TEST_BATCH))
    return {
        str(source): balanced(own.probability.argmax(1).numpy(), own.label.numpy())
        for source, own in opinions.predictions().items()
    }


def logistic(scaled: dict[str, np.ndarray], rows: Sequence[Row]) -> Scores:
    """Train logistic regression on the labelled rows; score it on the test rows."""
    from sklearn.linear_model import LogisticRegression

    label = np.array([row.label for row in rows])
    labelled = np.array([row.labelled for row in rows])
    tested = np.array([row.split == "test" for row in rows])
    found = {}
    for name, own in scaled.items():
        model = LogisticRegression(max_iter=1000).fit(own[labelled], label[labelled])
        found[name] = balanced(model.predict(own[tested]), label[tested])
    return found


def balanced(answer: np.ndarray, label: np.ndarray) -> float:
    """Compute the mean recall over classes."""
    return float(np.mean([(answer[label == k] == k).mean() for k in np.unique(label)]))


def summary(fraction: float, draws: Sequence[dict[str, Scores]]) -> dict[str, Any]:
    """Summarise draws: means and standard deviations, also of paired differences.

    These are ours minus logistic regression, per modality, and the fused opinion minus that of the
    modality with the higher mean.
    """
    found: dict[str, Any] = {"fraction": fraction}
    for whose in ("ours", "logistic"):
        found[whose] = {
            name: spread([draw[whose][name] for draw in draws]) for name in draws[0][whose]
        }
    shared = [name for name in draws[0]["ours"] if name in draws[0]["logistic"]]
    found["ours minus logistic"] = {
        name: spread([draw["ours"][name] - draw["logistic"][name] for draw in draws])
        for name in shared
    }
    better = max(shared, key=lambda name: mean(draw["ours"][name] for draw in draws))
    found[f"{FUSED} minus {better}"] = spread(
        [draw["ours"][FUSED] - draw["ours"][better] for draw in draws]
    )
    return found


def spread(values: Sequence[float]) -> list[float]:
    """Return mean and standard deviation."""
    return [round(mean(values), 4), round(stdev(values) if len(values) > 1 else 0.0, 4)]


if __name__ == "__main__":
    main()
