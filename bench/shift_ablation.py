"""Does the distribution shift help? Fine-tuning on the phantom with each form of it.

For each seed a phantom of its own, 3,000 pairs of which 1,020 are test pairs, 5 % of the train rows
labelled; four runs from scratch that differ in ``--finetune.shift`` alone. The table gives the mean
over seeds with a 95 % interval (Student's t), and the paired differences to no shift. Every run is
resumed where it was interrupted and kept in OUT, so several processes may share the seeds.

    python -m bench.shift_ablation --out runs/shift [--seeds 0 1 2 3 4] [--report-only]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
FORMS = ("none", "diagonal", "low-rank", "closed-form")
METRICS = ("accuracy", "macro_f1", "macro_auroc")


def module(name: str, *arguments: object) -> None:
    """Run ``python -m mics_fast.<name>``; stop here if it fails."""
    command = [sys.executable, "-m", f"mics_fast.{name}", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run(out: Path, seed: int, form: str, epochs: int) -> None:
    """Train and evaluate one run, unless that is done."""
    folder, result = out / f"{form}-{seed}", out / f"{form}-{seed}.json"
    manifest = out / f"phantom-{seed}" / "manifest.csv"
    if not manifest.exists():
        split = ["--split", "0.6", "0.06", "0.34"]
        pairs = ["--pairs", "3000", "--seed", seed]
        module("prepare", "phantom", "--out", manifest.parent, *pairs, *split)
    if result.exists():
        return
    module(
        "train", "--config", CONFIG, "--data.manifest", manifest, "--out", folder, "--resume",
        "--stage", "finetune", "--finetune.init", "none", "--finetune.epochs", epochs,
        "--finetune.shift", form, "--seed", seed, "--data.cache.mode", "host",
    )  # fmt: skip
    module("evaluate", folder, "--json", result)
    print(f"{form}, seed {seed}: done", flush=True)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over seeds."""
    spread = values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), t.ppf(0.975, len(values) - 1) * spread


def report(out: Path, seeds: list[int]) -> None:
    """The table, as Markdown."""

    def values(form: str, metric: str) -> np.ndarray:
        files = [out / f"{form}-{seed}.json" for seed in seeds]
        views = [json.loads(file.read_text())["views"]["fused"] for file in files]
        return 100 * np.array([view[metric] for view in views])

    heads = [f"{metric} | minus none" for metric in METRICS]
    print(f"| shift | {' | '.join(heads)} |\n| --- |{' --- |' * (2 * len(METRICS))}")
    for form in FORMS:
        cells = []
        for metric in METRICS:
            mean, half = interval(values(form, metric))
            cells.append(f"{mean:.1f} ± {half:.1f}")
            if form == "none":
                cells.append("")
                continue
            mean, half = interval(values(form, metric) - values("none", metric))
            cells.append(f"{mean:+.1f} ± {half:.1f}")
        print(f"| {form} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args()
    if not options.report_only:
        for seed in options.seeds:
            for form in FORMS:
                run(options.out, seed, form, options.epochs)
    report(options.out, options.seeds)


if __name__ == "__main__":
    main()
