"""Initial weights of a run, from a file with timm's names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mics_fast
from mics_fast import evaluate, export, report, train
from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.models.geometry import Geometry, new_encoder
from mics_fast.models.sizes import SIZES, canonical
from mics_fast.models.vit import Parts, VisionTransformer
from mics_fast.options.commands import parse_train
from mics_fast.training.run import Run
from mics_fast.training.start import with_encoder

STILL = ["--pretrain.lr", "1e-30", "--pretrain.lr_final", "1e-30", "--finetune.lr", "1e-30"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(5)
    size = SIZES["vit_nano"]
    return VisionTransformer(size.image, size.patch, size.width, size.depth, size.heads)


@pytest.fixture(scope="module")
def file(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save({**encoder.state_dict(), "head.weight": torch.zeros(7, 128)}, path)
    return str(path)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with weights of no built-in size, as a repository in timm's format holds them."""
    torch.manual_seed(6)
    parts = Parts(hidden=96, layer_scale=True, antialias=False)
    folder = tmp_path_factory.mktemp("foreign")
    save_file(new_encoder(Geometry(28, 7, 64, 2, 4, parts)).state_dict(),
              folder / "model.safetensors")  # fmt: skip
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    config = {"architecture": "vit", "model_args": {"num_heads": 4}, "pretrained_cfg": stated}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights(run, stage):
    path = Checkpoints(run / "checkpoints" / stage).latest()
    return torch.load(path / "state.pt", weights_only=True)["stage"]


def assert_starts_from(encoder, state, prefix):
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(state[f"{prefix}.{name}"], tensor)


def test_pre_training_starts_student_and_teacher_from_a_file(
    encoder, file, few_steps, phantom_manifest, tmp_path, capsys
):
    run = tmp_path / "run"
    train.main(
        [*few_steps, *STILL, "--model.init", file, "--data.manifest", str(phantom_manifest),
         "--out", str(run)]
    )  # fmt: skip
    count = len(encoder.state_dict())
    assert f"encoder from {file}: {count} of {count} tensors" in capsys.readouterr().out
    for part in ("model.encoder", "model.teacher_encoder"):
        assert_starts_from(encoder, weights(run, "pretrain"), part)
    # Fine-tuning starts from the pre-training, which says itself what it started from.
    assert_starts_from(encoder, weights(run, "finetune"), "model.encoders.nbi")


def test_fine_tuning_alone_starts_every_encoder_from_a_file(
    encoder, file, few_steps, phantom_manifest, tmp_path
):
    run = tmp_path / "run"
    train.main(
        [*few_steps, *STILL, "--stage", "finetune", "--model.init", file,
         "--data.manifest", str(phantom_manifest), "--out", str(run)]
    )  # fmt: skip
    for name in ("wli", "nbi"):
        assert_starts_from(encoder, weights(run, "finetune"), f"model.encoders.{name}")


