"""Warnings: the record that triggers each, and silence for healthy ones."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mics_fast.engine.update import Update
from mics_fast.options import FinetuneConfig, PretrainConfig
from mics_fast.stages.health import closing_warnings, finetune_warnings, pretrain_warnings
from mics_fast.stages.pretrain import Keys, teacher_similarity
from tests.mics_fast.engine.steps import plan_of

HEALTHY_PRETRAINING = {
    "epoch": 3.0,
    "teacher_similarity": 0.4,
    "positive_similarity": 0.97,
    "queue_age": 20.0,
}
HEALTHY_FINETUNING = {
    "student_uncertainty": 0.3,
    "pseudo_accepted": 0.5,
    "weight_pseudo": 1.0,
}


def test_healthy_and_empty_records_give_no_warning():
    for record in ({}, HEALTHY_PRETRAINING):
        assert pretrain_warnings(PretrainConfig(), record) == []
    for record in ({}, HEALTHY_FINETUNING):
        assert finetune_warnings(FinetuneConfig(), record) == []


@pytest.mark.parametrize(
    ("change", "option"),
    [({"teacher_similarity": 0.99}, "pretrain.alpha"), ({"queue_age": 201.0}, "queue_size")],
)
def test_each_sign_of_a_failing_pretraining_names_an_option(change, option):
    (sentence,) = pretrain_warnings(PretrainConfig(), {**HEALTHY_PRETRAINING, **change})
    assert option in sentence


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"student_uncertainty": 0.001}, "raise finetune.kl_weight"),
        ({"student_uncertainty": 0.999}, "lower finetune.kl_weight"),
        ({"pseudo_accepted": 0.0}, "raise finetune.max_uncertainty"),
        ({"pseudo_accepted": 1.0}, "raise finetune.min_probability"),
    ],
)
def test_each_sign_of_a_failing_finetuning_names_an_option(change, option):
    (sentence,) = finetune_warnings(FinetuneConfig(), {**HEALTHY_FINETUNING, **change})
    assert option in sentence


def test_what_only_an_untrained_model_shows_is_no_warning():
    early = {"epoch": 0.5, "teacher_similarity": 0.99, "positive_similarity": 0.99}
    assert pretrain_warnings(PretrainConfig(), early) == []
    slow = {"epoch": 2.0, "teacher_similarity": 0.97, "positive_similarity": 0.5}
    assert pretrain_warnings(PretrainConfig(), slow) == []
    ramping = {"pseudo_accepted": 0.0, "weight_pseudo": 0.5}
    assert finetune_warnings(FinetuneConfig(), ramping) == []
    off = {"pseudo_accepted": 0.0, "weight_pseudo": 0.0}
    assert finetune_warnings(FinetuneConfig(unlabelled_weight=0.0), off) == []


def test_a_collapse_shows_in_the_metrics(make_pretraining, make_batch):
    stage = make_pretraining(batch_size=4)
    with torch.no_grad():
        for layer in (stage.model.projection_head, stage.model.teacher_projection):
            layer.weight.zero_()
            layer.bias.fill_(1.0)
    *_, losses = _losses(stage, make_batch(4))
    assert losses.on_log["teacher_similarity"]() > 0.999
    numbers = {name: float(value) for name, value in losses.metrics.items()}
    numbers |= {name: float(compute()) for name, compute in losses.on_log.items()}
    assert stage.warnings({"epoch": 1.0, **numbers})


def test_similarity_leaves_out_a_row_itself_its_group_and_what_is_absent(
    make_pretraining, make_batch
):
    stage = make_pretraining()
    batch = make_batch(4)
    batch.group_id[:] = torch.tensor([0, 0, 1, 2])
    batch.present[3, :] = False
    output, _ = stage._forward(batch, torch.tensor(0))
    *_, losses = _losses(stage, batch)
    pairs = [
        output.teachers[name][a] @ output.teachers[name][b]
        for name in ("wli", "nbi")
        for a, b in ((0, 2), (1, 2))
    ]
    similarity = losses.on_log["teacher_similarity"]()
    torch.testing.assert_close(similarity, torch.stack(pairs).mean())


class LargestResult(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_rank_compares_its_own_rows_with_all_keys_and_no_more(monkeypatch):
    torch.manual_seed(0)
    teachers = torch.nn.functional.normalize(torch.randn(2, 256, 4), dim=-1)
    keys = Keys(list(teachers), torch.arange(256), torch.ones(256, 2).bool())
    cosines = teachers @ teachers.mT
    wanted = (cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()) / (2 * 256 * 255)
    monkeypatch.setattr("mics_fast.stages.pretrain.world_size", lambda: 8)
    shares = []
    for rank in range(8):
        monkeypatch.setattr("mics_fast.stages.pretrain.rank", lambda own=rank: own)
        with LargestResult() as largest:
            shares.append(teacher_similarity(keys))
        assert largest.elements == 2 * (256 // 8) * 256  # modalities x own rows x keys
    torch.testing.assert_close(torch.stack(shares).mean(), wanted)


def test_a_step_that_is_not_logged_compares_no_features(make_pretraining, make_batch, monkeypatch):
    compared = []
    monkeypatch.setattr("mics_fast.stages.pretrain.teacher_similarity", compared.append)
    stage, batch = make_pretraining(batch_size=4), make_batch(4)
    parts = {"model": stage.model, "discriminator": stage.discriminator}
    optimisers = {name: torch.optim.SGD(part.parameters()) for name, part in parts.items()}
    values = Update(stage, plan_of(optimisers))((batch,), 0)
    assert compared == []
    values["teacher_similarity"]()
    (keys,) = compared
    assert keys.ids.tolist() == batch.group_id.tolist()


def test_the_queue_s_age_is_in_steps(make_pretraining, make_batch):
    stage = make_pretraining(batch_size=4)
    ages = []
    for step in range(3):
        *_, losses = _losses(stage, make_batch(4, first_id=4 * step))
        ages.append(losses.metrics["queue_age"].item())
        stage.after_step()
    assert ages == [0.0, 1.0, 2.0]


def _losses(stage, batch):
    seen = []
    for losses in stage.losses((batch,), torch.tensor(0)):
        losses.total().backward()
        seen.append(losses)
    return seen


def reconstruction(values):
    return closing_warnings("pretrain", [{"loss_reconstruction": value} for value in values])


def test_pre_training_that_ends_near_the_patch_mean_is_reported():
    (sentence,) = reconstruction([1.05 - 0.002 * k for k in range(40)])
    assert "ended at 0.9" in sentence and "next to nothing" in sentence


def test_pre_training_that_ends_while_still_falling_is_reported():
    (sentence,) = reconstruction([0.9 - 0.01 * k for k in range(40)])
    assert "still falling" in sentence and "raise pretrain.steps" in sentence
    assert reconstruction([max(0.6, 0.9 - 0.02 * k) for k in range(40)]) == []


def val_accuracy(values):
    return closing_warnings("finetune", [{"val_accuracy": value} for value in values])


def test_fine_tuning_that_ends_while_still_rising_is_reported():
    (sentence,) = val_accuracy([0.05 * k for k in range(16)])
    assert "still rising" in sentence and "raise finetune.steps" in sentence


def test_fine_tuning_that_ends_below_its_best_is_reported():
    (sentence,) = val_accuracy([0.5] * 8 + [0.9] + [0.84] * 7)
    assert "fell from 90.0% to 84.0%" in sentence
    assert val_accuracy([0.5] * 8 + [0.9] + [0.88] * 7) == []


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_without_these_figures_is_not_judged(stage):
    assert closing_warnings(stage, [{"loss": 1.0}] * 20) == []


def neighbours(accuracy, untrained, chance):
    record = {"knn_accuracy": accuracy, "knn_accuracy_untrained": untrained, "knn_chance": chance}
    return closing_warnings("pretrain", [record])


def test_neighbours_no_better_than_those_of_the_untrained_network_are_reported():
    (sentence,) = neighbours(accuracy=0.2, untrained=0.22, chance=0.17)
    assert "right in 20.0% of val rows" in sentence and "untrained network in 22.0%" in sentence
    (sentence,) = neighbours(accuracy=0.15, untrained=0.1, chance=0.17)
    assert "the most frequent class in 17.0%" in sentence


def test_neighbours_that_pre_training_improved_are_not():
    assert neighbours(accuracy=0.3, untrained=0.2, chance=0.17) == []
    assert closing_warnings("pretrain", [{"knn_accuracy": 0.1}]) == []
