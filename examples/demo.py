"""Twelve labels: the full method against supervised training for the same number of operations.

Generates a phantom of paired endoscopy images (six classes, two labels each), trains both in
parallel on one CPU thread each, and compares them on the test pairs: accuracy of each modality
and of their fusion, and the gain from referring the least certain fifth to a person.

    python examples/demo.py [--out runs/demo] [--seed 0]

An interrupted demo resumes where it stopped. `make demo` installs everything, then runs this.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mics_fast.data.manifest import read_manifest
from mics_fast.options.commands import read_config
from mics_fast.study.variants import finetuning_of

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
LABELS_PER_CLASS = 2
REFERRED = 0.2  # share of the test pairs that are referred to a person
LABELS_ALONE = [
    "--finetune.init=none",
    "--finetune.unlabelled_weight=0",
    "--finetune.modality_consistency_weight=0",
    "--finetune.shift_weight=0",
]


@dataclass(frozen=True)
class Score:
    """Results of a run on the test pairs, in %.

    Args:
        wli, nbi, fused: accuracy of each modality's opinion and of the fused one.
        rest: accuracy of the fused opinion on the pairs that are not referred.
        seconds: wall time of training.
    """

    wli: float
    nbi: float
    fused: float
    rest: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=CONFIG, help="options of both runs")
    options = parser.parse_args()
    manifest = options.out / "data" / "manifest.csv"
    if not manifest.exists():
        prepare(manifest.parent, options.pairs, options.seed)
    common = [f"--config={options.config}", "--data.manifest", manifest, "--seed", options.seed,
              "--threads=1", "--data.cache.mode=host", "--resume"]  # fmt: skip
    full, alone = options.out / "full", options.out / "labels-alone"
    steps = f"--finetune.steps={steps_as_long_as_full(options.config, manifest)}"
    stage = "--stage=finetune"
    background = start("train", *common, "--out", alone, stage, steps, *LABELS_ALONE, log=alone)
    run("train", *common, "--out", full)
    print("waiting for the run with the labels alone", flush=True)
    if background.wait():
        sys.exit(f"the run with the labels alone failed: see {alone}.log")
    scores = {"labels alone": score(alone), "full method": score(full)}
    print(table(scores, len(read_manifest(manifest).select("test"))))
    print(verdict(scores["labels alone"], scores["full method"], len(test_rows(full))))
    page = options.out / "report.html"
    run("report", full, "--against", alone, "--out", page)
    print(f"Open {page.resolve()}: the full method's report, compared with the labels alone.")


def prepare(folder: Path, pairs: int, seed: int) -> None:
    """Generate the phantom; half of the pairs are train rows, two per class keep their label."""
    classes, train = 6, 0.5
    fraction = LABELS_PER_CLASS / (train * pairs / classes)
    run("prepare", "phantom", "--out", folder, "--pairs", pairs, "--seed", seed,
        "--split", train, 0.1, 0.4, "--label-fraction", f"{fraction:.4f}")  # fmt: skip


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"mics_fast.{name}", *map(str, arguments)]


def run(name: str, *arguments: object) -> None:
    """Run ``python -m mics_fast.<name>``; exit if it fails."""
    asked = command(name, *arguments)
    print("$ python", *asked[1:], flush=True)
    subprocess.run(asked, check=True)


def start(name: str, *arguments: object, log: Path) -> subprocess.Popen[bytes]:
    """Start a command in the background, with its output in ``<log>.log``."""
    asked, file = command(name, *arguments), log.with_name(f"{log.name}.log")
    print("$ python", *asked[1:], f"> {file} &", flush=True)
    with open(file, "w") as output:
        return subprocess.Popen(asked, stdout=output, stderr=subprocess.STDOUT)


def steps_as_long_as_full(config: Path, manifest: Path) -> int:
    """Return the steps of supervised training that cost as much as both stages of the method."""
    long = finetuning_of(read_config(config), "supervised-long", read_manifest(manifest))
    assert long.finetune.steps is not None
    return long.finetune.steps


def score(folder: Path) -> Score:
    """Evaluate a run on the test pairs."""
    result, rows = folder.with_suffix(".json"), folder.with_suffix(".csv")
    run("evaluate", folder, "--json", result, "--csv", rows)
    views = json.loads(result.read_text())["views"]
    accuracy = {name: 100 * views[name]["accuracy"] for name in ("wli", "nbi", "fused")}
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {line["stage"]: line["seconds"] for line in lines}
    return Score(**accuracy, rest=accuracy_of_rest(test_rows(folder)), seconds=sum(last.values()))


def test_rows(folder: Path) -> list[tuple[float, bool]]:
    """Read the uncertainty of each test pair, and whether the fused answer is right."""
    with open(folder.with_suffix(".csv"), newline="") as file:
        return [(float(x["uncertainty"]), x["correct"] == "1") for x in csv.DictReader(file)]


def accuracy_of_rest(rows: list[tuple[float, bool]]) -> float:
    """Compute the accuracy in % after referring the least certain share."""
    kept = sorted(rows)[: math.ceil((1 - REFERRED) * len(rows))]
    return 100 * sum(right for _, right in kept) / len(kept)


def table(scores: dict[str, Score], pairs: int) -> str:
    """Format the figures, one line per run."""
    lines = [
        f"\nAccuracy in % on {pairs} test pairs: six classes, {LABELS_PER_CLASS} labels each, one "
        "seed\n",
        f"{'':14}{'WLI alone':>12}{'NBI alone':>12}{'fused':>9}"
        f"{'a fifth referred':>19}{'trained for':>14}",
    ]
    lines += [
        f"{name:14}{own.wli:12.1f}{own.nbi:12.1f}{own.fused:9.1f}{own.rest:19.1f}"
        f"{own.seconds:12.0f} s"
        for name, own in scores.items()
    ]
    return "\n".join(lines) + "\n"


def verdict(alone: Score, full: Score, pairs: int) -> str:
    """Summarise the figures in words; differences within two standard errors count as none."""
    gain = full.fused - alone.fused
    error = math.hypot(*(math.sqrt(x.fused * (100 - x.fused) / pairs) for x in (alone, full)))
    if abs(gain) <= 2 * error:
        compared = "Unlabelled pairs made no difference that these test pairs can tell"
    else:
        compared = f"Unlabelled pairs made the classifier {'better' if gain > 0 else 'worse'}"
    better = "WLI" if full.wli >= full.nbi else "NBI"
    fusion = full.fused - max(full.wli, full.nbi)
    referral = full.rest - full.fused
    return (
        f"{compared}: {full.fused:.1f} against {alone.fused:.1f} % from the same twelve labels and "
        f"as much computation ({gain:+.1f} points; two standard errors are {2 * error:.1f}).\n"
        f"Fusing both modalities {'gained' if fusion > 0 else 'lost'} {abs(fusion):.1f} points "
        f"over {better} alone. Referring the least certain fifth "
        f"{'raised' if referral > 0 else 'lowered'} accuracy on the rest to {full.rest:.1f} %.\n"
        "One seed of generated images: docs/results.md has five, with intervals."
    )


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"The whole demo took {time.perf_counter() - began:.0f} s.")
