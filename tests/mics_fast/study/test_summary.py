"""Means, intervals and paired differences over seeds agree with scipy."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from mics_fast.study.summary import Summary, markdown, mean_interval, tabulate


def result(seed, variant, accuracy, labels="5.0%"):
    metrics = {"accuracy": accuracy, "macro_f1": accuracy, "macro_auroc": None, "ece": 0.1,
               "aurc": 0.2, "risk_at_50_coverage": 0.125, "coverage_at_5_risk": 0.25}  # fmt: skip
    alone = {"accuracy": accuracy - 0.1 - 0.01 * seed, "ece": 0.3}
    return {
        "seed": seed, "labels": labels, "variant": variant, "labelled": 6, "n": 40,
        "n_other": 0, "seconds": 10.0 * (seed + 1),
        "curve": [(10, accuracy + 0.1), (20, accuracy - 0.01 * seed)],
        "views": {"fused": metrics, "wli": alone, "without nbi": alone},
        "missing": ["without nbi"],
    }  # fmt: skip


BEFORE, AFTER = [0.50, 0.61, 0.55], [0.58, 0.66, 0.70]


@pytest.fixture
def table():
    results = [result(s, "supervised", x) for s, x in enumerate(BEFORE)]
    results += [result(s, "full", x) for s, x in enumerate(AFTER)]
    return tabulate(results[::-1], ["5.0%"], ["supervised", "full"])


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
    assert first["minus_full"]["fused"]["accuracy"]["values"] == pytest.approx(
        [-0.08, -0.05, -0.15]
    )


def test_the_fused_opinion_is_compared_with_each_other_view_of_the_same_seed(table):
    gain = table["rows"][0]["fused_minus"]["wli"]["accuracy"]
    assert gain["values"] == pytest.approx([0.10, 0.11, 0.12])
    wanted = stats.ttest_1samp([0.10, 0.11, 0.12], 0).confidence_interval(0.95)
    assert gain["interval"] == pytest.approx(list(wanted))
    assert table["rows"][0]["fused_minus"].keys() == {"wli", "without nbi"}


def test_a_metric_that_is_not_defined_everywhere_has_no_mean(table):
    assert "macro_auroc" not in table["rows"][0]["views"]["fused"]
    assert "aurc" not in table["rows"][0]["fused_minus"]["wli"]
    assert "undefined" in markdown(table)


def test_one_seed_has_no_interval():
    table = tabulate([result(0, "full", 0.5)], ["5.0%"], ["full"])
    assert table["rows"][0]["views"]["fused"]["accuracy"]["interval"] is None
    text = markdown(table)
    assert "| 50.0 |" in text and "One seed: no interval" in text and " ± " not in text


def lines_of(table, caption):
    """Head and rows of the table under a caption, as lists of cells."""
    part = markdown(table).split(f"**{caption}")[1].split("\n\n")[1]
    return [line.strip("| ").split(" | ") for line in part.splitlines() if "---" not in line]


def half(interval):
    return (interval[1] - interval[0]) / 2


def test_the_markdown_shows_means_half_intervals_and_differences(table):
    head, first, second = lines_of(table, "The fused opinion")
    # Of two variants one difference says both.
    assert head[2:4] == ["accuracy, %", "- supervised"] and first[3] == ""
    error = half(stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.95))
    assert second[3] == f"+9.3 ± {100 * error:.1f}"
    assert second[:2] == ["5.0% (6)", "full"] and second[-1] == "20 s"
    assert second[2].startswith("64.7 ± ")


def test_ablations_are_compared_with_the_first_variant_and_with_the_full_method():
    names = ["supervised", "full", "without-shift"]
    results = [result(s, name, 0.5 + 0.1 * i) for i, name in enumerate(names) for s in (0, 1)]
    head, first, _, last = lines_of(tabulate(results, ["5.0%"], names), "The fused opinion")
    assert head[3:5] == ["- supervised", "- full"]
    assert [cell.split(" ± ")[0] for cell in last[3:5]] == ["+20.0", "+10.0"]
    assert first[3] == "" and first[4].startswith("-10.0")


def test_learning_curves_show_quarters_and_the_fall_from_the_best(table):
    head, first, _ = lines_of(table, "Learning curves")
    assert head[2:] == ["steps", "25 %", "50 %", "75 %", "100 %", "fall from the best"]
    assert first[2] == "20" and first[4] == "65.3" and first[6] == "54.3"
    assert first[7].startswith("11.0 ± "), "peaks 0.1 above, ends 0, 0.01 and 0.02 below"


def test_runs_without_val_rows_have_no_learning_curve():
    one = result(0, "full", 0.5)
    one["curve"] = []
    assert "Learning curves" not in markdown(tabulate([one], ["5.0%"], ["full"]))


def test_every_question_has_a_table_of_its_own(table):
    head, first, _ = lines_of(table, "Fused against each modality")
    assert head[2:] == ["fused", "wli alone", "fused - wli alone"]
    error = half(stats.ttest_1samp([0.10, 0.11, 0.12], 0).confidence_interval(0.95))
    assert first[-1] == f"+11.0 ± {100 * error:.1f}"
    assert "covered at 5 % risk" in lines_of(table, "Knowing when it is wrong")[0]
    assert lines_of(table, "Risk against coverage")[1][2] == "12.5 ± 0.0"
    assert "Out of distribution" not in markdown(table)


def test_the_area_out_of_distribution_has_a_table_where_it_was_asked_for():
    results = [result(seed, "full", 0.5) for seed in (0, 1)]
    for seed, one in enumerate(results):
        one["n_other"] = 7
        one["views"]["fused"]["out_of_distribution_auroc"] = 0.8 + 0.1 * seed
    table = tabulate(results, ["5.0%"], ["full"])
    head, line = lines_of(table, "Out of distribution")
    assert head[2:] == ["fused", "wli"] and line[2].startswith("0.850 ± ")
    assert "7 samples" in markdown(table)


def test_no_word_of_a_table_is_cut_on_a_terminal(table):
    lines = ["| labels | variant | accuracy, % |", "| --- | --- | --- |"]
    lines.append("| 2 per class (10) | supervised-long | 71.9 ± 6.6 |")
    for width, whole in ((40, True), (18, False)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(Summary("\n".join(lines)))
        shown = console.export_text()
        assert "…" not in shown and ("supervised-long" in shown) == whole
