"""Masks, targets and the decoder of the masked auto-encoder."""

import pytest
import torch
from scipy.stats import chi2

from mics_fast.common.errors import InputError
from mics_fast.models.masked_autoencoder import (
    MaskedDecoder,
    patch_targets,
    patchify,
    random_mask,
    unpatchify,
)


def mask(sample_id=None, *, seed=(1, 2), step=3, patches=16, ratio=0.75, stream=0):
    ids = torch.arange(5) if sample_id is None else torch.as_tensor(sample_id)
    return random_mask(seed, ids, step, patches, ratio, stream)


def tiny_decoder() -> MaskedDecoder:
    torch.manual_seed(0)
    return MaskedDecoder(num_patches=16, patch_dim=48, encoder_width=12, width=8, depth=2, heads=2)


# -- patches and targets


def test_unpatchify_undoes_patchify():
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(unpatchify(patchify(images, 4), 4), images, rtol=0, atol=0)


def test_targets_have_mean_zero_and_variance_one_in_every_patch():
    targets = patch_targets(5 + 3 * torch.randn(2, 3, 16, 16), 4)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.var(-1, correction=0), torch.ones(2, 16))


def test_the_target_of_a_uniform_patch_is_zero():
    assert patch_targets(torch.full((1, 3, 4, 4), 0.7), 4).abs().max() < 1e-3


# -- masks


@pytest.mark.parametrize(("patches", "ratio", "hidden"), [(16, 0.75, 12), (10, 0.9, 9), (9, 0, 0)])
def test_a_mask_splits_all_patches_into_visible_and_hidden(patches, ratio, hidden):
    visible, rest = mask(patches=patches, ratio=ratio)
    assert visible.shape == (5, patches - hidden)
    assert rest.shape == (5, hidden)
    assert visible.dtype == rest.dtype == torch.int64
    everything = torch.cat([visible, rest], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(patches).expand(5, -1))


def test_masks_do_not_change_between_versions():
    visible, _ = mask([7], stream=1)
    assert visible.tolist() == [[1, 0, 11, 10]]  # a resumed run must draw what the first run drew


def test_a_samples_mask_does_not_depend_on_its_batch_or_rank():
    ids = torch.tensor([11, 4, 9, 2, 30, 7])
    visible, hidden = mask(ids)
    for rank in range(2):
        own_visible, own_hidden = mask(ids[rank::2])
        assert torch.equal(own_visible, visible[rank::2])
        assert torch.equal(own_hidden, hidden[rank::2])
    assert torch.equal(mask(ids.flip(0))[0], visible.flip(0))


def test_the_seed_may_be_a_tensor():
    assert torch.equal(mask(seed=torch.tensor([1, 2]))[0], mask(seed=(1, 2))[0])
    assert torch.equal(mask(step=torch.tensor(3))[0], mask(step=3)[0])


@pytest.mark.parametrize(
    "change", [{"seed": (2, 2)}, {"seed": (1, 3)}, {"step": 4}, {"stream": 1}], ids=str
)
def test_masks_vary_with_seed_step_and_stream(change):
    ids = torch.arange(64)
    same = (mask(ids, patches=64)[0] == mask(ids, patches=64, **change)[0]).double().mean()
    assert same < 0.05  # by chance 1 / 64


def test_masks_vary_from_sample_to_sample():
    visible, _ = mask(torch.arange(500), patches=64)
    assert len(visible.sort(dim=1).values.unique(dim=0)) == 500


@pytest.mark.parametrize("by", ["sample", "step", "stream"])
def test_every_patch_is_hidden_equally_often(by):
    draws, patches, ratio = 1500, 17, 12 / 17
    if by == "sample":
        hidden = mask(torch.arange(draws), patches=patches, ratio=ratio)[1]
    else:
        one = [mask([5], patches=patches, ratio=ratio, **{by: n})[1] for n in range(draws)]
        hidden = torch.cat(one)
    counts = hidden.flatten().bincount(minlength=patches).double()
    variance = draws * ratio * (1 - ratio)
    # Drawing without replacement correlates the counts, which is worth the factor (N - 1) / N.
    statistic = ((counts - draws * ratio) ** 2 / variance).sum() * (patches - 1) / patches
    assert chi2.sf(statistic.item(), patches - 1) > 1e-3


def test_neighbouring_patches_are_hidden_independently():
    _, hidden = mask(torch.arange(4000), patches=16, ratio=0.5)
    is_hidden = torch.zeros(4000, 16).scatter(1, hidden, 1.0)
    correlation = torch.corrcoef(is_hidden.T).fill_diagonal_(-1 / 15)
    assert (correlation + 1 / 15).abs().max() < 5 / 4000**0.5  # five standard errors


@pytest.mark.parametrize("ratio", [1.0, 0.99, -0.01, float("inf"), float("nan")])
def test_a_mask_ratio_that_leaves_nothing_visible_is_an_input_error(ratio):
    with pytest.raises(InputError, match=r"^mask_ratio is "):
        mask(ratio=ratio)


# -- decoder


def test_masked_predictions_differ_from_patch_to_patch():
    visible, hidden = mask([0, 1])
    predictions = tiny_decoder()(torch.randn(2, 5, 12), visible, hidden)
    assert predictions.shape == (2, 12, 48)
    distance = torch.cdist(predictions, predictions) + torch.eye(12)
    assert distance.min() > 0.01  # the published code: 0.0


def test_a_prediction_depends_on_positions_not_on_the_order_of_the_lists():
    visible, hidden = mask([0, 1])
    decoder, tokens = tiny_decoder(), torch.randn(2, 5, 12)
    predictions = decoder(tokens, visible, hidden)
    flipped = decoder(
        torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1), visible.flip(1), hidden.flip(1)
    )
    torch.testing.assert_close(flipped.flip(1), predictions)


def test_a_prediction_depends_on_where_the_visible_patches_are():
    visible, hidden = mask([0, 1])
    decoder, tokens = tiny_decoder(), torch.randn(2, 5, 12)
    moved = decoder(tokens, visible.roll(1, dims=1), hidden)
    assert (moved - decoder(tokens, visible, hidden)).abs().max() > 1e-3


def test_positions_are_saved_but_not_learned():
    decoder = tiny_decoder()
    assert "positions" in decoder.state_dict()
    assert "positions" not in dict(decoder.named_parameters())
    assert decoder.positions.abs().sum(dim=1).min() > 0


def test_every_decoder_parameter_learns():
    decoder, (visible, hidden) = tiny_decoder(), mask([0, 1])
    decoder(torch.randn(2, 5, 12), visible, hidden).square().sum().backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_decoder_learns_to_place_a_pattern():
    """The hidden patches of one image, each with its own content, can be told apart."""
    decoder, (visible, hidden) = tiny_decoder(), mask([0])
    tokens, wanted = torch.randn(1, 5, 12), torch.randn(1, 12, 48)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        loss = (decoder(tokens, visible, hidden) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    spread = (wanted - wanted.mean(dim=1, keepdim=True)).square().mean().item()
    assert losses[-1] < 0.7 * spread  # one guess for all patches cannot go below the spread
