"""Metrics of counted rows equal those of the rows written out, and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from mics_fast.evaluation.counted import Steps, class_scores
from mics_fast.evaluation.intervals import resamples
from mics_fast.evaluation.metrics import class_metrics, risk_coverage, sampled_metrics
from mics_fast.evaluation.opinions import Predictions

CLASSES = 4


def tied_predictions(rows=90, seed=0):
    """Probabilities and vacuities with many equal values; groups of 1 to 5 rows."""
    generator = torch.Generator().manual_seed(seed)
    probability = torch.randint(1, 6, (rows, CLASSES), generator=generator).float()
    label = torch.randint(0, CLASSES, (rows,), generator=generator)
    probability[torch.arange(rows), label] += 1
    return Predictions(
        probability / probability.sum(1, keepdim=True),
        torch.randint(1, 20, (rows,), generator=generator) / 20,
        label,
        torch.randint(0, rows // 3, (rows,), generator=generator),
    )


def drawn(predictions, count=25):
    """Counts of some resamples, and each with its rows written out."""
    counts = torch.cat([*resamples(predictions.group, count, seed=1)])
    rows = [torch.arange(len(own)).repeat_interleave(own.long()) for own in counts]
    return counts, [predictions.take(own) for own in rows]


def once(predictions):
    return torch.ones(1, len(predictions), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_counting_a_row_twice_equals_writing_it_twice(seed):
    predictions = tied_predictions(seed=seed)
    counts, written = drawn(predictions)
    together = sampled_metrics(predictions, counts)
    for number, own in enumerate(written):
        for name, value in sampled_metrics(own, once(own)).items():
            torch.testing.assert_close(
                together[name][number], value[0], rtol=0, atol=1e-12, equal_nan=True
            )


def test_resamples_score_what_scikit_learn_says_of_their_rows():
    predictions = tied_predictions()
    counts, _ = drawn(predictions)
    found = sampled_metrics(predictions, counts)
    label, answer = predictions.label.numpy(), predictions.probability.argmax(1).numpy()
    for number, weight in enumerate(counts.numpy()):
        given = {"sample_weight": weight}
        wanted = {
            "accuracy": oracle.accuracy_score(label, answer, **given),
            "balanced_accuracy": oracle.balanced_accuracy_score(label, answer, **given),
            "macro_f1": oracle.f1_score(label, answer, average="macro", **given),
            "kappa": oracle.cohen_kappa_score(label, answer, **given),
            "mcc": oracle.matthews_corrcoef(label, answer, **given),
        }
        assert {name: found[name][number].item() for name in wanted} == pytest.approx(
            wanted, abs=1e-12
        )
        for k in range(CLASSES):
            truth, score = label == k, predictions.probability[:, k].numpy()
            wanted = {
                "auroc": oracle.roc_auc_score(truth, score, **given),
                "auprc": oracle.average_precision_score(truth, score, **given),
                "sensitivity": oracle.recall_score(truth, answer == k, **given),
                "specificity": oracle.recall_score(~truth, answer != k, **given),
            }
            assert {name: found[name][number, k].item() for name in wanted} == pytest.approx(
                wanted, abs=1e-12
            )


def test_selection_follows_the_curve_of_risk_and_coverage():
    predictions = tied_predictions()
    counts, written = drawn(predictions)
    steps = Steps(predictions, counts)
    for number, own in enumerate(written):
        coverage, risk = risk_coverage(own)
        assert steps.mean_risk()[number].item() == pytest.approx(risk.mean().item(), abs=1e-12)
        for share in np.arange(1, 41) / 40:
            wanted = risk[int((coverage < share - 1e-9).sum())].item()
            assert steps.risk_at(share)[number].item() == pytest.approx(wanted, abs=1e-12)
            good = coverage[risk <= share + 1e-9]
            wanted = good.max().item() if len(good) else 0.0
            assert steps.coverage_at(share)[number].item() == pytest.approx(wanted, abs=1e-12)


def test_a_class_without_rows_in_a_resample_has_no_scores():
    predictions = tied_predictions()
    counts = (predictions.label != 2).double().unsqueeze(0)
    alone = (predictions.label == 2).double().unsqueeze(0)
    scores = class_scores(predictions, torch.cat([counts, alone]))
    for name in ("sensitivity", "auroc", "auprc"):
        assert scores[name][0].isnan().tolist() == [False, False, True, False]
    assert scores["specificity"][:, 2].isnan().tolist() == [False, True]
    wanted = class_metrics(predictions.take(predictions.label != 2))
    torch.testing.assert_close({k: x[0] for k, x in scores.items()}, wanted, equal_nan=True)
