"""The geometry of a published encoder, read off its tensors and its configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from mics_fast.common.errors import InputError
from mics_fast.models.geometry import Geometry, as_numbers, from_numbers, geometry_of, new_encoder
from mics_fast.models.initial_weights import load_initial_weights
from mics_fast.models.vit import Parts

FAMILIES = {
    "plain": Parts(hidden=256),
    "dinov2": Parts(hidden=256, layer_scale=True, antialias=False),
    "registers": Parts(hidden=256, layer_scale=True, registers=4, prefix_positions=False),
    "clip": Parts(hidden=256, pre_norm=True, patch_bias=False, eps=1e-5, quick_gelu=True),
}


def geometry(family, image=28):
    return Geometry(image, 7, 128, 2, 2, FAMILIES[family])


def state(family):
    torch.manual_seed(0)
    encoder = new_encoder(geometry(family))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.1)
    return encoder.state_dict()


def config(family):
    return {"architecture": "vit_clip_quickgelu" if family == "clip" else "vit"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_geometry_is_read_off_its_tensors(family):
    assert geometry_of("weights", state(family), config(family)) == geometry(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_a_family_loads_whole(family, tmp_path):
    given = state(family)
    save_file(given, tmp_path / "weights.safetensors")
    encoder = new_encoder(geometry(family))
    said = load_initial_weights(tmp_path / "weights.safetensors", [encoder])
    assert said.endswith(f"{len(given)} of {len(given)} tensors")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, given[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_changes_what_the_encoder_computes(family):
    """A part that the forward pass forgot would leave some tensor without a gradient."""
    encoder = new_encoder(geometry(family))
    encoder.load_state_dict(state(family))
    encoder(torch.randn(2, 3, 28, 28)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_register_tokens_are_not_returned():
    encoder = new_encoder(geometry("registers"))
    images = torch.randn(2, 3, 28, 28)
    assert encoder(images).shape == (2, 17, 128)
    assert torch.allclose(encoder(images, wanted=1), encoder(images)[:, :1], atol=1e-6)
    assert encoder(images, torch.tensor([[3, 1], [0, 15]])).shape == (2, 3, 128)


def test_positions_move_to_another_image_size(tmp_path):
    save_file(state("registers"), tmp_path / "weights.safetensors")
    encoder = new_encoder(geometry("registers", image=42))
    said = load_initial_weights(tmp_path / "weights.safetensors", [encoder])
    assert "resampled from 4 x 4 to 6 x 6" in said


def test_the_configuration_states_heads_and_normalisation():
    stated = {
        "architecture": "vit_small",
        "model_args": {"num_heads": 4},
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]},
    }
    found = geometry_of("weights", state("plain"), stated)
    assert found == replace(geometry("plain"), heads=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("blocks.0.mlp.w12.weight", (512, 128), r"blocks\.N\.mlp\.w12\.weight"),
        ("blocks.1.attn.q_norm.weight", (64,), r"blocks\.N\.attn\.q_norm\.weight"),
        ("dist_token", (1, 1, 128), "dist_token"),
        ("patch_embed.proj.weight", (128, 4, 7, 7), "4 channels"),
        ("pos_embed", (1, 19, 128), "19 positions"),
    ],
)
def test_a_part_that_is_not_supported_is_named(name, shape, sentence):
    with pytest.raises(InputError, match=sentence):
        geometry_of("weights", state("plain") | {name: torch.zeros(shape)})


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(InputError, match=r"no patch_embed\.proj\.weight"):
        geometry_of("weights", {"conv1.weight": torch.zeros(8, 3, 3, 3)})


@pytest.mark.parametrize(
    "stated",
    [
        {"model_args": None, "pretrained_cfg": [1]},
        {"model_args": {"num_heads": "many"}, "pretrained_cfg": {"mean": ["a", "b", "c"]}},
        {"model_args": {"num_heads": -2}, "pretrained_cfg": {"std": [1, 2], "mean": 3}},
    ],
)
def test_what_a_configuration_states_badly_is_not_read(stated):
    assert geometry_of("weights", state("plain"), stated) == geometry("plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_geometry_is_read_back_whole(family):
    assert from_numbers(as_numbers(geometry(family))) == geometry(family)


@pytest.mark.parametrize(
    ("name", "value"), [("heads", 3), ("width", 0), ("image", 29), ("depth", 10**4), ("width", 66)]
)
def test_a_stored_geometry_of_no_network_is_refused(name, value):
    with pytest.raises(InputError, match="is of no vision transformer"):
        from_numbers(as_numbers(geometry("plain")) | {name: value})
