"""Missing and unpaired images, and more than two modalities: through both stages to an answer."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from mics_fast import evaluate, predict
from mics_fast.models.classifier import Classifier
from mics_fast.options import FinetuneConfig, PretrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage
from mics_kernels import conflict, fuse_evidence, opinion


@pytest.fixture
def rewrite(phantom_manifest):
    """rewrite(name, change): a manifest beside the phantom's, each record changed by its number."""

    def write(name, change):
        with open(phantom_manifest, newline="") as file:
            records = [change(number, record) for number, record in enumerate(csv.DictReader(file))]
        path = phantom_manifest.with_name(name)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        return path

    return write


def log_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {stage: [x for x in lines if x["stage"] == stage] for stage in ("pretrain", "finetune")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vacuous_opinion_is_exactly_neutral(dtype):
    """The answer has the same bits, wherever the missing view stands and whether it is named."""
    evidence = 20 * torch.rand(50, 2, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    alone = fuse_evidence(evidence)
    vacuous, junk = torch.zeros(50, 1, 6, dtype=dtype), torch.full((50, 1, 6), torch.nan).to(dtype)
    for place in range(3):
        before, after = evidence[:, :place], evidence[:, place:]
        assert torch.equal(fuse_evidence(torch.cat([before, vacuous, after], 1)), alone)
        present = torch.ones(50, 3, dtype=torch.bool)
        present[:, place] = False
        marked = torch.cat([before, junk, after], 1)
        assert torch.equal(fuse_evidence(marked, present=present), alone)
        assert torch.equal(conflict(marked, present=present), conflict(evidence))
    for name in ("belief", "uncertainty", "probability"):
        stated = getattr(opinion(fuse_evidence(torch.cat([evidence, vacuous], 1))), name)
        assert torch.equal(stated, getattr(opinion(alone), name))


def test_a_row_of_one_modality_pretrains_the_encoder(tiny, make_batch):
    torch.manual_seed(0)
    stage = PretrainStage(
        PretrainConfig(adversarial_weight=0.1), tiny, ("wli", "nbi"),
        pool="cls", projection=8, queue_size=8, steps_per_epoch=10, seed=0,
    )  # fmt: skip
    batch = make_batch(4)
    batch.present[:, 1] = False
    for losses in stage.losses((batch,), torch.tensor(0)):
        stage.zero_grad()
        losses.total().backward()
        if losses.optimiser == "discriminator":
            gradients = [p.grad.abs().sum() for p in stage.discriminator.parameters()]
            assert sum(gradients) > 0
    assert losses.terms["reconstruction"] > 0 and losses.terms["consistency"] == 0
    assert stage.model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("column", [0, 1])
def test_a_row_of_one_modality_fine_tunes_its_own_encoder(tiny, make_batch, column):
    torch.manual_seed(0)
    names = ("wli", "nbi")
    model = Classifier(tiny, names, 3, pool="mean", fusion_depth=1)
    stage = FinetuneStage(
        FinetuneConfig(), model,
        num_classes=3, width=tiny.width, steps=10, seed=0,
    )  # fmt: skip
    labelled, unlabelled = make_batch(4), make_batch(4, strong=True)
    for batch in (labelled, unlabelled):
        batch.present[:, 1 - column] = False
    (losses,) = stage.losses((labelled, unlabelled), torch.tensor(1))
    losses.total().backward()
    own, other = (model.encoders[name].patch_embed.proj.weight.grad
                  for name in (names[column], names[1 - column]))  # fmt: skip
    assert own.abs().sum() > 0 and other.abs().sum() == 0


def test_both_stages_train_where_three_in_ten_frames_of_a_modality_are_missing(
    rewrite, train_few_steps, tmp_path
):
    manifest = rewrite("gaps.csv", lambda n, x: {**x, "nbi": "" if n % 10 < 3 else x["nbi"]})
    train_few_steps(manifest, tmp_path / "run")
    log = log_of(tmp_path / "run")
    for line in log["pretrain"] + log["finetune"]:
        assert all(math.isfinite(x) for name, x in line.items() if name.startswith("loss"))
    assert all(line["loss_consistency"] > 0 for line in log["pretrain"])
    file = tmp_path / "m.json"
    evaluate.main([str(tmp_path / "run"), "--json", str(file), "--resamples", "2"])
    views = json.loads(file.read_text())["views"]
    assert views["wli"]["n"] == views["fused"]["n"] == 12 and views["nbi"]["n"] < 12


def test_both_stages_train_where_no_row_has_both_modalities(rewrite, train_few_steps, tmp_path):
    """Unpaired data: nothing to be consistent about, but every image counts."""
    manifest = rewrite("unpaired.csv", lambda n, x: {**x, ("wli", "nbi")[n % 2]: ""})
    train_few_steps(manifest, tmp_path / "run", "--pretrain.positives", "modalities")
    log = log_of(tmp_path / "run")
    assert all(line["loss_consistency"] == 0 for line in log["pretrain"])
    assert all(line["loss_reconstruction"] > 0 for line in log["pretrain"])
    assert all(line["loss_supervised"] > 0 for line in log["finetune"])
    (record,) = one_answer(tmp_path, manifest)
    assert len(record["views"]) == 1


def test_a_third_modality_is_a_column(rewrite, train_few_steps, tmp_path):
    """A third modality, the WLI frame of another row, with gaps: train, evaluate, predict."""
    manifest = rewrite("three.csv", lambda n, x: {**x, "lci": "" if n % 4 == 0 else x["wli"]})
    run = tmp_path / "run"
    train_few_steps(manifest, run)
    file = tmp_path / "m.json"
    evaluate.main([str(run), "--json", str(file), "--resamples", "2"])
    result = json.loads(file.read_text())
    assert set(result["views"]) == {"fused", "wli", "nbi", "lci"}
    assert set(result["missing"]) == {"wli", "nbi", "lci"}
    # The fusion encoder still reads two of the three: more is said than by either alone.
    assert result["missing"]["lci"]["uncertainty"] < result["views"]["wli"]["uncertainty"]
    (record,) = one_answer(tmp_path, manifest)
    assert set(record["views"]) >= {"wli", "nbi", "fusion"}


def one_answer(tmp_path, manifest):
    """Return the run's answer for the first row of a manifest."""
    lines = manifest.read_text().splitlines()
    single = manifest.with_name("single-row.csv")
    single.write_text("\n".join(lines[:2]) + "\n")
    file = tmp_path / "answer.json"
    predict.main([str(tmp_path / "run"), "--manifest", str(single), "--json", str(file)])
    return json.loads(file.read_text())
