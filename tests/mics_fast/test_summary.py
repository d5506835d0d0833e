"""Means, intervals and paired differences over seeds agree with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mics_fast.summary import markdown, mean_interval, tabulate


def result(seed, variant, accuracy, fraction=0.05):
    metrics = {"accuracy": accuracy, "macro_f1": accuracy, "macro_auroc": None, "ece": 0.1,
               "aurc": 0.2}  # fmt: skip
    return {
        "seed": seed, "label_fraction": fraction, "variant": variant, "labelled": 6, "n": 40,
        "seconds": 10.0 * (seed + 1), "views": {"fused": metrics, "wli": {"accuracy": 0.5}},
    }  # fmt: skip


BEFORE, AFTER = [0.50, 0.61, 0.55], [0.58, 0.66, 0.70]


@pytest.fixture
def table():
    results = [result(s, "supervised", x) for s, x in enumerate(BEFORE)]
    results += [result(s, "full", x) for s, x in enumerate(AFTER)]
    return tabulate(results[::-1], [0.05], ["supervised", "full"])


def test_the_interval_of_a_mean_is_student_s():
    wanted = stats.ttest_1samp(BEFORE, 0).confidence_interval(0.95)
    assert mean_interval(BEFORE)["interval"] == pytest.approx(list(wanted))


def test_student_s_interval_over_five_seeds_holds_the_truth_19_times_in_20():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = mean_interval(generator.normal(0.8, 0.05, 5).tolist())["interval"]
        hits += low <= 0.8 <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_by_seed(table):
    first, second = table["rows"]
    assert "minus_first" not in first and second["seeds"] == [0, 1, 2]
    difference = second["minus_first"]["fused"]["accuracy"]
    wanted = stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.95)
    assert difference["interval"] == pytest.approx(list(wanted))
    assert difference["values"] == pytest.approx([0.08, 0.05, 0.15])
    assert second["minus_previous"] == second["minus_first"]


def test_a_metric_that_is_not_defined_everywhere_has_no_mean(table):
    assert "macro_auroc" not in table["rows"][0]["views"]["fused"]
    assert "not defined" in markdown(table)


def test_one_seed_has_no_interval():
    table = tabulate([result(0, "full", 0.5)], [0.05], ["full"])
    assert table["rows"][0]["views"]["fused"]["accuracy"]["interval"] is None
    text = markdown(table)
    assert "| 50.0 |" in text and "one seed has none" in text


def test_the_markdown_shows_means_intervals_and_differences(table):
    (line,) = [line for line in markdown(table).splitlines() if "| full |" in line]
    low, high = stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.95)
    assert f"+9.3 ({100 * low:+.1f} to {100 * high:+.1f})" in line
    assert "64.7 (" in line and "5.0% (6)" in line and "20 s" in line
