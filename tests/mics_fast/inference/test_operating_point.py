"""Calibration and referral rule are stored in the run, and later commands use them."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

import mics_fast
from mics_fast import evaluate, export, predict, report
from mics_fast.common.errors import InputError
from mics_fast.evaluation.metrics import prediction_metrics
from mics_fast.evaluation.opinions import FUSED
from mics_fast.evaluation.tables import SHOWN, number
from mics_fast.inference.assessment import assess
from mics_fast.inference.run_classifier import load_run, run_manifest
from mics_fast.training.run import Run


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A run with a stored operating point, and the evaluation that chose it."""
    folder = tmp_path_factory.mktemp("pointed") / "run"
    shutil.copytree(trained_run, folder)
    evaluate.main(
        [str(folder), "--resamples", "5", "--target-risk", "0.5", "--calibrate", "evidence",
         "--refer-by", "probability", "--flips", "--set-coverage", "0.8",
         "--json", str(folder / "m.json")]
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model(run):
    return mics_fast.load(run)


def test_evaluate_measures_both_criteria_and_keeps_the_one_asked_for(run):
    result = json.loads((run / "m.json").read_text())["referral"]
    assert [own["by"] for own in result["rules"]] == ["uncertainty", "probability"]
    assert (result["by"], result["target_risk"], result["confidence"]) == ("probability", 0.5, None)
    for own in result["rules"]:
        assert own["risk"] <= own["coverage"] and set(own["per_class"]) == set(mics_fast.load(
            run).classes)  # fmt: skip


def test_predict_refers_by_the_stored_rule_and_says_why(run, model, phantom_manifest):
    records = {own["id"]: own for own in model.predict(phantom_manifest)}
    found = assess(Run.open(run), run_manifest(Run.open(run)), "test")
    predictions = found.predictions()[FUSED]
    rule = load_run(Run.open(run)).point.rule
    assert rule.by == "probability"
    referred = rule.refers(predictions).tolist()
    for position, row in enumerate(found.rows):
        record = records[row.id]
        assert record["refer"] == referred[position] == ("reason" in record)
        # Calibrated, as evaluate judged it.
        assert list(record["probability"].values()) == pytest.approx(
            predictions.probability[position].tolist(), abs=1e-5
        )
    assert 0 < sum(own["refer"] for own in records.values()) < len(records)
    reason = next(own["reason"] for own in records.values() if own["refer"])
    assert reason.startswith("probability 0.") and " is below 0." in reason


def test_answers_hold_the_sets_that_evaluate_measured(run, model, phantom_manifest):
    records = {own["id"]: own for own in model.predict(phantom_manifest)}
    found = assess(Run.open(run), run_manifest(Run.open(run)), "test")
    sets = [set(records[row.id]["set"]) for row in found.rows]
    truth = [found.classifier.classes[row.label] for row in found.rows]
    measured = json.loads((run / "m.json").read_text())["sets"]
    assert measured["coverage"] == 0.8
    held = [name in own for name, own in zip(truth, sets, strict=True)]
    assert measured["covered"] == pytest.approx(sum(held) / len(held))
    assert measured["size"] == pytest.approx(sum(map(len, sets)) / len(sets))
    assert all(own["class"] in own["set"] for own in records.values())


def test_a_mirrored_sample_gets_the_same_answer_where_flips_are_averaged(run, model, trained_run):
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    sample = {"wli": noise[0], "nbi": noise[1]}
    mirrored = {name: np.ascontiguousarray(image[:, ::-1]) for name, image in sample.items()}
    (own,), (other,) = model.predict(sample), model.predict(mirrored)
    assert own["belief"] == pytest.approx(other["belief"], abs=1e-6)
    plain = mics_fast.load(trained_run)
    (own,), (other,) = plain.predict(sample), plain.predict(mirrored)
    assert own["belief"] != pytest.approx(other["belief"], abs=1e-6)


def test_changing_flips_drops_the_rule_that_was_chosen_under_the_others(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    evaluate.main([str(folder), "--resamples", "5", "--no-flips"])
    point = load_run(Run.open(folder)).point
    assert not point.flips and point.rule is None and point.sets is None


def test_another_calibration_drops_the_rule_that_was_chosen_under_the_first(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    evaluate.main([str(folder), "--resamples", "5", "--calibrate", "none"])
    assert "is dropped: choose it again with --target-risk" in capsys.readouterr().err
    point = load_run(Run.open(folder)).point
    assert point.calibration is None and point.rule is None and point.sets is None
    assert not point.predictive_values and point.flips


def test_evaluating_again_without_options_gives_the_same_figures(run, tmp_path):
    evaluate.main([str(run), "--resamples", "5", "--json", str(tmp_path / "m.json")])
    before, now = json.loads((run / "m.json").read_text()), json.loads(
        (tmp_path / "m.json").read_text())  # fmt: skip
    assert now["views"] == before["views"] and now["calibration"] == before["calibration"]
    assert now["referral"]["rules"] == [before["referral"]["rules"][1]]


def test_the_report_shows_the_calibrated_figures_of_evaluate(run, tmp_path):
    report.main([str(run), "--out", str(tmp_path / "report.html"), "--resamples", "5"])
    rows = re.findall(r"<tr>(.*?)</tr>", (tmp_path / "report.html").read_text())
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    result = json.loads((run / "m.json").read_text())
    for name in ("accuracy", "nll", "brier", "ece", "uncertainty"):
        values = [number(result["views"][view][name]) for view in ("fused", "wli", "nbi")]
        (shown,) = [own for own in cells if own[:1] == [SHOWN[name]] and len(own) == 5]
        assert [shown[1], *shown[3:]] == values, name
    kept = result["referral"]["rules"][1]
    values = [number(kept[name]) for name in ("coverage", "risk", "error")]
    assert any(own[1::2] == values for own in cells if len(own) == 7)
    plain = assess(Run.open(run), run_manifest(Run.open(run)), "test", "none").predictions()
    uncalibrated = prediction_metrics(plain[FUSED])["uncertainty"]
    assert number(uncalibrated) != number(result["views"]["fused"]["uncertainty"])


def test_an_exported_model_answers_and_refers_as_the_run(run, model, phantom_manifest, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    export.main([str(run), "--out", str(tmp_path), "--resamples", "2"])
    for own, other in zip(
        model.predict(phantom_manifest), mics_fast.load(tmp_path).predict(phantom_manifest),
        strict=True,
    ):  # fmt: skip
        assert own["probability"] == pytest.approx(other["probability"], abs=1e-5)
        assert own["belief"] == pytest.approx(other["belief"], abs=1e-5)
        assert own["refer"] == other["refer"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    (said,) = model.predict({"wli": noise[0], "nbi": noise[1]})
    views = [(x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1) for x in noise.astype(np.float64)]
    named = {n: x.transpose(2, 0, 1)[None].astype(np.float32)
             for n, x in zip(("wli", "nbi"), views, strict=True)}  # fmt: skip
    probability, refer = session.run(
        ["probability", "refer"], {**named, "present": np.ones((1, 2), bool)}
    )
    assert probability[0].tolist() == pytest.approx(list(said["probability"].values()), abs=1e-5)
    assert bool(refer[0]) == said["refer"]


def test_a_threshold_of_ones_own_takes_the_place_of_the_stored_rule(run, model, phantom_manifest):
    records = model.predict(phantom_manifest, refer_above=0.0)
    assert all(own["refer"] and own["reason"].startswith("uncertainty") for own in records)


def test_predict_prints_probability_predictive_values_and_the_rule(run, phantom_manifest, capsys):
    predict.main([str(run), "--manifest", str(phantom_manifest)])
    said = capsys.readouterr().out
    assert "uncertainty" in said and "PPV" in said and "NPV" in said
    assert re.search(r"referred to a person: \d+ of \d+ \(rule: probability below 0\.\d{3}\)", said)


def test_an_operating_point_of_another_checkpoint_is_not_used(run, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    file = other / "operating_point.json"
    file.write_text(file.read_text().replace('"checkpoint": "', '"checkpoint": "0'))
    assert load_run(Run.open(other)).point.rule is None
    assert "is of another checkpoint and is not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["no", "[]", "{}", '{"calibration": null, "referral": null, "flips": "yes"}',
     '{"calibration": null, "referral": null, "sets": {"coverage": 2, "limit": 0}}',
     '{"calibration": null, "referral": {"by": "mood"}}', "[" * 10**5],
)  # fmt: skip
def test_a_damaged_operating_point_is_one_sentence(run, tmp_path, text):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "operating_point.json").write_text(text)
    with pytest.raises(InputError, match=r"holds no operating point|is no JSON"):
        mics_fast.load(other)


def test_bad_targets_are_one_sentence(trained_run):
    for arguments, sentence in (
        (["--target-risk", "1.5"], "--target-risk is 1.5, wanted a number between 0 and 1"),
        (["--set-coverage", "1"], "--set-coverage is 1.0, wanted a number between 0 and 1"),
        (["--set-coverage", "0.99"], "12 groups of val rows, wanted at least 99 for sets"),
        (["--confidence", "0.9"], "--confidence is given without --target-risk"),
    ):
        with pytest.raises(InputError, match=sentence):
            evaluate.main([str(trained_run), *arguments, "--resamples", "2"])
