"""The table of sizes: every row builds models whose parts fit together."""

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.models.discriminator import Discriminator
from mics_fast.models.geometry import Geometry, as_numbers
from mics_fast.models.masked_autoencoder import random_mask
from mics_fast.models.pretraining import PretrainModel
from mics_fast.models.sizes import SIZES, Size, size_of
from mics_fast.models.vit import Parts
from mics_fast.options import ModelConfig

every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


@every_size
def test_patches_tile_the_image_and_heads_divide_the_widths(size: Size):
    assert size.image % size.patch == 0
    assert size.width % size.heads == 0
    assert size.decoder_width % size.decoder_heads == 0
    assert size.discriminator_width % size.discriminator_heads == 0


@every_size
def test_encoder_decoder_and_discriminator_fit_together(size: Size):
    with torch.device("meta"):  # shapes without arithmetic
        model = PretrainModel(size, ["wli"], pool="cls", projection=8, temperature=0.07)
        discriminator = Discriminator(
            size.num_patches,
            size.patch_dim,
            size.discriminator_width,
            size.discriminator_depth,
            size.discriminator_heads,
        )
        mask = random_mask((0, 0), torch.arange(2), 0, size.num_patches, 0.75, 0)
        output = model({"wli": torch.zeros(2, 3, size.image, size.image)}, {"wli": mask})
    _, count, numbers = output.targets["wli"].shape
    assert (count, numbers) == (size.num_patches, size.patch_dim)
    assert output.predictions["wli"].shape == (2, 3 * count // 4, numbers)
    assert discriminator.embed.weight.shape == (size.discriminator_width, numbers)
    assert discriminator.pos_embed.shape == (1, 1 + count, size.discriminator_width)


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("vit_nano", 224_241),
        ("vit_micro", 980_417),
        ("vit_tiny", 6_491_073),
        ("vit_small", 25_219_969),
        ("vit_base", 112_295_681),
    ],
)
def test_pre_training_models_keep_their_number_of_trainable_parameters(name, trainable):
    with torch.device("meta"):
        model = PretrainModel(SIZES[name], ["wli"], pool="cls", projection=256, temperature=0.07)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(16, 16, 65536, 256, 1, Parts()),
        Geometry(16, 16, 64, 256, 1, Parts(hidden=65536 * 256)),
        Geometry(65536, 1, 64, 1, 1, Parts()),
        Geometry(65536, 65536, 64, 1, 1, Parts()),
    ],
)
def test_an_encoder_that_exhausts_the_machine_is_refused(geometry: Geometry):
    with pytest.raises(InputError, match=r"GiB, wanted at most .* on this machine"):
        size_of(ModelConfig(geometry=as_numbers(geometry)))


def test_an_image_that_exhausts_the_machine_is_refused():
    with pytest.raises(InputError, match=r"GiB, wanted at most .* on this machine"):
        size_of(ModelConfig(size="vit_base", image=16 * 2**16))


@every_size
def test_every_size_fits_this_machine(size: Size):
    name = next(name for name, own in SIZES.items() if own is size)
    assert size_of(ModelConfig(size=name)) == size
