"""The nearest-neighbour check of pre-training: its votes, and its lack of side effects."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import normalize

from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.models.pretraining import PretrainModel
from mics_fast.models.vit import pool_tokens
from mics_fast.training.neighbours import (
    MOST_ROWS,
    bounded,
    extract_features,
    vote,
)
from mics_fast.training.neighbours import neighbour_accuracy as accuracy_of_features


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return PretrainModel(tiny, ("wli", "nbi"), pool="mean", projection=8, temperature=0.07)


def neighbour_accuracy(model, labelled, val, autocast=None):
    keys, queries = (extract_features(model, own, autocast) for own in (labelled, val))
    return accuracy_of_features(keys, queries, model.modalities)


def units(*angles):
    """Unit vectors in the plane, by their angles in degrees."""
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])


def test_the_nearer_of_two_classes_wins_the_vote():
    keys, label = units(0, 90), torch.tensor([3, 1])
    assert vote(units(10, 44, 46, 100), keys, label).tolist() == [3, 3, 1, 1]


def test_one_near_neighbour_outweighs_two_far_ones():
    """exp(cosine / 0.07): at 60 degrees a vote weighs a thousandth of one at 0 degrees."""
    assert vote(units(0), units(0, 60, -60), torch.tensor([1, 0, 0])).tolist() == [1]


def test_only_the_twenty_nearest_vote():
    near = units(*[1.0] * 20)
    far = units(*[1.01] * 1000)
    label = torch.tensor([1] * 20 + [0] * 1000)
    assert vote(units(0), torch.cat([near, far]), label).tolist() == [1]


def test_the_vote_is_that_of_the_formula_written_out():
    generator = torch.Generator().manual_seed(0)
    keys, queries = (normalize(torch.randn(n, 3, generator=generator), dim=1) for n in (50, 40))
    label = torch.randint(0, 4, (50,), generator=generator)
    for query, found in zip(queries, vote(queries, keys, label).tolist(), strict=True):
        by_distance = sorted(range(50), key=lambda i: -float(query @ keys[i]))
        votes = defaultdict(float)
        for i in by_distance[:20]:
            votes[int(label[i])] += math.exp(float(query @ keys[i]) / 0.07)
        assert found == max(votes, key=votes.get)


def test_rows_find_themselves(model, make_batch):
    batch = make_batch(9)
    scores = neighbour_accuracy(model, [batch], [batch])
    assert scores == {"knn_accuracy": 1.0, "knn_accuracy_wli": 1.0, "knn_accuracy_nbi": 1.0}


def test_features_are_the_student_s_whatever_the_teacher_is(model, make_batch):
    batch = make_batch(4)
    with torch.no_grad():
        for parameter in model.teacher_encoder.parameters():
            parameter.fill_(torch.nan)
    found = extract_features(model, [batch, make_batch(3, seed=1)], None)
    assert found.values.shape == (7, 2, 16) and found.label.tolist() == [0, 1, 2, 0, 0, 1, 2]
    for m, name in enumerate(("wli", "nbi")):
        wanted = normalize(pool_tokens(model.encoder(batch.views[name]), "mean"), dim=-1)
        torch.testing.assert_close(found.values[:4, m], wanted)


def test_an_absent_modality_neither_votes_nor_counts(model, make_batch):
    keys, queries = make_batch(6), make_batch(6, seed=1)
    wanted = neighbour_accuracy(model, [keys], [queries])["knn_accuracy_wli"]
    for batch in (keys, queries):
        batch.present[:, 1] = False
        batch.views["nbi"].fill_(1e3)
    scores = neighbour_accuracy(model, [keys], [queries])
    assert scores == {"knn_accuracy": wanted, "knn_accuracy_wli": wanted}


def test_one_modality_has_one_score(tiny, make_batch):
    torch.manual_seed(0)
    model = PretrainModel(tiny, ("wli",), pool="cls", projection=8, temperature=0.07)
    batch = make_batch(6)
    del batch.views["nbi"]
    batch.present = batch.present[:, :1]
    assert neighbour_accuracy(model, [batch], [batch]) == {"knn_accuracy": 1.0}


def test_a_check_changes_neither_the_model_nor_the_random_numbers(model, make_batch):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    neighbour_accuracy(model, [make_batch(6)], [make_batch(6)], autocast=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_check_does_not_compile_blocks_again(model, make_batch):
    compiled = CompileCounter()
    for block in model.encoder.blocks:
        block.compile(backend=compiled)
    images = make_batch(6).views["wli"]
    model.encoder(images).sum().backward()
    before = compiled.frame_count
    assert before > 0
    neighbour_accuracy(model, [make_batch(6), make_batch(1)], [make_batch(6)])
    model.encoder(images).sum().backward()
    assert compiled.frame_count == before


def test_many_rows_are_bounded_by_the_same_draw_in_their_order():
    rows = [SimpleNamespace(index=i, label=i // 3000) for i in range(9000)]
    chosen = bounded(rows)
    assert len(chosen) == MOST_ROWS and chosen == bounded(rows)
    assert [row.index for row in chosen] == sorted({row.index for row in chosen})
    shares = Counter(row.label for row in chosen)
    assert all(abs(count - MOST_ROWS / 3) < 100 for count in shares.values())  # 4.7 sigma
    assert bounded(rows[:7]) == rows[:7]


def records(run, stage):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def test_every_checkpoint_of_pre_training_is_scored_but_none_is_chosen_by_it(
    phantom_manifest, train_few_steps, tmp_path, capsys
):
    run = tmp_path / "run"
    train_few_steps(phantom_manifest, run, "--checkpoint_every", "1", "--stage", "pretrain")
    lines = records(run, "pretrain")
    names = ["knn_accuracy", "knn_accuracy_nbi", "knn_accuracy_untrained", "knn_accuracy_wli"]
    names.append("knn_chance")
    assert all([x for x in sorted(line) if x.startswith("knn")] == names for line in lines)
    assert len({line["knn_accuracy_untrained"] for line in lines}) == 1
    assert {line["knn_chance"] for line in lines} == {2 / 12}  # 12 val rows of six classes
    assert all(0 <= line[name] <= 1 for line in lines for name in names)
    shown = capsys.readouterr().out
    assert shown.count("k-NN accuracy ") == len(lines) == 3
    assert shown.count("pretrain: before training, nearest neighbours are right in ") == 1
    assert shown.count("% of val rows (largest class: 16.7%)") == 1
    checkpoints = Checkpoints(run / "checkpoints" / "pretrain")
    assert checkpoints.best() == checkpoints.latest()
    assert not (checkpoints.folder / "best.json").exists()


def test_without_labelled_rows_nothing_is_scored(phantom_manifest, train_few_steps, tmp_path):
    lines = phantom_manifest.read_text().splitlines()
    column = lines[0].split(",").index("labelled")
    rows = [line.split(",") for line in lines[1:]]
    bare = [",".join([*row[:column], "0", *row[column + 1 :]]) for row in rows]
    manifest = phantom_manifest.with_name("bare.csv")
    manifest.write_text("\n".join([lines[0], *bare]) + "\n")
    train_few_steps(manifest, tmp_path / "run", "--stage", "pretrain")
    assert not any(
        name.startswith("knn") for x in records(tmp_path / "run", "pretrain") for name in x
    )
