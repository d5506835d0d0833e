"""The evaluate command: every view, with intervals, against another run, out of distribution."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch

from mics_fast import evaluate
from mics_fast.common.anonymity import pseudonym
from mics_fast.common.errors import InputError
from mics_fast.evaluation.answers import answer
from mics_fast.evaluation.opinions import Predictions
from mics_fast.evaluation.results import describe
from mics_fast.inference.assessment import add_pseudo_labels, assess, compare, trained_on
from mics_fast.inference.run_classifier import RunClassifier, run_manifest
from mics_fast.training.run import Run

WANTED = {
    "accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "macro_auprc", "kappa", "mcc",
    "ece", "adaptive_ece", "brier", "nll", "aurc", "risk_at_80_coverage", "coverage_at_5_risk",
    "uncertainty", "n", "intervals", "per_class", "confusion", "pseudo_labels",
    "out_of_distribution_auroc",
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(trained_run, phantom_manifest, tmp_path_factory):
    """Everything the command can do at once: the JSON, and the rows of the CSV."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained_run, folder / "run")  # it gets an operating point
    evaluate.main(
        [str(folder / "run"), "--json", str(folder / "m.json"), "--csv", str(folder / "o.csv"),
         "--resamples", "20", "--against", str(trained_run), "--calibrate", "evidence",
         "--out-of-distribution", str(phantom_manifest)]
    )  # fmt: skip
    with open(folder / "o.csv", newline="") as file:
        return json.loads((folder / "m.json").read_text()), list(csv.DictReader(file))


def test_every_opinion_gets_every_metric(evaluated):
    result, _ = evaluated
    assert set(result["views"]) == {"fused", "wli", "nbi"}
    assert set(result["missing"]) == {"wli", "nbi"}
    for metrics in [*result["views"].values(), *result["missing"].values()]:
        assert metrics.keys() == WANTED
        low, high = metrics["intervals"]["accuracy"]
        assert 0 <= low <= metrics["accuracy"] <= high <= 1
    assert result["n"] == 12 and result["groups"] == 12 and result["split"] == "test"


def test_each_class_has_sensitivity_and_specificity_with_intervals(evaluated):
    result, _ = evaluated
    per_class = result["views"]["fused"]["per_class"]
    assert list(per_class) == result["classes"]
    table = result["views"]["fused"]["confusion"]
    for k, metrics in enumerate(per_class.values()):
        assert metrics["n"] == sum(table[k]) == 2
        assert metrics["sensitivity"] == pytest.approx(table[k][k] / 2)
        assert set(metrics["intervals"]) == {"sensitivity", "specificity", "auroc", "auprc"}


def test_of_two_modalities_the_one_left_is_the_modality_alone(evaluated):
    result, _ = evaluated
    assert result["missing"]["wli"]["nll"] == pytest.approx(result["views"]["nbi"]["nll"])


def test_a_run_does_not_differ_from_itself(evaluated):
    result, _ = evaluated
    assert set(result["against"]["views"]) == {"fused", "wli", "nbi"}
    assert set(result["against"]["missing"]) == {"wli", "nbi"}
    assert result["against"]["views"]["fused"]["mcc"] == {"difference": 0, "interval": [0, 0]}


def test_pseudo_labels_are_judged_on_the_unlabelled_train_rows(evaluated, trained_run):
    result, _ = evaluated
    quality = result["views"]["fused"]["pseudo_labels"]
    share = Run.open(trained_run).config.finetune.accepted_share  # of each class, rounded down
    assert quality["n"] == 12 and 0 <= quality["coverage"] <= share + 1e-6


def test_a_rule_that_reads_logits_costs_no_pass_over_the_unlabelled_rows(trained_run, monkeypatch):
    run = Run.open(trained_run)
    assessment = assess(run, run_manifest(run), "test")

    def opinions(*_: object, **__: object) -> None:
        raise AssertionError("opinions were computed")

    monkeypatch.setattr(RunClassifier, "opinions", opinions)
    run.config.finetune.pseudo_labels = "fixmatch"
    add_pseudo_labels(assessment, {})


def test_the_table_of_opinions_holds_every_row(evaluated):
    result, rows = evaluated
    assert len(rows) == 12
    share = sum(int(row["correct"]) for row in rows) / 12
    assert share == pytest.approx(result["views"]["fused"]["accuracy"])
    for row in rows:
        beliefs = [float(row[f"belief.{name}"]) for name in result["classes"]]
        assert sum(beliefs) + float(row["uncertainty"]) == pytest.approx(1, abs=1e-5)


def test_calibration_states_its_factors(evaluated):
    result, _ = evaluated
    assert result["calibration"]["kind"] == "evidence"
    factors = result["calibration"]["factors"]
    assert set(factors["views"]) == {"fused", "wli", "nbi"}
    assert set(factors["missing"]) == {"wli", "nbi"}


def test_runs_on_other_rows_are_not_compared(trained_run, phantom_manifest, capsys):
    lines = phantom_manifest.read_text().splitlines()
    test = next(line for line in lines if ",test," in line)
    fewer = phantom_manifest.with_name("fewer.csv")
    fewer.write_text("\n".join(line for line in lines if line != test) + "\n")
    run = Run.open(trained_run)
    ours = assess(run, run_manifest(run), "test")
    theirs = assess(run, run_manifest(run, fewer), "test")
    with pytest.raises(InputError, match="got 12 and 11 rows of which 11 agree"):
        compare(ours, theirs, 10)


