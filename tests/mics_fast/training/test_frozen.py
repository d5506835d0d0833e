"""Runs with frozen or adapted encoders, from training to export."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mics_fast
from mics_fast import evaluate, export, report, train
from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.models.geometry import Geometry, new_encoder
from mics_fast.models.vit import Parts
from mics_fast.training import features

FROZEN = ["--stage", "finetune", "--finetune.encoder", "frozen", "--finetune.augmented_views", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights of an encoder with LayerScale."""
    torch.manual_seed(6)
    encoder = new_encoder(Geometry(32, 8, 64, 2, 4, Parts(hidden=96, layer_scale=True)))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = tmp_path_factory.mktemp("weights")
    save_file(encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_args": {"num_heads": 4}}))
    return folder


def command(few_steps, manifest, run, weights, *options):
    train.main([*few_steps, *FROZEN, "--model.init", str(weights), "--data.manifest",
                str(manifest), "--out", str(run), *map(str, options)])  # fmt: skip


@pytest.fixture(scope="module")
def frozen(few_steps, phantom_manifest, weights, tmp_path_factory):
    """A finished run whose weights folder is gone."""
    gone = tmp_path_factory.mktemp("gone") / "weights"
    shutil.copytree(weights, gone)
    run = tmp_path_factory.mktemp("frozen") / "run"
    command(few_steps, phantom_manifest, run, gone, "--finetune.steps", 8)
    shutil.rmtree(gone)
    return run


def test_a_finished_run_is_read_like_any_other(frozen, tmp_path):
    evaluate.main([str(frozen), "--json", str(tmp_path / "e.json"), "--resamples", "20"])
    views = json.loads((tmp_path / "e.json").read_text())["views"]
    assert {"fused", "wli", "nbi"} <= views.keys()
    export.main([str(frozen), "--out", str(tmp_path / "exported"), "--resamples", "20"])
    made = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert made["preprocessing"]["image_size"] == 32
    report.main([str(frozen), "--out", str(tmp_path / "r.html"), "--resamples", "20"])
    assert "what the answer depends on" in (tmp_path / "r.html").read_text()


def test_prediction_goes_through_the_encoder_of_the_run(frozen, phantom_manifest, weights):
    model = mics_fast.load(frozen)
    assert len(model.predict(phantom_manifest)) == 48
    own, given = load_file(frozen / "encoder.safetensors"), load_file(weights / "model.safetensors")
    assert all(torch.equal(own[name], given[name]) for name in given)


def test_checkpoints_hold_heads_and_fusion_alone(frozen):
    path = Checkpoints(frozen / "checkpoints" / "finetune").latest()
    state = torch.load(path / "state.pt", weights_only=True)["stage"]
    assert not any("blocks" in name for name in state)
    assert state["model.encoders.wli.scale"].shape == (64,)


def test_every_term_is_trained_on_features(frozen):
    lines = [json.loads(line) for line in (frozen / "metrics.jsonl").read_text().splitlines()]
    for term in ("supervised", "pseudo", "modality_consistency", "shift"):
        assert f"loss_{term}" in lines[-1]
    assert "val_macro_f1" in lines[-1]


def test_a_run_goes_on_without_its_weights_as_if_it_had_not_stopped(
    few_steps, phantom_manifest, weights, frozen, tmp_path, monkeypatch
):
    """Stopped after three steps of eight by a loop that is asked to end there."""
    from mics_fast.engine.loop import StopOnSignal

    gone, run = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(weights, gone)
    asked = iter([False] * 2 + [True] * 100)
    with monkeypatch.context() as patch:
        told = property(lambda _: next(asked), lambda *_: None)
        patch.setattr(StopOnSignal, "asked", told, raising=False)
        command(few_steps, phantom_manifest, run, gone, "--finetune.steps", 8)
    shutil.rmtree(gone)
    train.main(["--resume", "--out", str(run)])
    last = [(own / "metrics.jsonl").read_text().splitlines()[-1] for own in (run, frozen)]
    ours, theirs = ({n: v for n, v in json.loads(line).items() if "loss" in n} for line in last)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_kept_features_are_taken_by_another_run(
    few_steps, phantom_manifest, weights, tmp_path, monkeypatch
):
    cache = ["--finetune.feature_cache", tmp_path / "cache"]
    command(few_steps, phantom_manifest, tmp_path / "a", weights, *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # plain, augmented, val
    with monkeypatch.context() as patch:
        patch.delattr(features, "pooled")  # nothing is encoded
        command(few_steps, phantom_manifest, tmp_path / "b", weights, *cache)
    one, other = ((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in "ab")
    assert json.loads(one)["loss"] == json.loads(other)["loss"]
    command(few_steps, phantom_manifest, tmp_path / "c", weights, *cache, "--model.image", 64)
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_damaged_features_are_made_anew(few_steps, phantom_manifest, weights, tmp_path):
    cache = ["--finetune.feature_cache", tmp_path / "cache"]
    command(few_steps, phantom_manifest, tmp_path / "a", weights, *cache)
    before = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    for file in before:
        file.write_bytes(b"damaged")
    command(few_steps, phantom_manifest, tmp_path / "b", weights, *cache)
    assert {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before


def test_frozen_random_weights_are_refused(few_steps, phantom_manifest, tmp_path):
    with pytest.raises(InputError, match=r"encoder is frozen, wanted weights .* model\.init"):
        train.main([*few_steps, *FROZEN, "--data.manifest", str(phantom_manifest),
                    "--out", str(tmp_path / "run")])  # fmt: skip


def test_weights_without_a_class_token_are_refused(few_steps, phantom_manifest, weights, tmp_path):
    """A new class token would stay random: the features would be of another network."""
    state = load_file(weights / "model.safetensors")
    del state["cls_token"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no class token .* finetune\.encoder is frozen"):
        command(few_steps, phantom_manifest, tmp_path / "run", tmp_path)


def test_pre_training_may_come_before(few_steps, phantom_manifest, trained_run, tmp_path):
    train.main([*few_steps, *FROZEN, "--finetune.init", str(trained_run), "--model.pooled_fusion",
                "bilinear", "--data.manifest", str(phantom_manifest),
                "--out", str(tmp_path / "run")])  # fmt: skip
    assert mics_fast.load(tmp_path / "run").predict(phantom_manifest)


def test_a_run_without_its_encoder_is_refused(frozen, tmp_path):
    shutil.copytree(frozen, tmp_path / "run")
    (tmp_path / "run" / "encoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"encoder\.safetensors cannot be read"):
        mics_fast.load(tmp_path / "run")
    (tmp_path / "run" / "encoder.safetensors").unlink()
    with pytest.raises(InputError, match=r"encoder\.safetensors is missing"):
        mics_fast.load(tmp_path / "run")
    os.mkfifo(tmp_path / "run" / "encoder.safetensors")
    with pytest.raises(InputError, match=r"encoder\.safetensors is no regular file"):
        mics_fast.load(tmp_path / "run")


def test_an_adapted_run_learns_low_rank_additions_alone(
    few_steps, phantom_manifest, weights, tmp_path
):
    run, given = tmp_path / "run", load_file(weights / "model.safetensors")
    train.main(
        [
            *few_steps,
            "--stage",
            "finetune",
            "--finetune.encoder",
            "lora",
            "--model.init",
            str(weights),
            "--data.manifest",
            str(phantom_manifest),
            "--out",
            str(run),
        ]
    )
    path = Checkpoints(run / "checkpoints" / "finetune").latest()
    state = torch.load(path / "state.pt", weights_only=True)["stage"]
    own = {n.removeprefix("model.encoders.wli."): v for n, v in state.items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in given.items())
    assert own["blocks.0.attn.qkv.lora_up"].any()
    export.main([str(run), "--out", str(tmp_path / "exported"), "--resamples", "20"])
    assert mics_fast.load(tmp_path / "exported").predict(phantom_manifest)
