"""A single modality passes through both stages; terms that need two are skipped with a note."""

from __future__ import annotations

import csv
import json
import math

import pytest

from mics_fast import evaluate, predict, train
from mics_fast.common.errors import InputError
from mics_fast.options import PretrainConfig
from mics_fast.options.checks import check_pretraining


@pytest.fixture(scope="module")
def manifest(phantom_manifest):
    """The phantom's white-light frames: a manifest with a single column of paths."""
    with open(phantom_manifest, newline="") as file:
        records = list(csv.DictReader(file))
    for record in records:
        del record["nbi"]
    path = phantom_manifest.with_name("wli-alone.csv")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def test_a_manifest_of_one_modality_trains_in_both_stages(
    manifest, train_few_steps, tmp_path, capsys
):
    run = tmp_path / "run"
    train_few_steps(manifest, run)
    said = capsys.readouterr().out
    assert "wli alone: without fusion, agreement and shift" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = {
        stage: {n for x in lines if x["stage"] == stage for n in x if n.startswith("loss_")}
        for stage in ("pretrain", "finetune")
    }
    own = {"loss_adversarial", "loss_discriminator", "loss_reconstruction"}
    assert terms["pretrain"] == own | {"loss_consistency"}  # of two views of one image
    assert terms["finetune"] == {"loss_supervised", "loss_pseudo"}
    assert all(math.isfinite(x[name]) for x in lines for name in x if name.startswith("loss"))
    assert all(0 <= x["knn_accuracy"] <= 1 for x in lines if "knn_accuracy" in x)
    file = tmp_path / "metrics.json"
    evaluate.main([str(run), "--json", str(file), "--resamples", "2"])
    assert set(json.loads(file.read_text())["views"]) == {"fused", "wli"}
    answers = tmp_path / "answers.json"
    predict.main([str(run), "--manifest", str(manifest), "--json", str(answers)])
    assert set(json.loads(answers.read_text())[0]["views"]) == {"wli"}


def test_the_chosen_modality_of_two_trains_without_labels_alone(
    phantom_manifest, train_few_steps, tmp_path, capsys
):
    chosen = ["--data.modalities", "[nbi]", "--pretrain.adversarial_weight", "0"]
    chosen += ["--pretrain.positives", "modalities"]
    train_few_steps(phantom_manifest, tmp_path / "run", "--stage", "pretrain", *chosen)
    said = capsys.readouterr().out
    assert "nbi alone: without consistency, whose positives are modalities" in said
    text = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    terms = {name for line in text for name in json.loads(line) if name.startswith("loss_")}
    assert terms == {"loss_reconstruction"}


ONLY_CONSISTENCY = {"reconstruction_weight": 0.0, "adversarial_weight": 0.0}


def test_one_modality_has_nothing_to_be_consistent_with(few_steps, manifest, tmp_path):
    arguments = [*few_steps, "--data.manifest", str(manifest), "--out", str(tmp_path / "run")]
    arguments += ["--pretrain.positives", "modalities"]
    for name, value in ONLY_CONSISTENCY.items():
        arguments += [f"--pretrain.{name}", str(value)]
    with pytest.raises(InputError, match=r"pre-training has no loss: wanted .*, with wli alone"):
        train.main(arguments)


def test_no_loss_at_all_is_refused():
    check_pretraining(PretrainConfig(**ONLY_CONSISTENCY), ["wli", "nbi"])
    check_pretraining(PretrainConfig(**ONLY_CONSISTENCY, positives="images"), ["nbi"])
    nothing = PretrainConfig(**ONLY_CONSISTENCY, consistency_weight=0.0)
    with pytest.raises(InputError, match=r"or pretrain\.consistency_weight above 0$"):
        check_pretraining(nothing, ["wli", "nbi"])


@pytest.mark.parametrize("positives", ["images", "both"])
def test_an_image_is_not_its_own_positive(positives):
    options = PretrainConfig(positives=positives, teacher_views="shared")
    with pytest.raises(InputError, match="each image would be its own positive"):
        check_pretraining(options, ["wli", "nbi"])
