"""Cross-validation: every row is judged by the run that was not trained on it, in one table."""

from __future__ import annotations

import json
import shutil

import pytest

import mics_fast
from mics_fast import evaluate, experiment, predict, prepare
from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from mics_fast.evaluation.opinions import FUSED
from mics_fast.inference.assessment import assess
from mics_fast.inference.run_classifier import load_run, run_manifest
from mics_fast.study.cross_validation import check_folds
from mics_fast.training.run import Run


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    """Intervals from few resamples: their width is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "RESAMPLES", 5)
        yield


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Two folds of 36 phantom pairs."""
    folder = tmp_path_factory.mktemp("folds")
    prepare.main(["phantom", "--out", str(folder), "--pairs", "36", "--folds", "2"])
    return folder


@pytest.fixture(scope="module")
def finished(folds, few_steps, tmp_path_factory):
    out = tmp_path_factory.mktemp("cross-validation") / "cv"
    experiment.main([*few_steps, "--experiment.folds", str(folds), "--out", str(out)])
    return out


def own_test_rows(finished):
    """fold -> its run on its own test rows."""
    runs = [Run.open(finished / f"fold-{number}") for number in (1, 2)]
    return [assess(run, run_manifest(run), "test") for run in runs]


def test_the_pooled_table_counts_every_row_once(finished):
    result = json.loads((finished / "results.json").read_text())
    first, second = own_test_rows(finished)
    assert result["n"] == 36 == len(first.rows) + len(second.rows)
    assert not {row.id for row in first.rows} & {row.id for row in second.rows}
    right = sum(len(own.rows) - own.predictions()[FUSED].wrong().sum() for own in (first, second))
    assert result["views"]["fused"]["accuracy"] == pytest.approx(float(right) / 36)
    assert set(result["views"]) == {"fused", "wli", "nbi"}


def test_each_fold_has_its_own_line(finished, tmp_path):
    result = json.loads((finished / "results.json").read_text())
    for number, line in enumerate(result["folds"], 1):
        file = tmp_path / f"{number}.json"
        evaluate.main([str(finished / f"fold-{number}"), "--json", str(file), "--resamples", "10"])
        alone = json.loads(file.read_text())
        assert line["fold"] == f"fold-{number}" and int(line["n"]) == alone["n"]
        assert line["accuracy"] == f"{alone['views']['fused']['accuracy']:.3f}"


def test_one_report_is_about_all_rows(finished):
    page = (finished / "report.html").read_text()
    assert "Cross-validation: cv" in page and "36 samples in 36 groups" in page
    assert "judged by the one of 2 runs that was not trained on it" in page


def test_a_finished_cross_validation_is_not_trained_again(finished, folds, few_steps):
    logs = {file: file.read_text() for file in finished.glob("fold-*/metrics.jsonl")}
    experiment.main([*few_steps, "--experiment.folds", str(folds), "--out", str(finished)])
    assert len(logs) == 2 and all(file.read_text() == text for file, text in logs.items())


def test_a_folder_without_folds_is_one_sentence(tmp_path, few_steps):
    with pytest.raises(InputError, match=r"holds 0 files fold-\*\.csv, wanted those of prepare"):
        experiment.main(
            [*few_steps, "--experiment.folds", str(tmp_path), "--out", str(tmp_path / "out")]
        )


def test_a_row_that_two_folds_test_is_refused(folds):
    first = read_manifest(folds / "fold-1.csv")
    with pytest.raises(
        InputError, match=r"row \S+ is tested in .*fold-1\.csv and in .*fold-1\.csv"
    ):
        check_folds([first, first])


def test_a_row_that_no_fold_tests_is_refused(folds):
    with pytest.raises(InputError, match=r"row \S+ is tested in no fold of"):
        check_folds([read_manifest(folds / "fold-1.csv")])


def test_folds_of_other_rows_are_refused(folds, phantom_manifest):
    others = [read_manifest(folds / "fold-1.csv"), read_manifest(phantom_manifest)]
    with pytest.raises(InputError, match=r"is no fold of the rows of .*48 rows instead"):
        check_folds(others)


def test_several_runs_answer_by_their_mean_evidence(finished, folds):
    runs = [finished / "fold-1", finished / "fold-2"]
    (row,) = read_manifest(folds / "fold-1.csv").rows[:1]
    sample = {name: str(file) for name, file in row.files.items()}
    (stated,) = mics_fast.load(*runs).predict(sample)
    evidence = []
    for folder in runs:
        classifier = load_run(Run.open(folder))
        evidence.append(classifier.opinions([row], "").evidence[0].double())
    # Dempster's rule for Dirichlet opinions of C classes, written out:
    # 1 + fused / C = prod_v (1 + evidence_v / C).
    mean, classes = (evidence[0] + evidence[1]) / 2, 6
    fused = classes * ((1 + mean / classes).prod(0) - 1)
    probability = (fused + 1) / (fused.sum() + classes)
    assert list(stated["probability"].values()) == pytest.approx(probability.tolist(), rel=1e-5)
    assert stated["uncertainty"] == pytest.approx(
        classes / (fused.sum().item() + classes), rel=1e-5
    )


def test_a_run_twice_answers_as_once(finished, folds):
    rows = folds / "fold-1.csv"
    once = mics_fast.load(finished / "fold-1").predict(rows)
    twice = mics_fast.load(finished / "fold-1", finished / "fold-1").predict(rows)
    for one, two in zip(once, twice, strict=True):
        assert list(two["probability"].values()) == pytest.approx(
            list(one["probability"].values()), rel=1e-5
        )


def test_the_command_takes_several_runs(finished, folds, tmp_path):
    runs = [str(finished / "fold-1"), str(finished / "fold-2")]
    file = tmp_path / "answers.json"
    predict.main([*runs, "--manifest", str(folds / "fold-1.csv"), "--json", str(file)])
    answers = json.loads(file.read_text())
    assert answers == json.loads(json.dumps(mics_fast.load(*runs).predict(folds / "fold-1.csv")))


def test_runs_of_other_preprocessing_do_not_answer_as_one(finished, trained_run, tmp_path):
    other = shutil.copytree(trained_run, tmp_path / "other")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("normalize: image", "normalize: fixed"))
    with pytest.raises(InputError, match=r"cannot answer as one: data\.normalize is 'image' and"):
        mics_fast.load(finished / "fold-1", other)
