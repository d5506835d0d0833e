"""An exported model answers like the trained one, and describes itself."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import mics_fast
from mics_fast import predict
from mics_fast.common.errors import InputError, RunFailed
from mics_fast.data.manifest import read_manifest
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.tables import markdown_text
from mics_fast.inference.export import Answering, export_model, random_inputs
from mics_fast.inference.exported_classifier import OUTPUTS
from mics_fast.inference.model_card import model_card
from mics_fast.inference.run_classifier import load_run
from mics_fast.models.classifier import Classifier
from mics_fast.training.run import Run
from mics_kernels import conflict, fuse_evidence, opinion
from tests.mics_fast.mutation import draws, mutated
from tests.mics_fast.preparation.preparing import scenery


def inputs(rows, seed=3):
    return random_inputs(("wli", "nbi"), 64, rows=rows, seed=seed)


def test_the_program_answers_like_the_trained_model(exported, trained_run):
    model = load_run(Run.open(trained_run)).model.cpu()
    program = torch.export.load(exported / "model.pt2").module()
    for rows in (1, 2, 7):
        given = inputs(rows)
        with torch.no_grad():
            wanted = Answering(model, OperatingPoint())(*given)
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
            wanted = Answering(model, OperatingPoint())(*given)
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
        said = dict(zip(OUTPUTS, Answering(model, OperatingPoint())(present, *images), strict=True))
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


def test_exported_files_name_no_source_file(exported, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    with zipfile.ZipFile(exported / "model.pt2") as archive:
        parts = [archive.read(name) for name in archive.namelist()]
    for content in (*parts, (exported / "model.onnx").read_bytes()):
        assert b".py" not in content and b"site-packages" not in content


def test_an_anonymised_model_card_names_no_file_and_no_folder(trained_run):
    classifier = load_run(Run.open(trained_run))
    card = model_card(classifier, {"model.pt2": 0.0}, 2, paths=False)
    assert "Model card: a run" in card and "manifest.csv" not in card
    assert str(trained_run.parent) not in card


def test_names_in_a_model_card_are_text():
    assert markdown_text("<img src=x>") == "\\<img src=x\\>"
    assert markdown_text("a|b_c*`d`&amp;") == "a\\|b\\_c\\*\\`d\\`&amp;amp;"


def edited(**changes):
    """A damage that changes entries of the sidecar, those of "preprocessing" too."""

    def damage(folder):
        file = folder / "model.json"
        sidecar = json.loads(file.read_text())
        for name, value in changes.items():
            holder = sidecar if name in sidecar else sidecar["preprocessing"]
            holder[name] = value
        file.write_text(json.dumps(sidecar))

    return damage


def without_metadata(folder):
    model = pytest.importorskip("onnx").load(folder / "model.onnx")
    del model.metadata_props[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model.json").write_text("{}"), "is not that of an exported"),
        (lambda folder: (folder / "model.json").write_text("[" * 100000), "model.json is no JSON"),
        (lambda folder: (folder / "model.onnx").write_text("no"), "model.onnx cannot be read"),
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx does not exist"),
        (without_metadata, "has no metadata of mics-fast"),
        (edited(normalize="Image"), 'has normalize "Image", wanted fixed or image'),
        (edited(normalize="fixed"), "disagree about normalize"),
        (edited(image_size=10**9), "has image_size 1000000000, wanted a number from 1 to 4096"),
        (edited(image_size=32), "disagree about image_size"),
        (edited(mean={"wli": [0, 0, 0], "nbi": [0, 0, 0]}), "disagree about mean"),
        (edited(std={"wli": [1, 1, 1], "nbi": [1, 0, 1]}), "wanted three finite numbers per"),
        (edited(modalities=["nbi", "wli"], views=["nbi", "wli", "fusion"]), "about modalities"),
        (edited(views=["wli", "nbi"]), "has views .*, wanted the modalities, then fusion"),
        (edited(classes=["a", "a"]), "has classes .*, wanted a list of different names"),
        (edited(classes=list("fedcba")), "disagree about classes"),
        (edited(classes="abcdef"), "has classes"),
    ],
)
def test_a_damaged_export_is_one_sentence(exported, tmp_path, damage, sentence):
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    shutil.copytree(exported, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=sentence) as error:
        predict.main([str(tmp_path / "model"), "--folder", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_swapped_class_order_is_refused(exported, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    classes = json.loads((exported / "model.json").read_text())["classes"]
    shutil.copytree(exported, tmp_path / "model")
    edited(classes=[classes[1], classes[0], *classes[2:]])(tmp_path / "model")
    with pytest.raises(InputError, match="disagree about classes"):
        mics_fast.load(tmp_path / "model")


PIECES = [b"null", b"[]", b"-1", b"1e999", b"9" * 400, b"[" * 300, b'"', b"\xff", b"\xff" * 9]


def test_a_file_that_cannot_be_written_whole_is_one_sentence(trained_run, tmp_path):
    """A limit of 100 kB per file, which ends in the same error as a full disk."""
    out = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-m", "mics_fast.export", trained_run, "--out", out, "--resamples", "2"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"error: {out / 'model.pt2'} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(out.iterdir()) == []


def test_mutated_exports_end_in_a_sentence_or_an_answer(exported, tmp_path):
    """Bytes of the folder's files changed at random, then a prediction."""
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    folder = tmp_path / "model"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("*.pt2", "*.md"))
    originals = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    image = tmp_path / "x.png"
    scenery(1, 40, 30).save(image)
    for draw in draws():
        file = draw.choice(list(originals))
        file.write_bytes(mutated(draw, originals[file], PIECES))
        try:
            (answer,) = mics_fast.load(folder).predict([{"wli": image, "nbi": image}])
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert answer.get("error") or answer["class"] in answer["probability"]
        file.write_bytes(originals[file])
