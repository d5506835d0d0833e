"""Splits and label draws: whole groups, exact counts, a function of the seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mics_fast.preparation.splits import fold_rows, label_rows, split_fold, split_rows

SHARES = (0.7, 0.1, 0.2)
seeds = st.integers(0, 2**32)
class_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@st.composite
def grouped_rows(draw):
    """Labels and groups; every group is of one class, some rows are groups of their own."""
    labels, groups = [], []
    sizes = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), min_size=1))
    for number, (label, size) in enumerate(sizes):
        labels += [label] * size
        groups += [""] if size == 1 else [f"group {number}"] * size
    return labels, groups


def alone(sizes):
    """Rows of classes of these sizes, each row a group of its own."""
    labels = [f"class {k}" for k, size in enumerate(sizes) for _ in range(size)]
    return labels, [""] * len(labels)


@settings(deadline=None)
@given(grouped_rows(), seeds)
def test_no_group_is_on_two_sides(rows, seed):
    labels, groups = rows
    splits = split_rows(labels, groups, SHARES, seed)
    assert len(splits) == len(labels) and set(splits) <= {"train", "val", "test"}
    for group in set(groups) - {""}:
        assert len({split for split, own in zip(splits, groups, strict=True) if own == group}) == 1


@settings(deadline=None)
@given(class_sizes, seeds)
def test_the_shares_hold_in_every_class(sizes, seed):
    labels, groups = alone(sizes)
    counts = Counter(zip(labels, split_rows(labels, groups, SHARES, seed), strict=True))
    for k, size in enumerate(sizes):
        for split, share in zip(("train", "val", "test"), SHARES, strict=True):
            # One row is the rounding; the row that an empty split is owed is another.
            assert abs(counts[f"class {k}", split] - share * size) < 2


@settings(deadline=None)
@given(grouped_rows(), seeds)
def test_a_class_of_three_groups_is_in_every_split(rows, seed):
    labels, groups = rows
    splits = split_rows(labels, groups, SHARES, seed)
    for label in set(labels):
        members = {
            group or f"row {row}"
            for row, (own, group) in enumerate(zip(labels, groups, strict=True))
            if own == label
        }
        present = {split for own, split in zip(labels, splits, strict=True) if own == label}
        assert len(present) == min(3, len(members))


def test_a_class_of_one_row_trains_and_one_of_two_is_tested_as_well():
    labels, groups = alone([1, 2])
    splits = split_rows(labels, groups, SHARES, seed=0)
    assert splits[0] == "train" and sorted(splits[1:]) == ["test", "train"]


def test_a_share_of_zero_gets_no_row():
    labels, groups = alone([20, 3])
    assert set(split_rows(labels, groups, (0.8, 0.0, 0.2), seed=3)) == {"train", "test"}


@settings(deadline=None)
@given(class_sizes, seeds, st.floats(0.001, 1))
def test_the_label_fraction_is_exact_in_every_class(sizes, seed, fraction):
    labels, groups = alone(sizes)
    chosen = Counter(
        label
        for label, keeps in zip(labels, label_rows(labels, groups, fraction, seed), strict=True)
        if keeps
    )
    for k, size in enumerate(sizes):
        assert chosen[f"class {k}"] == max(1, round(fraction * size))


@settings(deadline=None)
@given(grouped_rows(), seeds, st.floats(0.01, 1))
def test_groups_are_labelled_whole_and_at_most_one_too_many(rows, seed, fraction):
    labels, groups = rows
    keeps = label_rows(labels, groups, fraction, seed)
    for group in set(groups) - {""}:
        assert len({keep for keep, own in zip(keeps, groups, strict=True) if own == group}) == 1
    for label, size in Counter(labels).items():
        chosen = sum(keep for keep, own in zip(keeps, labels, strict=True) if own == label)
        assert max(1, round(fraction * size)) <= chosen < max(1, round(fraction * size)) + 6


@settings(deadline=None)
@given(class_sizes, seeds)
def test_more_labels_keep_the_fewer(sizes, seed):
    labels, groups = alone(sizes)
    few, many = (label_rows(labels, groups, fraction, seed) for fraction in (0.1, 0.3))
    assert all(also for also, keeps in zip(many, few, strict=True) if keeps)


def test_a_row_without_a_label_is_never_labelled():
    assert label_rows(["", "a", ""], ["", "", ""], 1.0, seed=0) == [False, True, False]
    assert label_rows(["a", ""], ["g", "g"], 1.0, seed=0) == [True, False]


@settings(deadline=None)
@given(grouped_rows(), seeds)
def test_the_same_seed_makes_the_same_choice(rows, seed):
    labels, groups = rows
    assert split_rows(labels, groups, SHARES, seed) == split_rows(labels, groups, SHARES, seed)
    assert label_rows(labels, groups, 0.3, seed) == label_rows(labels, groups, 0.3, seed)


def test_another_seed_makes_another_choice():
    labels, groups = alone([50])
    splits = {tuple(split_rows(labels, groups, SHARES, seed)) for seed in range(10)}
    labelled = {tuple(label_rows(labels, groups, 0.2, seed)) for seed in range(10)}
    assert len(splits) == len(labelled) == 10


def test_the_choice_is_the_same_on_any_machine():
    labels, groups = alone([12])
    letters = "".join(split[1] for split in split_rows(labels, groups, SHARES, seed=0))
    keeps = "".join("01"[keep] for keep in label_rows(labels, groups, 0.3, seed=0))
    assert (letters, keeps) == ("rraerrrrreer", "000010010011")


def test_rows_are_not_chosen_by_their_position():
    labels, groups = alone([30])
    first = sum(split_rows(labels, groups, SHARES, seed)[0] == "train" for seed in range(200))
    assert 0.7 * 200 - first == pytest.approx(0, abs=4 * (200 * 0.7 * 0.3) ** 0.5)


@settings(deadline=None)
@given(grouped_rows(), seeds, st.integers(2, 6))
def test_folds_hold_whole_groups_and_equal_shares_of_a_class(rows, seed, folds):
    labels, groups = rows
    fold = fold_rows(labels, groups, folds, seed)
    assert set(fold) <= set(range(folds)) and fold == fold_rows(labels, groups, folds, seed)
    for group in set(groups) - {""}:
        assert len({own for own, its in zip(fold, groups, strict=True) if its == group}) == 1
    for label in set(labels):
        counts = Counter(own for own, its in zip(fold, labels, strict=True) if its == label)
        assert max(counts.values()) - min(counts[k] for k in range(folds)) <= 6  # a largest group


def test_the_odd_rows_of_the_classes_go_to_different_folds():
    labels, groups = alone([1] * 9)
    assert sorted(Counter(fold_rows(labels, groups, 3, seed=0)).values()) == [3, 3, 3]


@settings(deadline=None)
@given(grouped_rows(), seeds)
def test_a_round_of_cross_validation_tests_on_its_fold_alone(rows, seed):
    labels, groups = rows
    fold = fold_rows(labels, groups, 3, seed)
    for tested in range(3):
        split = split_fold(labels, groups, fold, tested, 0.2, seed)
        assert [own == "test" for own in split] == [its == tested for its in fold]
        for group in set(groups) - {""}:
            assert len({own for own, its in zip(split, groups, strict=True) if its == group}) == 1
