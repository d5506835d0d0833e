"""Metrics agree with scikit-learn, also where a class does not occur."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from mics_fast.evaluate import View, view_metrics


def random_view(rows, classes, occurring, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(rows, classes, generator=generator).softmax(-1)
    label = torch.randint(0, occurring, (rows,), generator=generator)
    return View(probability, torch.rand(rows, generator=generator), label)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_scikit_learn(seed):
    view = random_view(200, 5, 5, seed)
    metrics = view_metrics(view, 5)
    label, predicted = view.label.numpy(), view.probability.argmax(-1).numpy()
    assert metrics["accuracy"] == pytest.approx(accuracy_score(label, predicted))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
    auroc = roc_auc_score(label, view.probability.numpy(), multi_class="ovr", average="macro")
    assert metrics["macro_auroc"] == pytest.approx(auroc, abs=1e-6)
    assert metrics["n"] == 200


def test_classes_that_do_not_occur_do_not_count():
    view = random_view(100, 5, 3)
    metrics = view_metrics(view, 5)
    label, predicted = view.label.numpy(), view.probability.argmax(-1).numpy()
    with pytest.warns(UserWarning):
        wanted = balanced_accuracy_score(label, predicted)
    assert metrics["balanced_accuracy"] == pytest.approx(wanted)
    aurocs = [roc_auc_score(label == k, view.probability[:, k].numpy()) for k in range(3)]
    assert metrics["macro_auroc"] == pytest.approx(sum(aurocs) / 3, abs=1e-6)
