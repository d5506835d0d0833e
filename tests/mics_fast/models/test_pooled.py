"""Frozen encoders: pooled features, and their fusion."""

from __future__ import annotations

import pytest
import torch

from mics_fast.models.classifier import Classifier
from mics_fast.models.pooled import PooledEncoder, PooledFusion

BOTH = pytest.mark.parametrize("kind", ["mlp", "bilinear"])


@BOTH
def test_fusion_starts_as_the_mean_of_what_is_there(kind):
    fusion = PooledFusion(3, 8, kind)
    features = torch.randn(4, 3, 1, 8)
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
    found = fusion(features, present)
    assert torch.allclose(found[0], features[0, :, 0].mean(0), atol=1e-6)
    assert torch.allclose(found[1], features[1, [0, 2], 0].mean(0), atol=1e-6)
    assert torch.equal(found[3], torch.zeros(8))


@BOTH
def test_an_absent_feature_is_never_read(kind):
    fusion = PooledFusion(2, 8, kind)
    torch.nn.init.normal_(fusion.out.weight)
    features, present = torch.randn(5, 2, 1, 8), torch.ones(5, 2, dtype=torch.bool)
    present[1, 0] = False
    other = features.clone()
    other[1, 0] = torch.nan
    assert torch.equal(fusion(features, present), fusion(other, present))


@BOTH
def test_the_joint_part_reads_both_modalities_together(kind):
    """Else the fusion could be written as a sum over modalities: mixed differences are not zero."""
    fusion = PooledFusion(2, 8, kind)
    torch.nn.init.normal_(fusion.out.weight)
    a, b = torch.randn(2, 2, 8)
    pairs = torch.stack([torch.stack([x, y]) for x in a for y in b]).unsqueeze(2)
    found = fusion(pairs, torch.ones(4, 2, dtype=torch.bool))
    assert (found[0] - found[1] - found[2] + found[3]).abs().max() > 1e-3


def test_features_are_standardised_channel_by_channel():
    encoder = PooledEncoder(8, "cls")
    features = 5 + 3 * torch.randn(100, 8)
    encoder.standardise(features)
    tokens = encoder(features)
    assert tokens.shape == (100, 1, 8)
    assert torch.allclose(tokens.mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(tokens.var(0, correction=0), torch.ones(8), atol=1e-4)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_opinions_on_images_are_those_on_their_features(pool, tiny):
    torch.manual_seed(0)
    model = Classifier(tiny, ("wli", "nbi"), 3, pool=pool, fusion_depth=1, pooled="mlp")
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight)
    shared = tiny.encoder()
    images = {name: torch.randn(4, 3, 16, 16) for name in ("wli", "nbi")}
    present = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()
    tokens = {name: shared(own) for name, own in images.items()}
    features = {n: t[:, 0] if pool == "cls" else t[:, 1:].mean(1) for n, t in tokens.items()}
    for name, encoder in model.encoders.items():
        encoder.standardise(features[name])
    kept = model(features, present)
    for encoder in model.encoders.values():
        encoder.attach(shared)
    read = model(images, present)
    assert torch.equal(read.present, kept.present)
    torch.testing.assert_close(read.logits[read.present], kept.logits[read.present])


def test_what_is_saved_of_a_classifier_of_features_holds_no_encoder(tiny):
    model = Classifier(tiny, ("wli", "nbi"), 3, pool="cls", fusion_depth=1, pooled="bilinear")
    assert not any("blocks" in name for name in model.state_dict())
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"fusion", "heads"}
