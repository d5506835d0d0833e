"""Metrics agree with scikit-learn, or with values computed by hand where it has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from mics_fast.evaluation.metrics import (
    adaptive_ece,
    class_metrics,
    confusion,
    out_of_distribution_auroc,
    prediction_metrics,
    pseudo_label_quality,
    risk_coverage,
    risks_at,
    sampled_metrics,
)
from mics_fast.evaluation.opinions import Predictions


def make_predictions(probability, uncertainty, label):
    label = torch.as_tensor(label)
    return Predictions(
        torch.as_tensor(probability, dtype=torch.float32),
        torch.as_tensor(uncertainty, dtype=torch.float32),
        label,
        torch.arange(len(label)),
    )


def random_predictions(rows, classes, occurring, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(rows, classes, generator=generator).softmax(-1)
    label = torch.randint(0, occurring, (rows,), generator=generator)
    return make_predictions(probability, torch.rand(rows, generator=generator), label)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_scikit_learn(seed):
    predictions = random_predictions(200, 5, 5, seed)
    values = prediction_metrics(predictions)
    label, probability = predictions.label.numpy(), predictions.probability.double().numpy()
    probability /= probability.sum(1, keepdims=True)
    predicted = probability.argmax(-1)
    wanted = {
        "accuracy": oracle.accuracy_score(label, predicted),
        "balanced_accuracy": oracle.balanced_accuracy_score(label, predicted),
        "macro_f1": oracle.f1_score(label, predicted, average="macro"),
        "macro_auroc": oracle.roc_auc_score(label, probability, multi_class="ovr"),
        "macro_auprc": oracle.average_precision_score(np.eye(5)[label], probability),
        "kappa": oracle.cohen_kappa_score(label, predicted),
        "mcc": oracle.matthews_corrcoef(label, predicted),
        "brier": np.square(probability - np.eye(5)[label]).sum(1).mean(),
        "nll": oracle.log_loss(label, probability),
    }
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, abs=2e-6)
    assert confusion(predictions) == oracle.confusion_matrix(label, predicted).tolist()


def test_metrics_of_a_class_are_those_of_the_class_against_the_rest():
    predictions = random_predictions(150, 4, 4)
    each = class_metrics(predictions)
    predicted = predictions.probability.argmax(-1)
    for k in range(4):
        truth, score = (predictions.label == k).numpy(), predictions.probability[:, k].numpy()
        guess = (predicted == k).numpy()
        wanted = {
            "sensitivity": oracle.recall_score(truth, guess),
            "specificity": oracle.recall_score(~truth, ~guess),
            "auroc": oracle.roc_auc_score(truth, score),
            "auprc": oracle.average_precision_score(truth, score),
        }
        assert {name: x[k].item() for name, x in each.items()} == pytest.approx(wanted, abs=1e-6)


def test_classes_that_do_not_occur_do_not_count():
    predictions = random_predictions(100, 5, 3)
    values, each = prediction_metrics(predictions), class_metrics(predictions)
    label, predicted = predictions.label.numpy(), predictions.probability.argmax(-1).numpy()
    with pytest.warns(UserWarning):
        wanted = oracle.balanced_accuracy_score(label, predicted)
    assert values["balanced_accuracy"] == pytest.approx(wanted)
    areas = [
        oracle.roc_auc_score(label == k, predictions.probability[:, k].numpy()) for k in range(3)
    ]
    assert values["macro_auroc"] == pytest.approx(sum(areas) / 3, abs=1e-6)
    assert each["sensitivity"][3:].isnan().all() and not each["specificity"].isnan().any()


def test_areas_are_undefined_where_only_one_class_occurs():
    predictions = random_predictions(20, 3, 1)
    assert math.isnan(prediction_metrics(predictions)["macro_auroc"])
    assert class_metrics(predictions)["specificity"][0].isnan()


# Ten rows of two classes: confidences 0.6 (five rows, three right) and 0.9 (five rows, all right).
BY_HAND = make_predictions(
    [[0.6, 0.4]] * 5 + [[0.9, 0.1]] * 5, [0.8] * 5 + [0.2] * 5, [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
)


def test_calibration_by_hand():
    values = prediction_metrics(BY_HAND)
    # Bins of 1/15: both confidences alone in theirs; |0.6 - 3/5| * 0.5 + |0.9 - 1| * 0.5.
    assert values["ece"] == pytest.approx(0.05, abs=1e-6)
    assert values["brier"] == pytest.approx((3 * 0.32 + 2 * 0.72 + 5 * 0.02) / 10)
    wanted = -(3 * math.log(0.6) + 2 * math.log(0.4) + 5 * math.log(0.9)) / 10
    assert values["nll"] == pytest.approx(wanted)


def test_adaptive_calibration_error_fills_its_bins_evenly():
    # 30 rows fill 15 bins of two: the confidences of a bin are c and c + 0.01; the first of each
    # pair is wrong, so a bin's gap is |0.5 - (c + 0.005)|.
    confidence = torch.linspace(0.60, 0.89, 30)
    label = torch.tensor([1, 0]).repeat(15)
    predictions = make_predictions(
        torch.stack([confidence, 1 - confidence], 1), torch.rand(30), label
    )
    wanted = (confidence.reshape(15, 2).mean(1) - 0.5).abs().mean().item()
    assert adaptive_ece(predictions) == pytest.approx(wanted, abs=1e-6)


def test_selective_prediction_by_hand():
    # Sorted by vacuity: right, wrong, right, right, wrong.
    predictions = make_predictions([[1.0, 0.0]] * 5, [0.3, 0.1, 0.2, 0.5, 0.4], [0, 0, 1, 1, 0])
    coverage, risk = risk_coverage(predictions)
    assert coverage.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4, 2 / 5])
    values = prediction_metrics(predictions)
    assert values["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert values["risk_at_80_coverage"] == pytest.approx(1 / 4)
    assert risks_at(predictions, (50, 100)) == pytest.approx(  # of 2.5 rows: of 3
        {"risk_at_50_coverage": 1 / 3, "risk_at_100_coverage": 2 / 5}
    )
    assert values["coverage_at_5_risk"] == pytest.approx(0.2)


def test_rows_of_equal_vacuity_count_alike_in_any_order():
    labels = torch.tensor([0, 0, 1, 1, 0, 1])
    for order in (torch.arange(6), torch.arange(6).flip(0)):
        predictions = make_predictions([[1.0, 0.0]] * 6, [0.5] * 6, labels[order])
        assert prediction_metrics(predictions)["aurc"] == pytest.approx(0.5)


def test_no_coverage_where_even_the_most_certain_row_is_wrong():
    predictions = make_predictions([[1.0, 0.0]] * 2, [0.1, 0.9], [1, 0])
    assert prediction_metrics(predictions)["coverage_at_5_risk"] == 0.0


def test_vacuity_tells_another_distribution_as_scikit_learn_says():
    inside, outside = random_predictions(50, 3, 3, 1), random_predictions(70, 3, 3, 2)
    truth = np.repeat([0, 1], [50, 70])
    score = torch.cat([inside.uncertainty, outside.uncertainty]).numpy()
    wanted = oracle.roc_auc_score(truth, score)
    assert out_of_distribution_auroc(inside, outside) == pytest.approx(wanted, abs=1e-6)


def test_pseudo_labels_of_unknown_truth_count_for_the_coverage_alone():
    predictions = make_predictions([[1.0, 0.0]] * 4, [0.1] * 4, [0, 1, -1, 0])
    quality = pseudo_label_quality(predictions, torch.tensor([True, True, True, False]))
    assert quality == {"coverage": 0.75, "precision": 0.5, "n": 4}
    nothing = pseudo_label_quality(predictions, torch.zeros(4, dtype=torch.bool))
    assert nothing["coverage"] == 0 and math.isnan(nothing["precision"])


def test_binned_calibration_errors_get_no_interval():
    names = sampled_metrics(random_predictions(50, 3, 3), torch.ones(4, 50).double())
    assert names["accuracy"].shape == (4,) and names["sensitivity"].shape == (4, 3)
    assert not any("ece" in name for name in names)
