"""Initial weights of a run, from a file with timm's names."""

from __future__ import annotations

import pytest
import torch

from mics_fast import train
from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.models.sizes import SIZES
from mics_fast.models.vit import VisionTransformer

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


def test_a_file_of_another_size_names_both(file, few_steps, phantom_manifest, tmp_path):
    arguments = [*few_steps, "--model.size", "vit_tiny", "--model.init", file]
    arguments += ["--data.manifest", str(phantom_manifest), "--out", str(tmp_path / "run")]
    nano = SIZES["vit_nano"]
    held = f"width {nano.width}, depth {nano.depth} "
    with pytest.raises(InputError, match=f"{held}.* wants one of width 192, depth 12"):
        train.main(arguments)
