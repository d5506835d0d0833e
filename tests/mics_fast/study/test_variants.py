"""The variants of an experiment: which parts of the method each one has."""

from __future__ import annotations

from typing import get_args

import pytest

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from mics_fast.models.sizes import SIZES
from mics_fast.options import TrainConfig, Variant
from mics_fast.study.variants import RECIPES, finetuning_of, pretraining_of
from mics_fast.training.flops import finetune_flops, pretrain_flops

LABELS_ONLY = ["supervised", "supervised-long", "reconstruction", "pretraining", "probe"]
WEIGHTS = ["probe", "probe+full", "lora"]
SCRATCH = ["supervised", "supervised-long", "pseudo-labels", "without-pretraining", *WEIGHTS]


@pytest.fixture
def train():
    """The full method with every term on."""
    config = TrainConfig()
    config.model.size, config.model.init = "vit_nano", "weights.safetensors"
    config.pretrain.steps, config.finetune.steps = 40, 60
    config.pretrain.batch_size, config.pretrain.queue_size = 8, 16
    config.pretrain.consistency_weight = config.pretrain.adversarial_weight = 1.0
    config.finetune.labelled_batch, config.finetune.unlabelled_batch = 6, 8
    config.finetune.unlabelled_weight = config.finetune.shift_weight = 1.0
    config.finetune.modality_consistency_weight = 0.1
    return config


@pytest.fixture
def manifest(phantom_manifest):
    return read_manifest(phantom_manifest)


def test_every_variant_has_a_recipe():
    assert set(RECIPES) == set(get_args(Variant))


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_variant_has_the_terms_that_its_name_says(train, manifest, variant):
    config = finetuning_of(train, variant, manifest)
    stage, alone = config.finetune, variant in LABELS_ONLY
    assert (stage.unlabelled_weight == 0) == alone
    assert (stage.shift_weight == 0) == (alone or variant in ("pseudo-labels", "without-shift"))
    assert (stage.modality_consistency_weight == 0) == (
        alone or variant in ("pseudo-labels", "without-modality-consistency")
    )
    rule = variant if variant in ("fixmatch", "freematch") else train.finetune.pseudo_labels
    assert stage.pseudo_labels == rule
    assert (config.stage, config.finetune.labelled_batch) == ("finetune", 6)


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_variant_has_the_pre_training_that_its_name_says(train, variant):
    config = pretraining_of(train, variant)
    assert (config is None) == (variant in SCRATCH)
    if config is None:
        return
    stage, alone = config.pretrain, variant == "reconstruction"
    assert (stage.consistency_weight == 0) == (alone or variant == "without-consistency")
    assert (stage.adversarial_weight == 0) == (alone or variant == "without-adversary")
    assert stage.reconstruction_weight > 0 and config.stage == "pretrain"


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_variant_trains_as_much_of_the_encoders_as_its_name_says(train, manifest, variant):
    wanted = {"probe": "frozen", "probe+full": "frozen", "lora": "lora"}.get(variant, "full")
    assert finetuning_of(train, variant, manifest).finetune.encoder == wanted


@pytest.mark.parametrize("variant", WEIGHTS)
def test_a_variant_that_starts_from_weights_is_refused_without_any(train, manifest, variant):
    train.model.init = ""
    with pytest.raises(InputError, match=r"wanted weights in model\.init"):
        finetuning_of(train, variant, manifest)


def test_long_training_costs_as_much_as_both_stages_of_the_full_method(train, manifest):
    config = finetuning_of(train, "supervised-long", manifest)
    size = SIZES["vit_nano"]
    full = 40 * sum(pretrain_flops(train, size, 2).values())
    full += 60 * sum(finetune_flops(train, size, 2, 6).values())
    step = sum(finetune_flops(config, size, 2, 6).values())
    assert config.finetune.steps * step == pytest.approx(full, rel=0.01)
    assert finetuning_of(train, "supervised", manifest).finetune.steps == 60


def test_recipes_leave_the_options_of_the_full_method_alone(train, manifest):
    before = repr(train)
    for variant in get_args(Variant):
        finetuning_of(train, variant, manifest)
        pretraining_of(train, variant)
    assert repr(train) == before
