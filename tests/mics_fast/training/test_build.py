"""Options determine the optimisers and the plan of a stage."""

from __future__ import annotations

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from mics_fast.engine.precision import pick_precision
from mics_fast.options import FinetuneConfig, ModelConfig, PretrainConfig, TrainConfig
from mics_fast.training.build import build_classifier, build_finetuning, build_pretraining

CPU = torch.device("cpu")


@pytest.fixture
def built(phantom_manifest):
    """built(stage, of_stage, **options) -> the stage and its plan over 24 train rows."""
    manifest = read_manifest(phantom_manifest, None)

    def build(stage, of_stage=None, **options):
        config = TrainConfig(
            model=ModelConfig(size="vit_micro", projection=16, fusion_depth=1),
            pretrain=PretrainConfig(epochs=4, batch_size=8, accumulate=2, adversarial_weight=0.1),
            finetune=FinetuneConfig(epochs=4, labelled_batch=4, unlabelled_batch=8, accumulate=4),
            **options,
        )
        for name, value in (of_stage or {}).items():
            setattr(getattr(config, stage), name, value)
        precision = pick_precision(config.precision, CPU)
        if stage == "pretrain":
            return build_pretraining(config, manifest, 24, precision, CPU)
        model = build_classifier(config, manifest)
        return build_finetuning(config, manifest, model, 24, precision, CPU)

    return build


@pytest.mark.parametrize(("stage", "parts"), [("pretrain", 2), ("finetune", 4)])
def test_the_options_of_a_run_reach_the_plan_of_a_stage(built, stage, parts):
    _, plan = built(stage, checkpoint_minutes=3.0, profile=5, peak_tflops=7.0)
    assert (plan.name, plan.steps, plan.accumulate) == (stage, 12, parts)
    assert (plan.checkpoint_minutes, plan.profile, plan.peak_tflops) == (3.0, 5, 7.0)
    assert plan.final_lr["model"] < 1 and sum(plan.flops.values()) > 0


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_steps_win_over_epochs(built, stage):
    _, plan = built(stage, {"steps": 7})
    assert (plan.steps, plan.steps_per_epoch) == (7, 3)


def test_the_ramps_of_fine_tuning_span_its_steps(built):
    stage, _ = built("finetune", {"steps": 200, "kl_anneal": 0.5, "kl_weight": 1.0})
    assert stage._scalars(torch.tensor(50)).kl_weight == 0.5


@pytest.mark.parametrize(("select", "choose_best"), [("best", True), ("last", False)])
def test_select_says_whether_val_rows_choose_the_checkpoint(built, select, choose_best):
    assert built("finetune", {"select": select})[1].choose_best is choose_best


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_float16_trains_with_a_scaler_and_nothing_else_does(built, stage):
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", None)):
        made, plan = built(stage, precision=name)
        assert made.autocast is dtype
        assert (plan.scaler is not None) == (name == "fp16")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_optimiser_steps_in_one_kernel(built, stage):
    for optimiser in built(stage)[1].optimisers.values():
        assert optimiser.defaults["fused"]


def test_class_weights_stand_in_the_order_of_the_classes(built):
    stage, _ = built("finetune", {"class_weights": {"bump-rim": 5.0}})
    assert stage.class_weights.tolist() == [1.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    assert built("finetune")[0].class_weights is None


def test_a_weight_of_an_unknown_class_is_refused_by_name(built):
    with pytest.raises(InputError, match=r"finetune\.class_weights names polyp, wanted classes of"):
        built("finetune", {"class_weights": {"polyp": 5.0}})


def test_layer_decay_slows_each_block_below_the_next(built):
    stage, plan = built("finetune", {"lr": 1.0, "layer_decay": 0.5, "head_lr_factor": 4.0})
    rates = {
        id(own): group["lr"]
        for group in plan.optimisers["model"].param_groups
        for own in group["params"]
    }
    named = {name: rates[id(own)] for name, own in stage.model.named_parameters()}
    assert len(named) == len(rates)
    depth = len(stage.model.encoders["wli"].blocks)
    for modality in ("wli", "nbi"):
        of = f"encoders.{modality}."
        assert named[of + "norm.bias"] == 1.0
        for i in range(depth):
            for part in ("norm1.bias", "attn.qkv.weight", "mlp.fc2.weight"):
                assert named[f"{of}blocks.{i}.{part}"] == 0.5 ** (depth - i)
        for part in ("patch_embed.proj.weight", "pos_embed", "cls_token"):
            assert named[of + part] == 0.5 ** (depth + 1)
    assert {rate for name, rate in named.items() if not name.startswith("encoders.")} == {4.0}


def test_without_layer_decay_encoders_are_two_groups(built):
    groups = built("finetune")[1].optimisers["model"].param_groups
    assert [group.get("name") for group in groups] == [None, None, "heads", "heads"]


def test_alignment_aims_at_the_class_frequencies_of_the_labelled_rows(built, phantom_manifest):
    stage, _ = built("finetune", {"align_distribution": True})
    counts = [0] * 6
    for row in read_manifest(phantom_manifest, None).select("train"):
        counts[row.label] += row.labelled
    assert stage.alignment.target.tolist() == pytest.approx([own / sum(counts) for own in counts])
    assert "alignment.target" not in stage.state_dict()