def test_a_manifest_without_one_of_the_modalities_is_refused(trained_run, phantom_manifest):
    lines = [line.rsplit(",", 1)[0] for line in phantom_manifest.read_text().splitlines()]
    single = phantom_manifest.with_name("single.csv")
    single.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"single\.csv has no modality nbi, only wli"):
        evaluate.main([str(trained_run), "--manifest", str(single)])


def test_bad_options_are_one_sentence(trained_run, tmp_path):
    with pytest.raises(InputError, match="--resamples is 0, wanted at least 1"):
        evaluate.main([str(trained_run), "--resamples", "0"])
    with pytest.raises(InputError, match=r"m\.json cannot be written"):
        evaluate.main(
            [str(trained_run), "--resamples", "1", "--json", str(tmp_path / "no" / "m.json")]
        )


def test_all_right_is_not_right_for_certain():
    probability = torch.eye(2).repeat(10, 1)
    label, group = torch.tensor([0, 1]).repeat(10), torch.arange(20)
    predictions = Predictions(probability, torch.full((20,), 0.5), label, group)
    described = describe(predictions, ["a", "b"], 5)
    assert described.values["accuracy"] == 1
    assert described.intervals["accuracy"] == pytest.approx([0.025 ** (1 / 20), 1.0])
    sensitivity = described.per_class["a"].intervals["sensitivity"]
    assert sensitivity == pytest.approx([0.025 ** (1 / 10), 1.0])


def test_a_minus_sends_the_metrics_to_standard_output(trained_run, capsys):
    evaluate.main([str(trained_run), "--resamples", "2", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["split"] == "test"


def test_a_test_set_that_lacks_a_class_is_judged_by_the_classes_of_the_run(
    trained_run, phantom_manifest, tmp_path
):
    with open(phantom_manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    absent = sorted({row["label"] for row in rows})[2]
    external = phantom_manifest.with_name("external.csv")
    with open(external, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row for row in rows if row["label"] != absent)
    out = tmp_path / "m.json"
    evaluate.main(
        [str(trained_run), "--manifest", str(external), "--json", str(out), "--resamples", "2"]
    )
    result, run = json.loads(out.read_text()), Run.open(trained_run)
    everything = assess(run, run_manifest(run), "test")
    right = [
        own["class"] == everything.classifier.classes[row.label]
        for own, row in zip(
            answer(everything.opinions, [r.id for r in everything.rows], result["classes"]),
            everything.rows, strict=True,
        )
        if everything.classifier.classes[row.label] != absent
    ]  # fmt: skip
    assert len(result["classes"]) == 6 and result["n"] == len(right) == 10
    assert result["views"]["fused"]["accuracy"] == pytest.approx(sum(right) / 10)
    assert result["views"]["fused"]["per_class"][absent]["sensitivity"] is None


def test_a_test_set_with_a_class_of_its_own_is_refused(trained_run, phantom_manifest):
    other = phantom_manifest.with_name("other-class.csv")
    other.write_text(phantom_manifest.read_text().replace("plaque-green", "plaque-blue"))
    with pytest.raises(InputError, match=r"other-class\.csv has class 'plaque-blue', wanted those"):
        evaluate.main([str(trained_run), "--manifest", str(other)])


def test_an_anonymised_table_carries_pseudonyms(trained_run, phantom_manifest, tmp_path):
    key, table = tmp_path / "key", tmp_path / "opinions.csv"
    key.write_text("a secret of some length")
    evaluate.main(
        [str(trained_run), "--csv", str(table), "--resamples", "1", "--anonymise", str(key)]
    )  # fmt: skip
    run = Run.open(trained_run)
    with open(table, newline="") as file:
        given = [row["id"] for row in csv.DictReader(file)]
    assert given == [
        pseudonym(b"a secret of some length", row.id) for row in run_manifest(run).select("test")
    ]


def test_rows_that_were_trained_on_are_warned_about(
    trained_run, phantom_manifest, tmp_path, capsys
):
    run = Run.open(trained_run)
    lines = phantom_manifest.read_text().splitlines()
    swapped = tmp_path / "swapped.csv"  # train and test change places
    names = {",train,": ",test,", ",test,": ",train,"}
    folder = str(phantom_manifest.parent)
    rows = []
    for line in lines[1:]:
        for before, after in names.items():
            if before in line:
                line = line.replace(before, after)
                break
        rows.append(line.replace("wli/", f"{folder}/wli/").replace("nbi/", f"{folder}/nbi/"))
    swapped.write_text("\n".join([lines[0], *rows]) + "\n")
    assert len(trained_on(assess(run, run_manifest(run, swapped), "test"))) == 24
    assert trained_on(assess(run, run_manifest(run), "test")) == []
    other = assess(run, run_manifest(run, swapped), "test")
    foreign = [replace(row, files={"wli": None, "nbi": None}) for row in other.rows]
    assert trained_on(replace(other, rows=foreign)) == []  # the same ids, other images
    evaluate.warn_of_training(other)
    assert "trained on 24 of the 24 rows" in capsys.readouterr().err
