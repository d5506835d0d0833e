"""An exported model answers like the trained one, and says what it is."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mics_fast import export, predict
from mics_fast.common.errors import InputError, RunFailed
from mics_fast.data.manifest import read_manifest
from mics_fast.inference.export import Answering, export_model, random_inputs
from mics_fast.inference.exported_classifier import OUTPUTS
from mics_fast.inference.model_card import model_card
from mics_fast.inference.run_classifier import load_run
from mics_fast.models.classifier import Classifier
from mics_fast.training.run import Run
from mics_kernels import conflict, fuse_evidence, opinion


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    export.main([str(trained_run), "--out", str(out), "--resamples", "5"])
    return out


def inputs(rows, seed=3):
    return random_inputs(("wli", "nbi"), 64, rows=rows, seed=seed)


def test_the_program_answers_like_the_trained_model(exported, trained_run):
    model = load_run(Run.open(trained_run)).model.cpu()
    program = torch.export.load(exported / "model.pt2").module()
    for rows in (1, 2, 7):
        given = inputs(rows)
        with torch.no_grad():
            wanted = Answering(model)(*given)
        for name, exact, other in zip(OUTPUTS, wanted, program(*given), strict=True):
            torch.testing.assert_close(other, exact, rtol=1e-5, atol=1e-6, msg=name)


def test_onnx_answers_like_the_trained_model(exported, trained_run):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    model = load_run(Run.open(trained_run)).model.cpu()
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    for rows in (1, 2, 7):
        given = inputs(rows)
        named = dict(zip(("present", "wli", "nbi"), (x.numpy() for x in given), strict=True))
        with torch.no_grad():
            wanted = Answering(model)(*given)
        outputs = map(torch.from_numpy, session.run(OUTPUTS, named))
        for name, exact, other in zip(OUTPUTS, wanted, outputs, strict=True):
            # Measured: 1e-7.
            torch.testing.assert_close(other, exact, rtol=1e-5, atol=2e-6, msg=name)


def test_what_is_exported_is_the_fused_opinion(tiny):
    torch.manual_seed(0)
    model = Classifier(tiny, ("wli", "nbi"), 3, pool="cls", fusion_depth=1).eval()
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=1.0)
    present, *images = random_inputs(("wli", "nbi"), tiny.image, rows=6, seed=0)
    with torch.no_grad():
        said = dict(zip(OUTPUTS, Answering(model)(present, *images), strict=True))
    fused = opinion(fuse_evidence(said["evidence"], present=said["view_present"]))
    torch.testing.assert_close(said["belief"], fused.belief)
    torch.testing.assert_close(said["uncertainty"], fused.uncertainty)
    assert said["view_present"][:, :2].equal(present)
    modalities = conflict(said["evidence"][:, :2], present=present)
    torch.testing.assert_close(said["conflict"], modalities)
    assert modalities.max() > 0.01


def test_an_exported_model_that_answers_otherwise_is_an_error(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mics_fast.inference.export.largest_difference", lambda *_: 0.5)
    monkeypatch.setattr("mics_fast.inference.export.find_spec", lambda _: None)
    with pytest.raises(RunFailed, match="differs from the original by 5"):
        export_model(load_run(Run.open(trained_run)), tmp_path)


def test_predict_takes_the_exported_model_for_the_run(
    exported, trained_run, phantom_manifest, tmp_path
):
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    lines = phantom_manifest.read_text().splitlines()
    gaps = phantom_manifest.with_name("export-gaps.csv")  # every third row has no NBI
    cut = [line.rsplit(",", 1)[0] + "," if n % 3 == 1 else line for n, line in enumerate(lines)]
    gaps.write_text("\n".join(cut) + "\n")
    answers = []
    for model in (trained_run, exported):
        file = tmp_path / "answers.json"
        predict.main([str(model), "--manifest", str(gaps), "--json", str(file)])
        answers.append(json.loads(file.read_text()))
    for record, other in zip(*answers, strict=True):
        assert record["id"] == other["id"] and record["views"].keys() == other["views"].keys()
        assert record["belief"] == pytest.approx(other["belief"], abs=1e-5)
        assert record["conflict"] == pytest.approx(other["conflict"], abs=1e-5)


def test_the_sidecar_says_how_inputs_are_made(exported):
    sidecar = json.loads((exported / "model.json").read_text())
    assert sidecar["preprocessing"]["image_size"] == 64
    assert sidecar["preprocessing"]["normalize"] == "image"
    assert sidecar["modalities"] == ["wli", "nbi"] and len(sidecar["classes"]) == 6
    assert set(sidecar["outputs"]) == set(OUTPUTS)
    assert max(sidecar["largest_difference_from_original"].values()) < 1e-5


def test_the_model_card_holds_data_metrics_and_a_warning(exported, phantom_manifest):
    card = (exported / "MODEL_CARD.md").read_text()
    assert "Not a medical device" in card and "| accuracy |" in card
    assert f"{len(read_manifest(phantom_manifest).rows)} samples" in card
    assert "| plaque-green | 4 | 2 | 2 | 2 |" in card


def test_a_model_card_without_data_says_so(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    config = run / "config.yaml"
    moved = [
        "  manifest: nowhere.csv" if line.startswith("  manifest:") else line
        for line in config.read_text().splitlines()
    ]
    config.write_text("\n".join(moved) + "\n")
    card = model_card(load_run(Run.open(run)), {"model.pt2": 0.0}, 5)
    assert "Not measured when the model was exported: manifest nowhere.csv cannot be read" in card


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model.json").write_text("{}"), "is not that of an exported"),
        (lambda folder: (folder / "model.onnx").write_text("no"), "model.onnx cannot be read"),
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx does not exist"),
    ],
)
def test_a_damaged_export_is_one_sentence(exported, tmp_path, damage, sentence):
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    shutil.copytree(exported, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=sentence) as error:
        predict.main([str(tmp_path / "model"), "--folder", str(tmp_path)])
    assert "\n" not in str(error.value)