def test_a_pre_training_fits_whatever_its_own_start_was(
    file, few_steps, phantom_manifest, trained_run, tmp_path, capsys
):
    arguments = [*few_steps, "--stage", "finetune", "--data.manifest", str(phantom_manifest)]
    arguments += ["--model.init", file, "--finetune.init", str(trained_run)]
    train.main([*arguments, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "fine-tuning from" in said and "encoder from" not in said


def test_the_weights_state_the_network_whatever_the_size_option_says(
    foreign, few_steps, phantom_manifest, tmp_path, capsys
):
    """Width, patch, LayerScale, image side and mean of the weights, not those of vit_micro."""
    run, weights = tmp_path / "run", tmp_path / "weights"
    shutil.copytree(foreign, weights)
    options = ["--stage", "finetune", "--model.init", str(weights), "--model.size", "vit_micro"]
    train.main([*few_steps, *options, "--data.normalize", "fixed",
                "--data.manifest", str(phantom_manifest), "--out", str(run)])  # fmt: skip
    stored = Run.open(run).config
    assert stored.model.geometry["patch"] == 7 and stored.data.mean["nbi"] == (0.5, 0.4, 0.3)
    shutil.rmtree(weights)  # from here on the run alone is read
    assert "vit_micro" not in capsys.readouterr().out
    evaluate.main([str(run), "--json", str(tmp_path / "e.json"), "--resamples", "20"])
    export.main([str(run), "--out", str(tmp_path / "exported"), "--resamples", "20"])
    report.main([str(run), "--out", str(tmp_path / "r.html"), "--resamples", "20"])
    made = json.loads((tmp_path / "exported" / "model.json").read_text())["preprocessing"]
    assert made["image_size"] == 28 and made["mean"]["wli"] == [0.5, 0.4, 0.3]
    assert "ViT 64 x 2, patch 7" in (tmp_path / "exported" / "MODEL_CARD.md").read_text()


def test_a_deviation_of_zero_in_the_configuration_of_weights_is_refused(
    foreign, few_steps, phantom_manifest, tmp_path
):
    weights = tmp_path / "weights"
    shutil.copytree(foreign, weights)
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.0, 0.1]}
    (weights / "config.json").write_text(json.dumps({"pretrained_cfg": stated}))
    with pytest.raises(InputError, match=r"option data\.std .* wanted a number above 0"):
        train.main(
            [
                *few_steps,
                "--model.init",
                str(weights),
                "--data.normalize",
                "fixed",
                "--data.manifest",
                str(phantom_manifest),
                "--out",
                str(tmp_path / "run"),
            ]
        )


def test_views_have_the_side_that_is_asked_for(few_steps, phantom_manifest, tmp_path):
    run = tmp_path / "run"
    train.main([*few_steps, "--stage", "finetune", "--model.image", "48",
                "--data.manifest", str(phantom_manifest), "--out", str(run)])  # fmt: skip
    image = mics_fast.load(run).classifier
    assert image.image_size == 48
    assert image.model.encoders["wli"].pos_embed.shape[1] == 1 + 36


def test_a_side_that_the_patch_does_not_divide_is_refused(few_steps, phantom_manifest, tmp_path):
    arguments = [*few_steps, "--model.image", "50", "--data.manifest", str(phantom_manifest)]
    with pytest.raises(InputError, match=r"model\.image is 50, wanted a multiple of 8"):
        train.main([*arguments, "--out", str(tmp_path / "run")])


def test_weights_of_a_built_in_size_are_of_that_size(file, few_steps, phantom_manifest, tmp_path):
    """So that a run from them takes up the pre-training of one without."""
    plain = parse_train([*few_steps, "--model.size", "vit_nano"]).config
    stored = with_encoder(parse_train([*few_steps, "--model.init", file]).config, ("wli",)).model
    assert stored.geometry and canonical(replace(stored, init="")) == plain.model
    assert canonical(replace(plain.model, image=64)) == plain.model


def test_both_stages_start_from_foreign_weights(foreign, few_steps, phantom_manifest, tmp_path):
    run = tmp_path / "run"
    options = ["--model.init", str(foreign), "--model.image", "42"]
    train.main([*few_steps, *STILL, *options, "--data.manifest", str(phantom_manifest),
                "--out", str(run)])  # fmt: skip
    given = load_file(foreign / "model.safetensors")
    state = weights(run, "finetune")
    name = "blocks.1.attn.qkv.weight"
    torch.testing.assert_close(state[f"model.encoders.nbi.{name}"], given[name])
    assert state["model.encoders.nbi.pos_embed"].shape == (1, 1 + 36, 64)


def test_a_stored_geometry_of_no_network_is_refused(few_steps, phantom_manifest, tmp_path):
    file = tmp_path / "geometry.yaml"
    file.write_text("model: {geometry: {width: 64}}\n")
    with pytest.raises(InputError, match=r"model\.geometry lacks or does not know antialias"):
        train.main([*few_steps, "--config", str(file), "--data.manifest", str(phantom_manifest),
                    "--out", str(tmp_path / "run")])  # fmt: skip
