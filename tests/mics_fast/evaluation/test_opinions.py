"""Collected opinions equal the classifier's output: fused, alone, and with a modality hidden."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from mics_fast.evaluation.answers import answer, flat
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import FUSED, Source, collect_opinions
from mics_fast.evaluation.referral import Rule
from mics_fast.models.classifier import Classifier
from mics_kernels import conflict, fuse_evidence, opinion


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    model = Classifier(tiny, ("wli", "nbi"), 3, pool="cls", fusion_depth=1)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=1.0)
    return model.eval()


@pytest.fixture
def batch(make_batch):
    batch = make_batch(6)
    batch.present[0, 0] = batch.present[1, 1] = False
    return batch


def test_fused_is_dempsters_rule_over_the_opinions_that_are_there(model, batch):
    with torch.no_grad():
        output = model(batch.views, batch.present)
    evidence = fuse_evidence(softplus(output.logits), present=output.present)
    fused = collect_opinions(model, [batch]).fused()
    torch.testing.assert_close(fused.probability, opinion(evidence).probability)
    torch.testing.assert_close(fused.uncertainty, opinion(evidence).uncertainty)


def test_a_modality_is_asked_only_about_the_rows_that_have_it(model, batch):
    each = collect_opinions(model, [batch]).predictions()
    assert [len(each[own]) for own in (FUSED, Source("wli"), Source("nbi"))] == [6, 5, 5]
    assert each[Source("wli")].label.tolist() == batch.label[1:].tolist()


def test_a_hidden_modality_is_a_missing_one(model, batch):
    """Hiding a modality gives the opinions of rows that never had it."""
    every = collect_opinions(model, [batch], hide=True).predictions()
    without = {source.name: own for source, own in every.items() if source.missing}
    assert [len(without[name]) for name in ("wli", "nbi")] == [5, 5]
    for column, name in enumerate(model.modalities):
        rows = batch.present[:, 1 - column]
        batch_without = batch.present.clone()
        batch_without[:, column] = False
        batch.present, kept = batch_without, batch.present
        wanted = collect_opinions(model, [batch]).fused().take(rows)
        batch.present = kept
        torch.testing.assert_close(without[name].probability, wanted.probability)


def test_batches_join_in_their_order(model, make_batch):
    together = collect_opinions(model, [make_batch(3), make_batch(2, first_id=3)], hide=True)
    assert together.sample_id.tolist() == [0, 1, 2, 3, 4]
    assert together.without["wli"].shape == (5, 3) and together.evidence.shape == (5, 3, 3)


def test_collecting_leaves_the_model_in_the_mode_it_was_in(model, batch):
    collect_opinions(model.train(), [batch])
    assert model.training


def test_an_answer_states_probability_belief_uncertainty_and_conflict(model, batch):
    opinions = collect_opinions(model, [batch])
    stated = answer(opinions, [f"row {n}" for n in range(6)], ["a", "b", "c"])
    for record in stated:
        assert sum(record["belief"].values()) + record["uncertainty"] == pytest.approx(1, abs=1e-6)
        assert record["class"] == max(record["belief"], key=record["belief"].get)
        # A Dirichlet opinion shares what is uncommitted equally among the classes.
        for name, belief in record["belief"].items():
            assert record["probability"][name] == pytest.approx(belief + record["uncertainty"] / 3)
        assert record["refer"] is None
    assert set(stated[2]["views"]) == {"wli", "nbi", "fusion"}
    assert set(stated[0]["views"]) == {"nbi"} and stated[0]["conflict"] == pytest.approx(
        0, abs=1e-6
    )
    both = conflict(opinions.evidence[2:, :2])
    assert [record["conflict"] for record in stated[2:]] == pytest.approx(both.tolist())
    line = flat(stated[2])
    assert line["wli.belief.a"] == stated[2]["views"]["wli"]["belief"]["a"]


def test_an_opinion_is_referred_above_the_threshold(model, batch):
    opinions = collect_opinions(model, [batch])
    names = [f"row {n}" for n in range(6)]
    middle = opinions.fused().uncertainty.median().item()
    stated = answer(
        opinions, names, ["a", "b", "c"], OperatingPoint(rule=Rule("uncertainty", middle))
    )
    assert [own["refer"] for own in stated] == [own["uncertainty"] > middle for own in stated]
    assert sum(bool(own["refer"]) for own in stated) == 3
    assert all(("reason" in own) == own["refer"] for own in stated)
