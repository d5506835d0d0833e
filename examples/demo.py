"""From nothing to a trained, evaluated classifier on generated data: what `make demo` runs.

Three classifiers of the endoscopic phantom are trained on the same 5 % of labels and compared on
the same test pairs:

    (a) the same network on the labelled pairs only, from scratch,
    (b) with pre-training,
    (c) the full method: pre-training, pseudo-labels, modality consistency, distribution shift.

(a) trains for as long as pre-training and fine-tuning of (b) took together. One seed: the
differences say what happened here, not what to expect elsewhere.

    python examples/demo.py [--out runs/demo] [--pairs 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
LABELS_ONLY = [
    "--finetune.unlabelled_weight=0",
    "--finetune.modality_consistency_weight=0",
    "--finetune.shift_weight=0",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, seed = options.out, options.seed
    manifest = out / "data" / "manifest.csv"
    if not manifest.exists():
        split = ["--split", "0.5", "0.1", "0.4"]
        pairs = ["--pairs", str(options.pairs), "--seed", str(seed)]
        module("prepare", "phantom", "--out", manifest.parent, *pairs, *split)

    common = ["--data.manifest", manifest, "--seed", seed, "--resume"]
    pretrained = out / "pretrained"
    train(pretrained, "--stage=pretrain", *common)
    init = f"--finetune.init={pretrained}"
    train(out / "b", "--stage=finetune", init, *LABELS_ONLY, *common)
    train(out / "c", "--stage=finetune", init, *common)
    seconds = {name: seconds_of(out / name) for name in ("pretrained", "b", "c")}
    epochs = last_record(out / "b")["epoch"] * (1 + seconds["pretrained"] / seconds["b"])
    scratch = ["--finetune.init=none", f"--finetune.epochs={round(epochs)}"]
    train(out / "a", "--stage=finetune", *scratch, *LABELS_ONLY, *common)
    report(out, seconds | {"a": seconds_of(out / "a")})


def module(name: str, *arguments: object) -> None:
    """Run ``python -m mics_fast.<name>``; stop here if it fails."""
    command = [sys.executable, "-m", f"mics_fast.{name}", *map(str, arguments)]
    print("$ python", *command[1:], flush=True)
    subprocess.run(command, check=True)


def train(run: Path, *arguments: object) -> None:
    """Train one run; go on where an interrupted one stopped, do nothing where it is complete."""
    module("train", "--config", CONFIG, "--out", run, *arguments)


def last_record(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def seconds_of(run: Path) -> float:
    """Wall time that the run's training took, validation included."""
    return last_record(run)["seconds"]


def report(out: Path, seconds: dict[str, float]) -> None:
    """Evaluate the three runs on the test pairs; print and store the comparison."""
    results = {}
    for name in "abc":
        file = out / f"{name}.json"
        module("evaluate", out / name, "--json", file)
        results[name] = json.loads(file.read_text())
    accuracy = {
        name: {view: 100 * metrics["accuracy"] for view, metrics in result["views"].items()}
        for name, result in results.items()
    }
    pretraining = seconds["pretrained"]
    rows = {
        "a": ("labelled pairs only", seconds["a"]),
        "b": ("+ pre-training", pretraining + seconds["b"]),
        "c": ("full method", pretraining + seconds["c"]),
    }
    pairs = results["a"]["n"]
    print(f"\nAccuracy in % on {pairs} test pairs, six classes, 5 % labels, one seed\n")
    print(f"{'':26} {'WLI alone':>10} {'NBI alone':>10} {'fused':>8} {'trained for':>12}")
    for name, (title, wall) in rows.items():
        values = accuracy[name]
        print(
            f"({name}) {title:22} {values['wli']:10.1f} {values['nbi']:10.1f} "
            f"{values['fused']:8.1f} {wall:10.0f} s"
        )
    for after, before in (("b", "a"), ("c", "b")):
        difference = accuracy[after]["fused"] - accuracy[before]["fused"]
        print(f"({after}) - ({before}), fused: {difference:+.1f} points")
    print(f"\nRun folders: {out}/a, {out}/b, {out}/c (shared pre-training: {out}/pretrained)")


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"The whole demo took {time.perf_counter() - began:.0f} s.")
