"""Figures describe themselves in words, and draw every value where its axis says."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mics_fast.reporting import figures
from mics_fast.reporting.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series


def drawn(html):
    """The figure as a tree, and its text alternative."""
    figure = ElementTree.fromstring(html)
    return figure, figure.find("svg").get("aria-label")


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 12, [-2, 0, 2, 4, 6, 8, 10, 12]),
     (0, 0.03, [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03]), (90, 1000, [200, 400, 600, 800, 1000])],
)  # fmt: skip
def test_ticks_are_few_and_round(low, high, wanted):
    assert Axis("", low, high).ticks() == pytest.approx(wanted)


def test_an_axis_maps_its_range_to_the_frame():
    axis = Axis("", 10, 20)
    assert axis.x(10) == LEFT and axis.x(20) == WIDTH - RIGHT
    assert axis.y(10) == HEIGHT - BOTTOM and axis.y(20) == TOP
    assert axis.y(15) == (TOP + HEIGHT - BOTTOM) / 2


def test_a_line_chart_labels_its_axes_and_tells_its_lines_apart():
    lines = [Series("a < b", [1, 2], [0.5, 1.0]), Series("c", [1, 2], [0.25, 0.75])]
    html = figures.line_chart("Losses", "steps", "loss", lines)
    figure, description = drawn(html)
    texts = [node.text for node in figure.iter("text")]
    assert "steps" in texts and "loss" in texts
    assert "a < b: 0.5 at 1, 1 at 2; c: 0.25 at 1, 0.75 at 2" in description
    strokes = [node for node in figure.find("svg").iter("path") if node.get("class") == "line"]
    assert len({node.get("stroke") for node in strokes}) == 2
    assert len({node.get("stroke-dasharray") for node in strokes}) == 2
    assert [item.find("svg").tail for item in figure.iter("li")] == ["a < b", "c"]


def test_a_line_of_one_value_can_be_seen():
    html = figures.line_chart("Score", "steps", "share", [Series("val", [3], [0.5])])
    (path,) = re.findall(r'class="line dot"[^>]* d="([^"]*)"', html)
    assert path.endswith("h0")


def test_a_histogram_counts_each_group():
    html = figures.histogram("u", "uncertainty", {"right": [0.1, 0.1, 0.9], "wrong": [0.5]})
    _, description = drawn(html)
    assert "right: n = 3, median 0.10; wrong: n = 1, median 0.50" in description
    assert "right (n = 3)" in html and "wrong (n = 1)" in html


def test_an_empty_group_is_drawn_as_nothing():
    html = figures.histogram("u", "uncertainty", {"right": [0.1], "wrong": []})
    assert "wrong (n = 0)" in html and "nan" not in html


def test_a_reliability_diagram_states_accuracy_and_count_of_each_bin():
    confidence = np.array([0.1, 0.15, 0.95, 1.0])
    _, description = drawn(
        figures.reliability_diagram("r", confidence, np.array([0.0, 1.0, 1.0, 1.0]), bins=5)
    )
    assert "confidence 0.00 to 0.20: accuracy 0.50, n = 2" in description
    assert "confidence 0.80 to 1.00: accuracy 1.00, n = 2" in description


def test_a_scatter_has_a_marker_for_each_class():
    points = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    html = figures.scatter("f", "x", "y", points, np.array([0, 1, 1]), ["a", "b"])
    figure, description = drawn(html)
    assert "b: centre (3, 4)" in description and "b (n = 2)" in html
    points = [node for node in figure.find("svg").iter("path") if node.get("transform")]
    assert len({node.get("d") for node in points}) == 2 and len(points) == 3


def test_names_are_escaped_in_tables():
    html = figures.table(["<b>"], [["a & b", "<i>"]], "x < y")
    assert "<i>" not in html and "&lt;i&gt;" in html and "a &amp; b" in html
    ElementTree.fromstring(html)


def test_a_confusion_table_shades_by_the_share_of_the_row():
    html = figures.confusion_table([[3, 1], [0, 0]], ["a", "b"], "counts")
    assert re.findall(r"rgba\(0,114,178,(\d\.\d\d)\)", html) == ["0.75", "0.25", "0.00", "0.00"]


def test_belief_bars_are_as_long_as_the_belief_and_name_the_truth():
    html = figures.belief_table({"fused": {"a": 0.25, "uncommitted": 0.75}}, "a", "belief")
    assert "a (truth)" in html and "width:25%" in html and "<span>0.75</span>" in html
